"""The running batch's key/value cache: rows join, step and leave. Knows nothing of calls or text.

Rows are right-aligned: a row of length l fills the last l columns of every layer's tensors, and
what is left of it is masked padding. So a step appends one column to all rows, joining pads the
narrower side on the left, and leaving trims the columns nobody fills any more. The price is that
every row is as wide as the longest; an engine with paged memory (vLLM) does not pay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from composer.engines.model import LocalModel


class Batch:
    """Rows in a fixed order; the caller keeps its own list in the same order.

    A method that raises leaves the batch as it was, except `step`, after which only `clear`
    is safe: some layers may have taken the new column and others not.
    """

    def __init__(self, model: LocalModel) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        self.lengths: list[int] = []
        self.adapters: list[str | None] = []
        self._cache = DynamicCache()

    @property
    def width(self) -> int:
        return max(self.lengths, default=0)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Each row's newest token in, the logits (rows, vocab) of its next out."""
        device = self._model.device
        positions = torch.tensor(self.lengths, device=device)  # (rows,)
        logits = self._model.forward(
            torch.tensor(tokens, device=device)[:, None],
            lengths=positions + 1,
            positions=positions[:, None],
            cache=self._cache,
            adapters=self.adapters,
        )
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, given in ascending order."""
        if len(rows) == len(self.lengths):
            return
        if not rows:
            self.clear()
            return
        lengths = [self.lengths[row] for row in rows]
        width = max(lengths)
        index = torch.tensor(rows, device=self._model.device)
        kept = [
            (keys[index, :, -width:], values[index, :, -width:])
            for keys, values in _tensors(self._cache)
        ]
        self._set(kept)
        self.lengths = lengths
        self.adapters = [self.adapters[row] for row in rows]

    @torch.inference_mode()
    def join(self, new: Batch, copies: Sequence[int]) -> None:
        """Appends the rows of `new`, row i `copies[i]` times in a row (0: not at all)."""
        source = [row for row, times in enumerate(copies) for _ in range(times)]
        if not source:
            return
        index = torch.tensor(source, device=self._model.device)
        added = [(keys[index], values[index]) for keys, values in _tensors(new._cache)]
        if self.lengths:
            width = max(self.width, new.width)
            added = [
                (_stack(old[0], more[0], width), _stack(old[1], more[1], width))
                for old, more in zip(_tensors(self._cache), added, strict=True)
            ]
        self._set(added)
        self.lengths = self.lengths + [new.lengths[row] for row in source]
        self.adapters = self.adapters + [new.adapters[row] for row in source]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> Tensor:
        """Fills an empty batch with prompts; the logits (rows, vocab) after each last token."""
        device = self._model.device
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        ends = torch.tensor(lengths, device=device)  # (rows,)
        columns = torch.arange(width, device=device)
        self.lengths, self.adapters = lengths, list(adapters)
        return self._model.forward(
            ids,
            lengths=ends,
            positions=(columns - (width - ends[:, None])).clamp_(min=0),
            cache=self._cache,
            adapters=self.adapters,
        )

    def _set(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            cache.update(keys, values, number)
        self._cache = cache


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (rows, heads, width, head_dim) per layer."""
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]


def _stack(old: Tensor, new: Tensor, width: int) -> Tensor:
    """(a, heads, l1, d) over (b, heads, l2, d) → (a + b, heads, width, d), right-aligned."""
    return torch.cat([pad(t, (0, 0, width - t.shape[2], 0)) for t in (old, new)])
