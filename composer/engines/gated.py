"""Gated adapters for batches whose rows use different ones, or none: adapters mixed per token in
every layer that a row's gate names, beside the plain adapters of other rows.

Knows nothing of files, calls or caches: gates are known by digest here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from composer.adapters.gates.averaging import PromptMeans
from composer.adapters.gates.files import Gate
from composer.adapters.gates.groups import Groups
from composer.adapters.gates.xlora import features


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """What a row runs on. `adapter` is a digest, of a plain or a gated one; None: the base alone.
    `prior` (E,) are logits for all gates of a gated one, from what is known of the whole request;
    `groups`: what its weights are told by, None where nobody asked; `weigh`: their means over the
    tokens of a forward are wanted."""

    adapter: str | None = None
    prior: Tensor | None = None
    groups: Groups | None = None
    weigh: bool = False


@dataclass(eq=False, slots=True)
class _Trace:
    """Sums of the weights of those rows of a part that told by the same groups."""

    groups: Groups
    rows: list[int]
    sums: Tensor  # (n, new, G, E)

    def add(self, module: str, weights: Tensor) -> None:
        column = self.groups.of.get(module)
        if column is not None:
            self.sums[:, :, column] += weights[self.rows]

    def means(self) -> Tensor:
        sizes = torch.tensor(self.groups.sizes, device=self.sums.device)
        return self.sums / sizes[:, None]


@dataclass(eq=False, slots=True)
class _Part:
    """The rows of a batch that one gate serves. `index` (n,) None: all of them."""

    gate: Gate
    rows: list[int]
    index: Tensor | None
    prior: Tensor | None  # (n, 1, E)
    features: Tensor | None  # (n, new, f)
    traces: list[_Trace] = field(default_factory=list)
    means: PromptMeans | None = None


class MixedGates:
    """Puts the rows' gates to work by hooks on a model's linear layers, one product of all rows
    for each gate. Layers that peft has wrapped are hooked as they are, so a plain adapter's row
    and a gated one's can stand side by side."""

    def __init__(self) -> None:
        self._gates: dict[str, Gate] = {}
        self._hooks: list[Any] = []
        self._parts: list[_Part] = []
        self._rows = 0

    @property
    def digests(self) -> Collection[str]:
        return self._gates.keys()

    def gate(self, digest: str) -> Gate:
        return self._gates[digest]

    def two_pass(self, digest: str | None) -> bool:
        """Whether this one's weights need a pass of the base alone first."""
        gate = self._gates.get(digest or "")
        return gate is not None and gate.manifest.passes == 2

    def add(self, digest: str, gate: Gate) -> None:
        self._gates[digest] = gate

    def drop(self, digest: str) -> None:
        del self._gates[digest]

    def attach(self, model: torch.nn.Module) -> None:
        """To be called after gates, or modules of the model, came or went."""
        for hook in self._hooks:
            hook.remove()
        modules = sorted({module for gate in self._gates.values() for module in gate.layers})
        self._hooks = [
            model.get_submodule(module).register_forward_hook(self._adder(module))
            for module in modules
        ]
        self._parts = []

    def assign(
        self, uses: Sequence[Use], real: Tensor, hidden: Tensor | None, device: torch.device
    ) -> None:
        """What each row of the next forward runs on; `real` (rows, new) is False at padding.
        `hidden` (n, new, d) are the last hidden states of the base alone, for the rows whose gate
        takes two passes, in row order."""
        rows: dict[str, list[int]] = {}
        for row, use in enumerate(uses):
            if use.adapter in self._gates:
                rows.setdefault(str(use.adapter), []).append(row)
        first = [row for row, use in enumerate(uses) if self.two_pass(use.adapter)]
        new = real.shape[1]
        self._rows = len(uses)
        self._parts = []
        for digest, own in rows.items():
            gate = self._gates[digest]
            index = None if len(own) == len(uses) else torch.tensor(own, device=device)
            part = _Part(gate, own, index, _prior([uses[row] for row in own]), None)
            if gate.manifest.passes == 2:
                if hidden is None:
                    raise ValueError("a gate of two passes was given no first one")
                part.features = features(gate, hidden[[first.index(row) for row in own]])
            part.traces = _traces([uses[row] for row in own], new, len(gate.members), device)
            if any(uses[row].weigh for row in own):
                part.means = PromptMeans(real[own])
            self._parts.append(part)

    def traces(self) -> list[Tensor | None]:
        """After a forward: the mean weights (new, G, E) of each row that asked, in row order; empty
        where none did."""
        if not any(part.traces for part in self._parts):
            return []
        told: list[Tensor | None] = [None] * self._rows
        for part in self._parts:
            for trace in part.traces:
                for row, weights in zip(trace.rows, trace.means(), strict=True):
                    told[part.rows[row]] = weights
        return told

    def means(self, row: int) -> dict[str, tuple[float, ...]]:
        """After a forward: module → the mean weights (E,) of a row whose use says `weigh`."""
        part = next(part for part in self._parts if row in part.rows)
        assert part.means is not None
        return part.means.row(part.rows.index(row))

    def _adder(self, module: str) -> Any:
        def add(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for part in self._parts:
                gated = part.gate.layers.get(module)
                if gated is None:
                    continue
                x = args[0]  # (rows, new, d_in)
                if x.shape[0] != self._rows:
                    raise ValueError(
                        f"a layer sees {x.shape[0]} rows of a batch of {self._rows}: this model "
                        "regroups its rows, so they cannot use different gates"
                    )
                x = x if part.index is None else x[part.index]
                # The head sees the last tokens alone.
                read = x if part.features is None else part.features[:, -x.shape[1] :]
                weights = gated.weights(read, part.prior)  # (n, new, E)
                for trace in part.traces:
                    trace.add(module, weights)
                if part.means is not None:
                    part.means.add(module, weights)
                delta = gated.stacked.delta(x, weights).to(output.dtype)
                if part.index is None:
                    output = output + delta
                else:
                    output = output.index_add(0, part.index, delta)
            return output

        return add


def _prior(uses: Sequence[Use]) -> Tensor | None:
    priors = [use.prior for use in uses if use.prior is not None]
    if not priors:
        return None
    if len(priors) < len(uses):
        raise ValueError("some rows of a gate that reads the request came without it")
    return torch.stack(priors)[:, None]


def _traces(uses: Sequence[Use], new: int, members: int, device: torch.device) -> list[_Trace]:
    rows: dict[int, list[int]] = {}
    for row, use in enumerate(uses):
        if use.groups is not None:
            rows.setdefault(id(use.groups), []).append(row)
    traces = []
    for own in rows.values():
        groups = uses[own[0]].groups
        assert groups is not None
        sums = torch.zeros(len(own), new, len(groups.names), members, device=device)
        traces.append(_Trace(groups, own, sums))
    return traces
