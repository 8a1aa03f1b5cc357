"""Gated adapters put together: members and a gate for each layer in, a `Gate` out; a member more,
or one less. Knows no way of finding a gate's vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from composer.adapters.factors import Factors, Lora
from composer.adapters.gates.files import Gate, GatedModule, GateMember, Manifest, gated_layer
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.types import empty

Members = Mapping[str, Lora]
"""Name → adapter, in the order of the gate's columns."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What gate.json says of a gate beside its members and modules. `selections`: module → its own
    selection, where it is not the gate's."""

    name: str
    normalise: Normalise
    selection: Selection
    paper: str = ""
    passes: Literal[1, 2] = 1
    per_request: bool = False
    selections: Mapping[str, Selection] = field(default_factory=empty)
    settings: Mapping[str, JsonValue] = field(default_factory=empty)
    report: Mapping[str, JsonValue] = field(default_factory=empty)


def stacks(members: Members) -> dict[str, Stacked]:
    """Module → its members side by side, in the members' own precision: float32 where a scale is
    no power of 2, so that folding it into B rounds nothing. Raises ValueError ("what is wrong; the
    remedy") where there is no member, or they are not of one base."""
    if not members:
        raise ValueError("a gate needs members; name at least one adapter")
    one_base({name: lora.base for name, lora in members.items()})
    loras = list(members.values())
    exact = all(_power_of_two(f.scale) for lora in loras for f in lora.modules.values())
    dtype = torch.float32
    if exact and len({lora.dtype for lora in loras}) == 1:
        dtype = loras[0].dtype
    modules = sorted({module for lora in loras for module in lora.modules})
    return {m: Stacked.of([lora.modules.get(m) for lora in loras], dtype) for m in modules}


def one_base(bases: Mapping[str, str | None]) -> None:
    """Raises ValueError where two members name different bases."""
    first = next(iter(bases))
    for name, base in bases.items():
        if base != bases[first]:
            raise ValueError(
                f"{name!r} was trained on {base!r}, {first!r} on {bases[first]!r}; gate adapters "
                "of one base model"
            )


def assembled(
    members: Members,
    projections: Mapping[str, Projection],
    kind: Kind,
    tensors: Mapping[str, Tensor] | None = None,
) -> Gate:
    """`projections`: module → its gate, of the modules that are to be gated; the members are silent
    in all others. `tensors` are the gate's own. Raises ValueError."""
    whole = stacks(members)
    unknown = sorted(set(projections) - set(whole))
    if unknown:
        raise ValueError(
            f"no member has factors in {', '.join(unknown[:3])}; gate the modules that they have"
        )
    layers = {
        module: _layer(whole[module], projection, kind, kind.selections.get(module))
        for module, projection in projections.items()
    }
    own = tuple(GateMember(name=name, digest=lora.digest) for name, lora in members.items())
    return Gate(
        _manifest(own, next(iter(members.values())).base, layers, kind), layers, tensors or {}
    )


def without(gate: Gate, name: str) -> Gate:
    """The gate without a member; what is left of every tensor is bit for bit as it was. Raises
    ValueError where it is no member, or the only one."""
    at = _column(gate, name)
    if len(gate.members) == 1:
        raise ValueError(f"{name!r} is the gate's only member; delete the gate instead")
    layers = {}
    for module, layer in gate.layers.items():
        ranks = layer.stacked.ranks
        if not any(ranks[:at] + ranks[at + 1 :]):
            continue  # nobody else is in this module
        start = sum(ranks[:at])
        kept = [i for i in range(sum(ranks)) if not start <= i < start + ranks[at]]
        stacked = Stacked(
            layer.stacked.a[kept], layer.stacked.b[:, kept], ranks[:at] + ranks[at + 1 :]
        )
        rows = [i for i in range(len(layer.projection.rows)) if i != at]
        bias = layer.projection.bias
        projection = Projection(
            layer.projection.rows[rows],
            layer.projection.normalise,
            None if bias is None else bias[rows],
        )
        layers[module] = GatedLayer(stacked, projection, layer.selection)
    members = gate.manifest.members[:at] + gate.manifest.members[at + 1 :]
    return _changed(
        gate, members, layers, {k: _row_less(k, t, at) for k, t in gate.tensors.items()}
    )


def joined(
    gate: Gate,
    name: str,
    lora: Lora,
    rows: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
    bias: float = 0.0,
) -> Gate:
    """The gate with one more member, the last; all that was there stays bit for bit. `rows`: module
    → the member's own row (f,) as it is served, for each module where it has factors and that is
    gated; others' rows are 0 in a module where only it has factors. `bias` is its own where the
    gate has biases. `tensors`: name → its row of the gate's tensors with one row a member. Raises
    ValueError."""
    if name in gate.members:
        raise ValueError(f"{name!r} is a member already; remove it first, or give another name")
    one_base({"the gate": gate.manifest.base, name: lora.base})
    total = len(gate.members)
    layers = {}
    for module in sorted({*gate.layers, *rows}):
        old, factors = gate.layers.get(module), lora.modules.get(module)
        layers[module] = (
            _grown(old, factors, rows.get(module), bias)
            if old is not None
            else _first(factors, rows[module], total, gate.manifest)
        )
    members = (*gate.manifest.members, GateMember(name=name, digest=lora.digest))
    own = {
        key: torch.cat([tensor, (tensors or {})[key][None].to(tensor)])
        if key in PER_MEMBER
        else tensor
        for key, tensor in gate.tensors.items()
    }
    return _changed(gate, members, layers, own)


PER_MEMBER = frozenset({"prior.rows"})
"""The tensors of a gate as a whole that have one row a member."""


def _grown(
    layer: GatedLayer, factors: Factors | None, row: Tensor | None, own_bias: float
) -> GatedLayer:
    stacked, projection = layer.stacked, layer.projection
    rank = 0 if factors is None else factors.rank
    a, b = stacked.a, stacked.b
    if factors is not None:
        down, up = factors.a.float(), factors.b.float() * factors.scale
        exact = torch.equal(up.to(a.dtype).float(), up) and torch.equal(
            down.to(a.dtype).float(), down
        )
        dtype = a.dtype if exact else torch.float32  # widened, never rounded
        a = torch.cat([a.to(dtype), down.to(dtype)])
        b = torch.cat([b.to(dtype), up.to(dtype)], dim=1)
    end = len(stacked.ranks)
    new = torch.zeros_like(projection.rows[0]) if row is None or not rank else row.float()
    rows = torch.cat([projection.rows[:end], new[None], projection.rows[end:]])
    bias = projection.bias
    if bias is not None:
        bias = bias.masked_fill(bias.isinf(), 0.0)  # who is absent stands in the ranks
        bias = torch.cat([bias[:end], torch.tensor([own_bias]), bias[end:]])
    grown = Stacked(a, b, (*stacked.ranks, rank))
    return gated_layer(grown, rows, bias, projection.normalise, layer.selection)


def _first(factors: Factors | None, row: Tensor, others: int, manifest: Manifest) -> GatedLayer:
    if factors is None:
        raise ValueError(
            "a row was given for a module where the member has no factors; leave it out"
        )
    stacked = Stacked.of([*([None] * others), factors], torch.float32)
    null = int(manifest.selection.null)
    rows = torch.zeros(others + 1 + null, row.shape[0])
    rows[others] = row.float()
    return gated_layer(stacked, rows, None, manifest.normalise, manifest.selection)


def _layer(
    stacked: Stacked, projection: Projection, kind: Kind, selection: Selection | None
) -> GatedLayer:
    return gated_layer(
        stacked,
        projection.rows,
        projection.bias,
        kind.normalise,
        selection or kind.selection,
        projection.rows.shape[1] if kind.passes == 2 else None,
    )


def _manifest(
    members: tuple[GateMember, ...], base: str | None, layers: Mapping[str, GatedLayer], kind: Kind
) -> Manifest:
    return Manifest(
        kind=kind.name,
        paper=kind.paper,
        base=base,
        members=members,
        normalise=kind.normalise,
        selection=kind.selection,
        modules=_modules(layers, kind.selection),
        passes=kind.passes,
        per_request=kind.per_request,
        settings=dict(kind.settings),
        report=dict(kind.report),
    )


def _modules(layers: Mapping[str, GatedLayer], common: Selection) -> dict[str, GatedModule]:
    return {
        module: GatedModule(
            ranks=layer.stacked.ranks,
            selection=None if layer.selection == common else layer.selection,
        )
        for module, layer in layers.items()
    }


def _changed(
    gate: Gate,
    members: tuple[GateMember, ...],
    layers: Mapping[str, GatedLayer],
    tensors: Mapping[str, Tensor],
) -> Gate:
    modules = _modules(layers, gate.manifest.selection)
    told = {"members": members, "modules": modules, "digest": ""}
    return Gate(gate.manifest.model_copy(update=told), layers, tensors)


def _row_less(name: str, tensor: Tensor, at: int) -> Tensor:
    if name not in PER_MEMBER:
        return tensor
    return tensor[[i for i in range(len(tensor)) if i != at]]


def _column(gate: Gate, name: str) -> int:
    if name not in gate.members:
        known = ", ".join(gate.members)
        raise ValueError(f"{name!r} is no member of the gate; its members are {known}")
    return gate.members.index(name)


def _power_of_two(scale: float) -> bool:
    return scale != 0 and math.frexp(abs(scale))[0] == 0.5
