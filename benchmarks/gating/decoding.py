"""Greedy answers of a model whose adapters are mixed in some way, in batches with a KV cache, and
how often the member with most weight was the right one. Knows no way of mixing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from composer.adapters.gates.hooks import Installed, Weigh
from composer.adapters.gates.stacked import GatedLayer
from examples.tiny.modeling import ANSWER
from examples.tiny.tasks import SEPARATOR

LONGEST = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """`skills`: which member each segment is of; one for a question of one skill."""

    prompt: str
    answer: str
    skills: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What goes through the model at once: `rows` (B,) are the questions' places, `ids` and
    `positions` (B, T), `segments` (B, T) 0 or 1, `mask` (B, all so far), `real` (B, T) False on
    padding and on rows that are done."""

    rows: Tensor
    ids: Tensor
    positions: Tensor
    segments: Tensor
    mask: Tensor
    real: Tensor


class Way(Protocol):
    """A way of mixing members. `layers`: what is added to the model. `routes`: its weights are over
    the members, token by token or for a whole query."""

    layers: Mapping[str, GatedLayer]
    routes: bool

    def begin(self, model: Any, installed: Installed, step: Step) -> None:
        """A new batch; `step` holds its prompts."""
        ...

    def weigh(self, model: Any, installed: Installed, step: Step) -> Weigh | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """`right` (n,); `routed`: share of tokens and modules at which the member with most weight is
    that of the token's segment, None for a way without members' weights."""

    right: npt.NDArray[np.bool_]
    routed: float | None


@torch.inference_mode()
def answered(
    model: Any, tokenizer: Any, way: Way, asked: Sequence[Asked], batch: int = 100
) -> Answered:
    # Rows of a batch end together where their answers are alike long; the answers say no more here.
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i].answer), len(asked[i].prompt)))
    right = np.zeros(len(asked), np.bool_)
    hits = Hits()
    with Installed(model, way.layers, None) as installed:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            texts = _decoded(model, tokenizer, way, installed, asked, rows, hits)
            for i, text in zip(rows, texts, strict=True):
                right[i] = text == asked[i].answer
    return Answered(right, hits.share if way.routes else None)


class Hits:
    """Counts on the device, read once."""

    def __init__(self) -> None:
        self._hits, self._seen = torch.zeros(()), torch.zeros(())

    def counting(self, weigh: Weigh, truth: Tensor, real: Tensor) -> Weigh:
        def counted(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
            weights = weigh(module, layer, x)
            top = weights.argmax(-1).expand_as(truth)
            self._hits += ((top == truth) & real).sum()
            self._seen += real.sum()
            return weights

        return counted

    @property
    def share(self) -> float:
        return float(self._hits / self._seen.clamp(min=1))


def _decoded(
    model: Any,
    tokenizer: Any,
    way: Way,
    installed: Installed,
    asked: Sequence[Asked],
    rows: Sequence[int],
    hits: Hits,
) -> list[str]:
    skills = torch.tensor([(asked[i].skills * 2)[:2] for i in rows])
    ids: list[list[int]] = [[] for _ in rows]
    cache = DynamicCache()
    done = torch.zeros(len(rows), dtype=torch.bool)
    for step in _steps(tokenizer, [asked[i].prompt for i in rows], rows, ids, done):
        if cache.get_seq_length() == 0:
            way.begin(model, installed, step)
        weigh = way.weigh(model, installed, step)
        if weigh is not None and way.routes:
            weigh = hits.counting(weigh, skills.gather(1, step.segments), step.real)
        installed.weigh = weigh
        logits = model(
            input_ids=step.ids,
            attention_mask=step.mask,
            position_ids=step.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for r, token in enumerate(logits.argmax(-1).tolist()):
            ids[r].append(token)
    return [
        tokenizer.decode(own[: own.index(tokenizer.eos_token_id)])
        if tokenizer.eos_token_id in own
        else tokenizer.decode(own)
        for own in ids
    ]


def _steps(
    tokenizer: Any, prompts: list[str], rows: Sequence[int], ids: list[list[int]], done: Tensor
) -> Iterator[Step]:
    """The prompts, then each new token, until all rows are done. In the prompt a segment begins
    with the separator's token; the answer begins with the first segment again."""
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    mark = tokenizer.convert_tokens_to_ids(ANSWER)
    batch = tokenizer([p + ANSWER for p in prompts], return_tensors="pt", padding=True)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    segments = (batch["input_ids"] == separator).cumsum(1).clamp(max=1)
    segments = torch.where(batch["input_ids"] == mark, 0, segments)
    places = torch.tensor(rows)
    yield Step(places, batch["input_ids"], positions, segments, mask, mask.bool())
    segment = torch.zeros(len(rows), 1, dtype=torch.long)
    for _ in range(LONGEST - 1):
        last = torch.tensor([own[-1] for own in ids])
        done |= last == tokenizer.eos_token_id
        if bool(done.all()):
            return
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        positions = positions[:, -1:] + 1
        segment = (segment + (last == separator)[:, None]).clamp(max=1)
        yield Step(places, last[:, None], positions, segment, mask, ~done[:, None])
