"""Whether a model whose adapters are mixed in some way answers rightly, and how often the member
with most weight was the right one. Knows no way of mixing.

Nothing is decoded: an answer is what greedy decoding would give where each of its tokens, and the
end, is the likeliest after the right ones before it. So one pass over prompt and right answer tells
as much as decoding, at a tenth of the time, and every way is judged on the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from composer.adapters.gates.hooks import Installed, Weigh
from composer.adapters.gates.stacked import GatedLayer
from examples.tiny.modeling import ANSWER, EOS
from examples.tiny.segments import Marks


@dataclass(frozen=True, slots=True)
class Asked:
    """`skills`: which member each segment is of; one for a question of one skill."""

    prompt: str
    answer: str
    skills: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Questions with their right answers, padded on the right, where a causal model needs no mask.
    `rows` (B,) are their places among all; `ids` (B, T), `segments` (B, T) 0 or 1, `prompt` (B, T)
    up to the answer's mark, `real` (B, T) False on padding and at the start token, which knows of
    no question yet."""

    rows: Tensor
    ids: Tensor
    segments: Tensor
    prompt: Tensor
    real: Tensor


class Way(Protocol):
    """A way of mixing members. `layers`: what is added to the model. `routes`: its weights are over
    the members, token by token or for a whole query."""

    layers: Mapping[str, GatedLayer]
    routes: bool

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        """What weighs the members in the pass over `read`, which it may read itself first."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """`right` (n,); `routed`: share of tokens and modules at which the member with most weight is
    that of the token's segment, None for a way without members' weights."""

    right: npt.NDArray[np.bool_]
    routed: float | None


@torch.inference_mode()
def answered(
    model: Any, tokenizer: Any, way: Way, asked: Sequence[Asked], batch: int = 64
) -> Answered:
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(asked[i].answer))
    right = np.zeros(len(asked), np.bool_)
    hits, seen = 0, 0
    with Installed(model, way.layers, None) as installed:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            read = _read(tokenizer, asked, rows)
            weigh = way.weigh(model, installed, read)
            if weigh is not None and way.routes:
                skills = torch.tensor([(asked[i].skills * 2)[:2] for i in rows])
                counted = Counted(weigh, skills.gather(1, read.segments), read.real)
                weigh = counted
            installed.weigh = weigh
            likeliest = model(input_ids=read.ids).logits[:, :-1].argmax(-1)
            said = (read.real & ~read.prompt)[:, 1:]
            right[rows] = ((likeliest == read.ids[:, 1:]) | ~said).all(1).numpy()
            if weigh is not None and way.routes:
                hits, seen = hits + counted.hits, seen + counted.seen
    return Answered(right, hits / seen if way.routes else None)


class Counted:
    """Weights as they are given, with a count of the tokens and modules where the right member has
    most."""

    def __init__(self, weigh: Weigh, truth: Tensor, real: Tensor) -> None:
        self._weigh, self._truth, self._real = weigh, truth, real
        self.hits, self.seen = 0, 0

    def __call__(self, module: str, layer: GatedLayer, x: Tensor) -> Tensor:
        weights = self._weigh(module, layer, x)
        top = weights.argmax(-1).expand_as(self._truth)
        self.hits += int(((top == self._truth) & self._real).sum())
        self.seen += int(self._real.sum())
        return weights


def _read(tokenizer: Any, asked: Sequence[Asked], rows: Sequence[int]) -> Read:
    texts = [f"{asked[i].prompt}{ANSWER}{asked[i].answer}{EOS}" for i in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids = batch["input_ids"]
    marks = Marks.of(tokenizer)
    return Read(
        torch.tensor(rows),
        ids,
        marks.segments(ids),
        ~marks.answering(ids) | (ids == marks.answer),
        batch["attention_mask"].bool() & (ids != tokenizer.bos_token_id),
    )
