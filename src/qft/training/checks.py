"""Checks before a model is loaded: that a chat's answers, and the end of a turn, are what is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qft.errors import BadOption, BadShape
from qft.loss import IGNORE

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = (
    {"role": "user", "content": "What is seven?"},
    {"role": "assistant", "content": "A number."},
    {"role": "user", "content": "What is eight?"},
    {"role": "assistant", "content": "Another one."},
)


class Chat:
    """Messages → token ids and labels, with the loss on the assistant's answers and on the token that ends them.

    A template with `{% generation %}` marks its answers itself. Without it, an answer is what the conversation has
    beyond the same one with the generation prompt in the answer's place, up to the token that ends the turn.

    Attributes:
        end: the id of the token that ends an answer, or None where the template has none.
        findings: what is doubtful, each with what to do.

    Raises:
        BadOption: there is no template, or it hides which tokens are the answer's.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "answers", template: str | None = None):
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.template = _template(tokenizer, template)
        self.marks = bool(_GENERATION.search(self.template))
        self.findings: list[str] = []
        self.special = set(tokenizer.all_special_ids)
        self.special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self.end: int | None = None
        self._probe()

    def __call__(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation; labels are -100 where nothing is learnt.

        Raises:
            BadOption: in this conversation the answers' tokens cannot be told from the others.
        """
        if self.loss_on == "all":
            ids = self._ids(messages, tools)
            return ids, list(ids)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.marks:
            ids, labels = self._marked(messages, tools)
            if self.loss_on == "last_answer":
                first = len(self._ids(messages[: answers[-1]], tools, generation=True))
                labels = [IGNORE if i < first else label for i, label in enumerate(labels)]
            return ids, labels
        ids = self._ids(messages, tools)
        labels = [IGNORE] * len(ids)
        for i in answers if self.loss_on == "answers" else answers[-1:]:
            before = self._ids(messages[:i], tools, generation=True)
            after = ids if i == len(messages) - 1 else self._ids(messages[: i + 1], tools)
            if ids[: len(before)] != before or ids[: len(after)] != after or len(after) <= len(before):
                raise BadOption(
                    "the chat template renders earlier turns in another way once others follow, so that the answer's tokens "
                    "cannot be told: mark them with {% generation %} in a template of your own (chat_template=), or "
                    "loss_on='last_answer'"
                )
            stop = self._end_of(after, len(before))
            labels[len(before) : stop] = ids[len(before) : stop]
        return ids, labels

    def completion(
        self, prompt: Sequence[dict[str, Any]], answer: Sequence[dict[str, Any]], tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """The same of a conversation of which only the last messages are learnt."""
        ids, labels = self([*prompt, *answer], tools)
        start = len(self._ids(prompt, tools, generation=True))
        return ids, [IGNORE if i < start else label for i, label in enumerate(labels)]

    def _end_of(self, ids: list[int], start: int) -> int:
        """Where what is learnt of ids[start:] stops: behind the special token that only blanks follow, if any."""
        for i in range(len(ids) - 1, start - 1, -1):
            if ids[i] in self.special:
                return i + 1
            if self.tokenizer.decode([ids[i]]).strip():
                break
        return len(ids)

    def _ids(self, messages: Sequence[dict[str, Any]], tools: Any, generation: bool = False) -> list[int]:
        return list(self._render(messages, tools, add_generation_prompt=generation)["input_ids"])

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, **options: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=self.template, tokenize=True, return_dict=True, **options
            )
        except (jinja2.TemplateError, TypeError) as error:  # roles that it does not take, such as a system's
            raise BadOption(f"the chat template refuses this conversation: {error}") from error

    def _marked(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
        out = self._render(messages, tools, return_assistant_tokens_mask=True)
        ids = list(out["input_ids"])
        return ids, [i if m else IGNORE for i, m in zip(ids, out["assistant_masks"])]

    def _probe(self) -> None:
        """Learn how the template ends a turn; refuse it where it cannot be used."""
        try:
            ids, labels = self(PROBE)
        except BadOption:
            # where several answers cannot be told, one may
            ids, labels = self(PROBE if self._take_trls() else PROBE[:2])
        learnt = [i for i, label in enumerate(labels) if label != IGNORE]
        if not learnt:
            raise BadOption("the chat template's {% generation %} marks no token: put it around the assistant's answer")
        text = self.tokenizer.decode([ids[i] for i in learnt])
        bare = "".join(text.split())  # some tokenizers put blanks between tokens
        if not any("".join(PROBE[i]["content"].split()) in bare for i in (1, 3)):
            raise BadOption(f"the chat template does not show the answer among what is learnt, which is {text!r}")
        tail = next((i for i in reversed(learnt) if self.tokenizer.decode([ids[i]]).strip()), learnt[-1])
        if ids[tail] in self.special:
            self.end = ids[tail]
        else:
            left = next((i for i in ids[learnt[-1] + 1 :] if i in self.special), None)
            what = (
                "has no token that ends an answer: the model will not learn to stop; end answers with {{ eos_token }}"
                if left is None
                else f"leaves {self.tokenizer.decode([left])!r}, which ends an answer, out of {{% generation %}}: the model "
                "will not learn to stop; take it in"
            )
            self.findings.append(f"the chat template {what}, in a template of your own (chat_template=)")

    def _take_trls(self) -> bool:
        """TRL keeps templates with marks for models whose own hide the answers."""
        try:
            from trl.chat_template_utils import get_training_chat_template

            template = get_training_chat_template(self.tokenizer)
        except Exception:  # none for this model
            return False
        if not template or not _GENERATION.search(template):
            return False
        self.template, self.marks = template, True
        return True


def _template(tokenizer: Any, template: str | None) -> str:
    if template == "chatml":
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        if missing:
            raise BadOption(
                f"chat_template='chatml': the tokenizer has no {' and no '.join(missing)}; use its own template"
            )
        return CHATML
    if template is not None:
        if "{" in template:
            return template
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadOption(
                f"chat_template={template!r} is neither 'chatml', nor a template, nor a file that can be read: {error}"
            ) from error
    found = tokenizer.chat_template
    found = found.get("default") if isinstance(found, dict) else found
    if not found:
        raise BadOption(
            "the data holds chats and the tokenizer has no chat template: give one (chat_template='chatml', or a file), or "
            "take the model's instruct version"
        )
    return str(found)


def check_end(tokenizer: Any, end: int | None, stops: Any) -> list[str]:
    """Whether generation stops where an answer ends. `stops`: the generation config's eos_token_id."""
    ids = {i for i in (stops if isinstance(stops, list | tuple) else [stops]) if i is not None}
    ids |= {tokenizer.eos_token_id} - {None}
    if end is None or end in ids:
        return []
    return [
        f"answers end with {tokenizer.decode([end])!r}, and generation stops at "
        f"{', '.join(repr(tokenizer.decode([i])) for i in sorted(ids)) or 'nothing'}: set eos_token_id of the model's "
        f"generation_config to {end} when you use it"
    ]


def check_vocabulary(tokenizer: Any, size: int | None, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the model has an embedding for every token of the data.

    Raises:
        BadShape: it has not.
    """
    if size is None:
        return []
    top = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if top >= size:
        raise BadShape(
            f"the token {tokenizer.decode([top])!r} has the id {top}, and the model has {size} embeddings: tokenizer and model "
            "do not belong together, or tokens were added without model.resize_token_embeddings"
        )
    if len(tokenizer) > size:
        return [
            f"the tokenizer has {len(tokenizer)} tokens and the model {size} embeddings; the data uses none of the others"
        ]
    return []


def check_padding(collator: Any, rows: Sequence[dict[str, Any]], pad: int | None) -> None:
    """That a batch of a short and a long row learns each row's own tokens and nothing of the padding.

    Raises:
        BadOption: padding is learnt, or a label that should be learnt is not.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    pair = [rows[i] for i in {order[0], order[-1]}]
    batch = collator([dict(row) for row in pair])
    learnt = sum(label != IGNORE for row in pair for label in row["labels"])
    found = int((batch["labels"] != IGNORE).sum())
    if found != learnt:
        raise BadOption(
            f"a batch learns {found} tokens where its rows have {learnt}: the padding token (id {pad}) is not masked rightly; "
            "give the tokenizer a pad_token that is not the token which ends an answer"
        )
