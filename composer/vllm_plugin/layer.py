"""The gated part of a linear layer that may pack several modules: one product for all of A and the
gates, a selection, and each module's B. Knows neither vLLM nor where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from composer.adapters.gates.files import GatedModule
from composer.adapters.gates.projection import EPS, Normalise
from composer.adapters.gates.selection import Selection

Reduce = Callable[[Tensor], Tensor]
"""The sum over all shards."""


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the checkpoint. `width`: its columns of the layer's output, on this shard.
    `gate` None: it has none."""

    width: int
    gate: GatedModule | None


class Matrix(nn.Module):
    """x → x·weightᵀ, of a weight (out, in) that is filled in later."""

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in, dtype=dtype), requires_grad=False)

    def times(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class GatedLinear(nn.Module):
    """What the members of a gate add to the output of one layer.

    The modules of one layer see the same x, so that their A, and where the model computes in
    float32 their gates' rows as well, are one matrix. `d_in` is this shard's, `full` the layer's.
    With `reduce` the shards see different columns of x: logits and x's statistics are summed
    before anything is selected, whereas A·x may stay partial, as the layer's output is.
    """

    owner: Tensor

    def __init__(
        self,
        d_in: int,
        parts: Sequence[Part],
        normalise: Normalise,
        dtype: torch.dtype,
        *,
        selection: Selection,
        full: int | None = None,
        reduce: Reduce | None = None,
        matrix: type[Matrix] = Matrix,
    ) -> None:
        super().__init__()
        self.normalise, self.reduce, self.full = normalise, reduce, full or d_in
        gates = [part.gate for part in parts if part.gate is not None]
        selections = [gate.selection or selection for gate in gates]
        self.runs = [(chosen, len(list(run))) for chosen, run in groupby(selections)]
        ranks = [rank for gate in gates for rank in gate.ranks]
        self.outs = [
            len(gate.ranks) + chosen.null for gate, chosen in zip(gates, selections, strict=True)
        ]
        self.rank, self.even = sum(ranks), ranks[0] if len(set(ranks)) == 1 else 0
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self.register_buffer("owner", owner, persistent=False)
        # Riding along saves reading x twice; but a gate stays in float32 whatever the model does.
        self.rides = dtype == torch.float32
        self.down = matrix(self.rank + (sum(self.outs) if self.rides else 0), d_in, dtype)
        self.rows = None if self.rides else Matrix(sum(self.outs), d_in, torch.float32)
        bias = torch.zeros(sum(self.outs), dtype=torch.float32)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.places: list[slice] = []
        ups, start = [], 0
        for part in parts:
            if part.gate is not None:
                self.places.append(slice(start, start + part.width))
                ups.append(matrix(part.width, sum(part.gate.ranks), dtype))
            start += part.width
        self.ups = cast(Sequence[Matrix], nn.ModuleList(ups))
        self.whole = len(self.places) == 1 and self.places[0] == slice(0, start)
        self.shares = [sum(gate.ranks) for gate in gates]
        self._absent(gates, selections)

    def _absent(self, gates: Sequence[GatedModule], selections: Sequence[Selection]) -> None:
        """Who has no factors in a module is not asked there."""
        there = [
            [rank > 0 for rank in gate.ranks] + [True] * chosen.null
            for gate, chosen in zip(gates, selections, strict=True)
        ]
        self.present = torch.tensor([one for gate in there for one in gate])
        self.bias.data.masked_fill_(~self.present, -torch.inf)

    # --- numbers -------------------------------------------------------------------------

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors of its gated module `index`, on this shard."""
        d_in = self.down.weight.shape[1]
        share, outs = self.shares[index], self.outs[index]
        width = self.places[index].stop - self.places[index].start
        return {"a": (share, d_in), "b": (width, share), "rows": (outs, d_in), "bias": (outs,)}

    def fill(self, index: int, name: str, tensor: Tensor) -> None:
        """One tensor of its gated module `index`, this shard's part of it."""
        first, out = sum(self.shares[:index]), sum(self.outs[:index])
        outs = slice(out, out + self.outs[index])
        if name == "a":
            target = self.down.weight.data[first : first + self.shares[index]]
        elif name == "b":
            target = self.ups[index].weight.data
        elif name == "rows" and self.rides:
            target = self.down.weight.data[self.rank + outs.start : self.rank + outs.stop]
        elif name == "rows":
            assert self.rows is not None
            target = self.rows.weight.data[outs]
        else:
            target = self.bias.data[outs]
            tensor = tensor.masked_fill(~self.present[outs].to(tensor.device), -torch.inf)
        target.copy_(tensor)

    # --- the forward pass ------------------------------------------------------------------

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x (…, d_in) and the layer's own output (…, d_out), to which it is added."""
        product = self.down.times(x)
        if self.rows is None:
            hidden, raw = product[..., : self.rank], product[..., self.rank :]
        else:
            hidden, raw = product, self.rows.times(x.float())
        scaled = self._expand(hidden, self.weights(raw, x).to(hidden.dtype))
        if self.whole:
            return out + self.ups[0].times(scaled)
        start = 0
        for place, share, up in zip(self.places, self.shares, self.ups, strict=True):
            out[..., place] += up.times(scaled[..., start : start + share])
            start += share
        return out

    def weights(self, raw: Tensor, x: Tensor) -> Tensor:
        """Partial or whole products of x with the gates' rows (…, Σ outs) → (…, modules · E)."""
        logits = self._logits(raw, x) + self.bias
        chosen, start, module = [], 0, 0
        for selection, modules in self.runs:
            outs = self.outs[module]
            some = logits[..., start : start + modules * outs]
            picked = selection.weights(some.reshape(*some.shape[:-1], modules, outs))
            chosen.append(picked.flatten(-2))
            start, module = start + modules * outs, module + modules
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def _logits(self, raw: Tensor, x: Tensor) -> Tensor:
        """As `Projection.finish`, of an x that may be spread over shards."""
        if self.normalise != "standardised":
            # A slice of a product has gaps, which vLLM's own all-reduce on the CPU refuses.
            raw = raw if self.reduce is None else self.reduce(raw.contiguous())
            return raw.abs() if self.normalise == "absolute" else raw
        x = x.float()
        if self.reduce is None:
            variance = x.var(dim=-1, keepdim=True, correction=0)
            return raw * torch.rsqrt(variance + EPS)
        sums = [x.sum(-1, keepdim=True), x.square().sum(-1, keepdim=True)]
        told = self.reduce(torch.cat([raw, *sums], dim=-1))
        mean, square = told[..., -2:-1] / self.full, told[..., -1:] / self.full
        variance = (square - mean.square()).clamp_min(0.0)
        return told[..., :-2] * torch.rsqrt(variance + EPS)

    def _expand(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Each member's weight once for each of its ranks, times what A gave."""
        if self.even:
            members = hidden.reshape(*weights.shape, self.even)
            return (members * weights.unsqueeze(-1)).flatten(-2)
        return hidden * weights.index_select(-1, self.owner)
