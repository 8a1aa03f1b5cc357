"""The running batch's key/value cache: rows join, step and leave. Knows nothing of calls or text.

Rows are right-aligned: a row of length l fills the last l columns of every layer's tensors, and
what is left of it is masked padding. So a step appends one column to all rows, joining pads the
narrower side on the left, and leaving trims the columns nobody fills any more. The price is that
every row is as wide as the longest; an engine with paged memory (vLLM) does not pay it.

Rows whose gate takes two passes are in a batch of their own besides, in which they run on the base
alone: what comes out there is what their gates read in the forward that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from composer.engines.gated import Use
from composer.engines.model import LocalModel, Output


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
        self.uses: list[Use] = []
        self._cache = DynamicCache()
        self._first: Batch | None = None  # the rows of two passes, on the base alone

    @property
    def width(self) -> int:
        return max(self.lengths, default=0)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[Use]) -> Output:
        """Fills an empty batch with prompts; what comes after each last token. The gates' weights
        of a row are those of its prompt's tokens."""
        self.uses = list(uses)
        hidden = None
        if two := self._two_pass():
            self._first = Batch(self._model)
            hidden = self._first._read([prompts[row] for row in two])
        ids, positions = self._of_prompts(prompts)
        return self._forward(ids, positions, hidden, self.lengths)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Output:
        """Each row's newest token in, what comes after it out."""
        hidden = None
        if self._first is not None:
            hidden = self._first._read([[tokens[row]] for row in self._two_pass()])
        ids, positions = self._of_tokens(tokens)
        return self._forward(ids, positions, hidden, [1] * len(tokens))

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
        if self._first is not None:
            here = set(rows)
            self._first.keep([i for i, row in enumerate(self._two_pass()) if row in here])
        self._cache = _cache(kept)
        self.lengths = lengths
        self.uses = [self.uses[row] for row in rows]
        if not self._two_pass():
            self._first = None

    @torch.inference_mode()
    def join(self, new: Batch, copies: Sequence[int]) -> None:
        """Appends the rows of `new`, row i `copies[i]` times in a row (0: not at all)."""
        source = [row for row, times in enumerate(copies) for _ in range(times)]
        if not source:
            return
        joined = self._joined(new, source)
        first = self._first
        if new._first is not None:
            two = [new._two_pass().index(row) for row in source if new._is_two_pass(row)]
            if two:
                old = first or Batch(self._model)
                first = Batch(self._model)
                first._cache = old._joined(new._first, two)
                first._took(old, new._first, two)
        self._cache, self._first = joined, first
        self._took(self, new, source)

    def _took(self, old: Batch, new: Batch, source: Sequence[int]) -> None:
        self.lengths = old.lengths + [new.lengths[row] for row in source]
        self.uses = old.uses + [new.uses[row] for row in source]

    def _joined(self, new: Batch, source: Sequence[int]) -> DynamicCache:
        index = torch.tensor(source, device=self._model.device)
        added = [(keys[index], values[index]) for keys, values in _tensors(new._cache)]
        if self.lengths:
            width = max(self.width, new.width)
            added = [
                (_stack(old[0], more[0], width), _stack(old[1], more[1], width))
                for old, more in zip(_tensors(self._cache), added, strict=True)
            ]
        return _cache(added)

    # --- forward -------------------------------------------------------------------------

    def _is_two_pass(self, row: int) -> bool:
        return self._model.two_pass(self.uses[row].adapter)

    def _two_pass(self) -> list[int]:
        return [row for row in range(len(self.uses)) if self._is_two_pass(row)]

    def _of_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and positions (rows, width); the lengths are theirs from now on."""
        device = self._model.device
        self.lengths = [len(prompt) for prompt in prompts]
        width = self.width
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        ends = torch.tensor(self.lengths, device=device)  # (rows,)
        columns = torch.arange(width, device=device)
        return ids, (columns - (width - ends[:, None])).clamp_(min=0)

    def _of_tokens(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        device = self._model.device
        positions = torch.tensor(self.lengths, device=device)[:, None]  # (rows, 1)
        self.lengths = [length + 1 for length in self.lengths]
        return torch.tensor(tokens, device=device)[:, None], positions

    def _forward(
        self, ids: Tensor, positions: Tensor, hidden: Tensor | None, told: Sequence[int]
    ) -> Output:
        """`told` (rows,) is the number of each row's own tokens among the new ones."""
        output = self._model.forward(
            ids,
            lengths=torch.tensor(self.lengths, device=ids.device),
            positions=positions,
            cache=self._cache,
            uses=self.uses,
            hidden=None if hidden is None else _widened(hidden, ids.shape[1]),
        )
        gates = [
            None if weights is None else weights[-own:]
            for weights, own in zip(output.gates, told, strict=False)
        ]
        return output._replace(gates=gates)

    def _read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """More tokens in, prompts or one a row; the last hidden states (rows, new, d_model)."""
        if not self.lengths:
            self.uses = [Use()] * len(tokens)
            ids, positions = self._of_prompts(tokens)
        else:
            ids, positions = self._of_tokens([own[0] for own in tokens])
        return self._model.hidden(
            ids,
            lengths=torch.tensor(self.lengths, device=ids.device),
            positions=positions,
            cache=self._cache,
        )


def _cache(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _widened(rows: Tensor, width: int) -> Tensor:
    """(…, length, d) → (…, width, d), right-aligned."""
    return pad(rows, (0, 0, width - rows.shape[-2], 0))


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (rows, heads, width, head_dim) per layer."""
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]


def _stack(old: Tensor, new: Tensor, width: int) -> Tensor:
    """(a, heads, l1, d) over (b, heads, l2, d) → (a + b, heads, width, d), right-aligned."""
    return torch.cat([_widened(old, width), _widened(new, width)])
