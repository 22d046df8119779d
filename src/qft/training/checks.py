"""Checks before a model is loaded: that a chat's answers, and the end of a turn, are what is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qft.data.messages import ChatTemplate, conversation, learnt_turns, pieces, tool_names
from qft.data.tokens import encoded
from qft.errors import BadOption, BadShape
from qft.ops.loss import IGNORE

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
    beyond the same one with the generation prompt in the answer's place, up to the token that ends the turn. The text
    of every answer that should be learnt is then looked up among the learnt tokens.

    Attributes:
        end: the id of the token that ends an answer, or None where the template has none.
        findings: what is doubtful, each with what to do.

    Raises:
        BadOption: there is no template, or it hides which tokens are the answer's.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "answers", template: str | None = None):
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.template = _template(tokenizer, template)
        self.chat_template = ChatTemplate(tokenizer, self.template)
        self.marks = bool(_GENERATION.search(self.template))
        self.findings: list[str] = []
        self.special = set(tokenizer.all_special_ids)
        self.special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self.end: int | None = None
        self._probe()

    def __call__(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation; labels are -100 where nothing is learnt.

        Raises:
            BadOption: in this conversation the answers' tokens cannot be told from the others, or an answer is not
                among them.
        """
        messages = conversation(messages)
        ids, labels = self._encoded(messages, tools)
        self._check_learnt([messages[i] for i in learnt_turns(messages, self.loss_on)], labels)
        self._check_tools(ids, tools)
        return ids, labels

    def completion(
        self, prompt: Sequence[dict[str, Any]], answer: Sequence[dict[str, Any]], tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """The same of a conversation of which only the last messages are learnt; all of it with loss_on="all"."""
        messages, first = conversation([*prompt, *answer]), len(prompt)
        ids, labels = self._encoded(messages, tools, first)
        turns = [i for i in learnt_turns(messages, self.loss_on) if i >= first or self.loss_on == "all"]
        self._check_learnt([messages[i] for i in turns], labels)
        self._check_tools(ids, tools)
        return ids, labels

    def _encoded(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, first: int = 0
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels, with the loss on answers from the message `first` on."""
        ids, runs = self._marked(messages, tools) if self.marks else (self._ids(messages, tools), [])
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = dict(zip(answers, runs)) if len(runs) == len(answers) else {}

        def span(turn: int) -> tuple[int, int]:
            return spans[turn] if turn in spans else self._span(messages, turn, ids, tools)

        turns = learnt_turns(messages, self.loss_on)
        if self.loss_on == "all":
            labels = list(ids)
            for turn in answers:
                if turn not in turns:
                    start, stop = span(turn)
                    labels[start:stop] = [IGNORE] * (stop - start)
            return ids, labels
        turns = [turn for turn in turns if turn >= first]
        labels = [IGNORE] * len(ids)
        for start, stop in runs if self.marks and turns == answers else map(span, turns):
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def _span(self, messages: Sequence[dict[str, Any]], turn: int, ids: list[int], tools: Any) -> tuple[int, int]:
        """Where an answer lies, by what the conversation up to it has beyond its prompt."""
        before = self._tokens(self.chat_template.before(messages, turn, tools))
        after = ids if turn == len(messages) - 1 else self._ids(messages[: turn + 1], tools)
        if ids[: len(before)] != before or ids[: len(after)] != after or len(after) <= len(before):
            raise BadOption(
                "the chat template renders earlier turns in another way once others follow, so that the answer's tokens "
                "cannot be told: mark them with {% generation %} in a template of your own (chat_template=), or "
                "loss_on='last_answer'"
            )
        return len(before), self._end_of(after, len(before))

    def _check_learnt(self, answers: Sequence[dict[str, Any]], labels: Sequence[int]) -> None:
        """Look the text of each answer up among the learnt tokens, apart from blanks, which templates may change."""
        learnt, at = self._decode([label for label in labels if label != IGNORE]), 0
        for answer in answers:
            ends = [at]
            for text in pieces(answer):
                found, wanted = learnt.find(_bare(text), at), _bare(text)
                if found < 0:  # the tokenizer may write characters in another way, or not know them
                    wanted = self._decoded(text)
                    found = learnt.find(wanted, at)
                if found < 0:
                    raise BadOption(
                        f"{shortened(text)!r} of an answer is not among the learnt tokens: {self.chat_template.name} drops "
                        "or changes it; give a template that writes it out (chat_template=), or remove it from the data"
                    )
                ends.append(found + len(wanted))
            at = max(ends) if not answer.get("tool_calls") else at

    def _check_tools(self, ids: list[int], tools: Any) -> None:
        """Refuse tools that the template does not write out."""
        names = tool_names(tools)
        text = self._decode(ids) if names else ""
        lost = next((n for n in names if not (_bare(n) in text or self._decoded(n) in text)), None)
        if lost is not None:
            raise BadOption(
                f"{self.chat_template.name} does not write out the tool {lost!r}: give a template that knows tools "
                "(chat_template=), or remove 'tools' from the data"
            )

    def _end_of(self, ids: list[int], start: int) -> int:
        """Where what is learnt of ids[start:] stops: behind the special token that only blanks follow, if any."""
        for i in range(len(ids) - 1, start - 1, -1):
            if ids[i] in self.special:
                return i + 1
            if self.tokenizer.decode([ids[i]]).strip():
                break
        return len(ids)

    def _tokens(self, text: str) -> list[int]:
        return list(encoded(self.tokenizer, text, "the conversation", add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return _bare(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _decoded(self, text: str) -> str:
        """A text as the tokenizer gives it back."""
        return self._decode(self._tokens(text))

    def _ids(self, messages: Sequence[dict[str, Any]], tools: Any) -> list[int]:
        return self._tokens(self.chat_template.text(messages, tools))

    def _marked(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and where the tokens lie that the template marks, run by run."""
        out = self.chat_template.render(
            messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [0, *out["assistant_masks"], 0]
        starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
        stops = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
        return list(out["input_ids"]), list(zip(starts, stops))

    def _probe(self) -> None:
        """Learn how the template ends a turn; refuse it where it cannot be used."""
        try:
            ids, labels = self._encoded(PROBE)
        except BadOption:
            # where several answers cannot be told, one may
            ids, labels = self._encoded(PROBE if self._take_trls() else PROBE[:2])
        learnt = [i for i, label in enumerate(labels) if label != IGNORE]
        if not learnt:
            raise BadOption("the chat template's {% generation %} marks no token: put it around the assistant's answer")
        text = self.tokenizer.decode([ids[i] for i in learnt])
        if not any(_bare(PROBE[i]["content"]) in _bare(text) for i in (1, 3)):
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
        self.chat_template = ChatTemplate(self.tokenizer, template)
        return True


def _bare(text: str) -> str:
    """Without blanks: some tokenizers put them between tokens."""
    return "".join(text.split())


def shortened(text: str, length: int = 60) -> str:
    """Cut a text for a message."""
    return text if len(text) <= length else f"{text[:length]}..."


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
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte, or a file that is not UTF-8
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
