"""Conversations in one normal form, and the chat template that renders them: for training, evaluation and calibration.

In the normal form a message has a role in lower case, text as its content (parts of text are joined), arguments of tool
calls as JSON values, no keys whose value is null, and `weight: 0` where its answer must not be learnt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qft.core.console import one_line
from qft.core.deadline import TimeIsUp, deadline
from qft.errors import BadOption

ROLES = {
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai"),
    "user": ("user", "human"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool",),
}
_ROLE = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts that hold text; None is a part without a type."""
SWITCHES = ("train", "training")
"""Keys of a message that say whether it is learnt, as a boolean; `weight` says the same as 0 or 1."""
SYSTEMS = ("system", "system_prompt")
"""Columns that hold a system prompt."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_PROBE = ({"role": "user", "content": "What is seven?"}, {"role": "assistant", "content": "A number."})


def conversation(value: Any, column: str = "messages", *, flatten: bool = True) -> Any:
    """Return messages in the normal form; a value that is not a list of messages is returned as it is.

    CSV files hold conversations as JSON text. Parquet files and data sets fill absent keys with None.

    Args:
        column: what an error calls the conversation.
        flatten: join parts of text. False keeps lists of parts, for models that read images.

    Raises:
        BadOption: a part that is not text, a weight other than 0 or 1, or a message other than the assistant's that is
            marked to be learnt.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, list | tuple):
        return value
    return [_message(m, f"{column}[{i}]", flatten) if isinstance(m, Mapping) else m for i, m in enumerate(value)]


def _message(message: Mapping[str, Any], where: str, flatten: bool) -> dict[str, Any]:
    made = {k: v for k, v in message.items() if v is not None}
    if isinstance(made.get("role"), str):
        made["role"] = _ROLE.get(made["role"].strip().lower(), made["role"])
    weight = _weight(made, where)
    for key in ("weight", *SWITCHES):
        made.pop(key, None)
    if weight is not None and not weight:
        made["weight"] = 0
    if flatten and "content" in made:
        made["content"] = _flat(made["content"], where)
    if isinstance(made.get("tool_calls"), list | tuple):
        made["tool_calls"] = [_call(call) for call in made["tool_calls"]]
    return made


def _weight(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether a message says that it is learnt; None where it says nothing."""
    said = {}
    for key in ("weight", *SWITCHES):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadOption(f"{where} has {key!r}: {value!r}, and only 0 (not learnt) and 1 (learnt) are supported")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise BadOption(f"{where} has {' and '.join(map(repr, said))} that contradict each other")
    learnt = next(iter(said.values()), None)
    if learnt and said.keys() & set(SWITCHES) and message.get("role") != "assistant":
        raise BadOption(f"{where} is marked to be learnt, and only the assistant's messages are: remove the mark")
    return learnt


def _flat(content: Any, where: str) -> Any:
    """Join parts of text."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadOption(
                f"{where} has a part of type {kind!r} that is not text, and this model reads text only: remove the part"
            )
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any) -> Any:
    """A tool call whose arguments are JSON values: OpenAI's form has them as JSON text."""
    if not isinstance(call, Mapping):
        return call
    made = {k: v for k, v in call.items() if v is not None}
    if isinstance(made.get("function"), Mapping):
        made["function"] = _call(made["function"])
    if isinstance(made.get("arguments"), str):
        try:
            arguments = json.loads(made["arguments"])
        except (ValueError, RecursionError):
            return made
        if isinstance(arguments, dict):
            made["arguments"] = arguments
    return made


def system_of(row: Mapping[str, Any]) -> str:
    """Return the text of a row's `system` column, "" where there is none.

    Raises:
        BadOption: there are two, or one that is not text.
    """
    said = [row[column] for column in SYSTEMS if row.get(column)]
    if len(said) > 1 or not all(isinstance(text, str) for text in said):
        raise BadOption(f"{' and '.join(map(repr, SYSTEMS))}: more than one system prompt, or one that is not text")
    return said[0] if said and said[0].strip() else ""


def with_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put the text of a row's `system` column before its conversation.

    Raises:
        BadOption: the conversation has another system prompt.
    """
    said = system_of(row)
    if not said:
        return messages
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": said}, *messages]
    if messages[0].get("content") != said:
        raise BadOption("the conversation and the column 'system' have different system prompts: remove one")
    return messages


def tools_of(row: Mapping[str, Any]) -> Any:
    """Return the tools that a row offers in its conversation, which its template writes out; None where there are none.

    Raises:
        ValueError: they are text that is not JSON.
    """
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None


def tool_names(tools: Any) -> list[str]:
    """Return the names of the functions among tools."""
    found = [tool.get("function", tool) for tool in tools or () if isinstance(tool, Mapping)]
    return [f["name"] for f in found if isinstance(f, Mapping) and isinstance(f.get("name"), str)]


def learnt_turns(messages: Sequence[Mapping[str, Any]], only: str = "answers") -> list[int]:
    """Return the indices of the assistant's messages that are learnt.

    Args:
        only: "answers" for all of them, "last_answer" for the last one; `weight: 0` leaves a message out.
    """
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if only == "last_answer":
        answers = answers[-1:]
    return [i for i in answers if messages[i].get("weight", 1)]


def pieces(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of an answer that must be learnt: reasoning, content, and names and arguments of tool calls."""
    found = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    if isinstance(message.get("content"), str):
        found.append(message["content"])
    for part in message["content"] if isinstance(message.get("content"), list) else ():
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            found.append(part["text"])
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        found += [t for t in (function.get("name"), *_leaves(function.get("arguments"))) if isinstance(t, str)]
    return [text for text in found if text.strip()]


def _leaves(value: Any) -> list[str]:
    """The texts in JSON values, as JSON writes them without quotes."""
    if isinstance(value, Mapping):
        return [text for key, inner in value.items() for text in (str(key), *_leaves(inner))]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _leaves(inner)]
    return [json.dumps(value, ensure_ascii=False)[1:-1]] if isinstance(value, str) else []


def check_text(value: Any, where: str) -> None:
    """Check that all texts in JSON values are Unicode: JSON can escape half of a character, which no tokenizer reads.

    Raises:
        BadOption: a text holds a lone surrogate.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadOption(
                f"{where} is not valid Unicode text: it holds {value[error.start]!r}, half of a character "
                "(a lone surrogate)"
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(key, where)
            check_text(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(inner, where)


RENDER_SECONDS = 10.0
"""A template may take so long for one conversation."""
MOST_CHARACTERS = 2**26
"""A template may write so many characters for one conversation."""
LARGEST_NUMBER = 10**7
"""A template may name numbers up to this one."""


class ChatTemplate:
    """A tokenizer's chat template, which gets the content of messages in the form that it reads: text or parts.

    Attributes:
        name: what errors call the template.
        parts: the template reads lists of parts only.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self.tokenizer, self.template = tokenizer, template
        origin = getattr(tokenizer, "name_or_path", "")
        self.name = f"the chat template{f' of {origin}' if origin else ''}"
        self._check_numbers()
        self.parts = not self._shows(False) and self._shows(True)

    def _check_numbers(self) -> None:
        """Refuse powers and huge numbers: Python calculates them in one call, which no time limit ends.

        Raises:
            BadOption: the template holds one.
        """
        from jinja2 import Environment, TemplateSyntaxError

        found = self.template or getattr(self.tokenizer, "chat_template", None)
        for source in found.values() if isinstance(found, Mapping) else [found]:
            try:
                tokens = list(Environment().lex(source)) if isinstance(source, str) else []
            except TemplateSyntaxError:  # rendering tells
                continue
            for line, kind, text in tokens:
                if (kind, text) == ("operator", "**") or (kind == "integer" and int(text, 0) > LARGEST_NUMBER):
                    raise BadOption(
                        f"line {line} of {self.name} holds {'a power (**)' if text == '**' else f'the number {text[:20]}'}, "
                        "which may take forever to calculate with; give another template (chat_template=)"
                    )

    def _shows(self, parts: bool) -> bool:
        """Whether the template writes an answer out where content is text, or where it is a list of parts."""
        self.parts = parts
        try:
            return all(m["content"] in self.text(_PROBE) for m in _PROBE)
        except BadOption:
            return False

    def text(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, generation: bool = False) -> str:
        """Render a conversation, which may be empty.

        Raises:
            BadOption: the template refuses it.
        """
        found = self.render(messages, tools, generation, tokenize=False)
        return str(found)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, generation: bool = False, **options: Any
    ) -> Any:
        """Call `apply_chat_template` with the messages as the template reads them.

        Raises:
            BadOption: the template, or the tokenizer after it, refuses the conversation.
        """
        given: Any = [self._given(m) for m in messages]
        try:
            return self._applied(given, tools, generation, options)
        except BadOption:
            raise
        except Exception as error:  # templates raise errors of any class
            check_text([messages, tools], "the conversation")
            if not all("content" in m for m in given):  # of tool calls; some templates want an empty text there
                try:
                    return self._applied([{"content": "", **m} for m in given], tools, generation, options)
                except Exception:
                    pass
            raise BadOption(f"{self.name} refuses this conversation: {one_line(error)}") from error

    def _applied(self, given: list[dict[str, Any]], tools: Any, generation: bool, options: dict[str, Any]) -> Any:
        try:
            with deadline(RENDER_SECONDS):
                found = self.tokenizer.apply_chat_template(
                    given or [given],  # only a batch may hold an empty conversation
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=generation,
                    **options,
                )
        except TimeIsUp:
            raise BadOption(
                f"{self.name} renders one conversation for more than {RENDER_SECONDS:g} seconds: it loops too often; give "
                "another template (chat_template=)"
            ) from None
        if isinstance(found, str) and len(found) > MOST_CHARACTERS:
            raise BadOption(
                f"{self.name} writes {len(found)} characters for one conversation, and at most {MOST_CHARACTERS} are taken; "
                "give another template (chat_template=)"
            )
        return found if given else _first(found)

    def _given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        made = {k: v for k, v in message.items() if k != "weight"}
        if self.parts and isinstance(made.get("content"), str):
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def before(self, messages: Sequence[Mapping[str, Any]], turn: int, tools: Any = None) -> str:
        """Render what stands before an answer: the messages before it and the generation prompt.

        Where the answer opens the conversation and the template refuses an empty one, the text before it is what two
        different answers have in common.

        Raises:
            BadOption: the template refuses the conversation.
        """
        if turn:
            return self.text(messages[:turn], tools, generation=True)
        opened = self.text(messages[:1], tools)
        try:
            empty = self.text([], tools, generation=True)
            if opened.startswith(empty):
                return empty
        except BadOption:
            pass
        answers = [{"role": "assistant", "content": content} for content in ("A", "B")]
        one, other = (self.text([answer], tools) for answer in answers)
        end = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
        return one[:end]


def _first(batch: Any) -> Any:
    """The only element of a batch, whether text or the output of a tokenizer."""
    if isinstance(batch, list | tuple):
        return batch[0]
    return {k: v[0] for k, v in batch.items()}
