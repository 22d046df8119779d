"""Chats about images: rows are checked early, pixels are read when a batch is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qft.data.messages import ChatTemplate, learnt_turns, pieces
from qft.data.tokens import encoded
from qft.errors import BadOption
from qft.ops.loss import IGNORE
from qft.training.columns import Unusable
from qft.training.config import TrainConfig
from qft.training.encoding import messages_of


def rows_with_images(config: TrainConfig, processor: Any, folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Rows with `messages`, in the form that processors read, and `images`: files (beside the data) or PIL images."""
    if not getattr(processor, "chat_template", None):
        raise BadOption("the model's processor has no chat template: take the model's instruct version")

    template = ChatTemplate(processor)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        from trl.data_utils import prepare_multimodal_messages

        images = row.get(config.images_column)
        if isinstance(images, str) and images.startswith("["):
            try:
                images = json.loads(images)  # of CSV
            except ValueError:
                raise Unusable(f"{config.images_column!r} is text that is not JSON") from None
        images = images if isinstance(images, list) else [images]
        if not images or any(image is None for image in images):
            raise Unusable(f"{config.images_column!r} is empty")
        found = []
        for image in images:
            if isinstance(image, str):
                image = str(folder / image)
                if not Path(image).is_file():
                    raise Unusable(f"there is no image {image!r}")
            found.append(image)
        messages = messages_of(row, config, flatten=False)
        try:
            messages = prepare_multimodal_messages(messages)
            slots = _slots(messages)
            if not slots:
                messages = [{**m, "content": list(m["content"])} for m in messages]
                first = next(m for m in messages if m["role"] == "user")
                first["content"] = [*({"type": "image"} for _ in found), *first["content"]]
                slots = len(found)
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise Unusable(f"the conversation cannot hold images: {error}") from error
        if slots != len(found):
            raise Unusable(
                f"the messages have {slots} places for images, and {config.images_column!r} has {len(found)}"
            )
        _check_answers(messages, learnt_turns(messages, config.loss_on), template, processor.tokenizer)
        # as text: data sets would give every message the keys of all
        return {"messages": json.dumps(messages), "images": found}

    return one


def _check_answers(
    messages: Sequence[dict[str, Any]], turns: Sequence[int], template: ChatTemplate, tokenizer: Any
) -> None:
    """Check on the rendered text that each answer is where the collator will look for it."""
    text = template.text(messages)
    encoded(tokenizer, text, "the conversation")
    if not turns:
        raise Unusable("there is no answer to learn in it")
    for turn in turns:
        before, after = template.before(messages, turn), template.text(messages[: turn + 1])
        if not text.startswith(after) or not after.startswith(before):
            raise Unusable("the chat template hides which tokens are the answer's: loss_on='last_answer' may do")
        shown = "".join(after[len(before) :].split())
        lost = next((p for p in pieces(messages[turn]) if "".join(p.split()) not in shown), None)
        if lost is not None:
            raise Unusable(f"{template.name} drops or changes {lost[:60]!r} of an answer")


def _slots(messages: Sequence[dict[str, Any]]) -> int:
    return sum(part.get("type") == "image" for m in messages for part in m["content"])


class VisionCollator:
    """Rows → pixels, token ids, and labels on the answers, by what the conversation has beyond its prompt."""

    def __init__(self, processor: Any, loss_on: str, limit: int):
        self.processor, self.loss_on, self.limit = processor, loss_on, limit
        self.template = ChatTemplate(processor)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Raises `BadOption`: answers whose tokens cannot be told, or a row that is too long."""
        conversations = [json.loads(row["messages"]) for row in rows]
        images = [[_opened(i) for i in row["images"]] for row in rows]
        texts = [self.template.text(m) for m in conversations]
        self.processor.tokenizer.padding_side = "right"
        batch = dict(self._processed(texts, images, padding=True))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.shape[1] > self.limit:
            raise BadOption(
                f"a row has {ids.shape[1]} tokens with its images, and max_length is {self.limit}: images cannot be cut; raise "
                "max_length, or use smaller images"
            )
        labels = torch.full_like(ids, IGNORE)
        for i, messages in enumerate(conversations):
            end = int(mask[i].sum())
            turns = learnt_turns(messages, self.loss_on)
            if self.loss_on == "all":
                labels[i, :end] = ids[i, :end]
                turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k not in turns]
            for k in turns:
                start, stop = self._span(messages, k, images[i], ids[i])
                labels[i, start:stop] = IGNORE if self.loss_on == "all" else ids[i, start:stop]
        return {**batch, "labels": labels}

    def _span(self, messages: list[dict[str, Any]], turn: int, images: list[Any], ids: torch.Tensor) -> tuple[int, int]:
        before = self._ids(self.template.before(messages, turn), images[: _slots(messages[:turn])])
        after = self._ids(self.template.text(messages[: turn + 1]), images[: _slots(messages[: turn + 1])])
        whole = ids.tolist()
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise BadOption("the chat template hides which tokens are the answer's: loss_on='last_answer' may do")
        stop, special = len(after), set(self.processor.tokenizer.all_special_ids)
        while stop > len(before) and after[stop - 1] not in special:
            if self.processor.tokenizer.decode([after[stop - 1]]).strip():
                return len(before), len(after)
            stop -= 1
        return len(before), stop if stop > len(before) else len(after)

    def _ids(self, text: str, images: list[Any]) -> list[int]:
        return self._processed([text], [images] if images else None)["input_ids"][0].tolist()

    def _processed(self, texts: list[str], images: Any, **options: Any) -> Any:
        """Token ids and pixels; a text that begins with BOS, which its template wrote, gets no second one."""
        bos = self.processor.tokenizer.bos_token
        if bos and all(text.startswith(bos) for text in texts):
            options["add_special_tokens"] = False
        return self.processor(text=texts, images=images, return_tensors="pt", **options)


def _opened(image: Any) -> Any:
    if not isinstance(image, str):
        return image
    from PIL import Image

    try:
        with Image.open(image) as file:
            return file.convert("RGB")
    except OSError as error:
        raise BadOption(f"the image {image!r} cannot be read: {error}") from error
