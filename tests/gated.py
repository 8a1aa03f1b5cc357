"""Gated adapters made of plain ones, and what they must compute, by a loop over members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer.adapters.factors import Factors, Lora, read_lora
from composer.adapters.gates.arrow import prototype
from composer.adapters.gates.files import (
    Gate,
    GatedModule,
    Manifest,
    gated_layer,
    members_of,
    write_gate,
)
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import Stacked
from composer.adapters.gates.verify import verify_gate
from composer.adapters.lora_config import AdapterFeature
from composer.types import Adapter

EVERYTHING: tuple[AdapterFeature, ...] = ("gate", "two_pass_gate", "per_request_gate")


def save_gate(folder: Path, members: Mapping[str, Path], **settings: Any) -> Adapter:
    """As `write_gated`, verified: what is wrong in itself is refused here."""
    write_gated(folder, members, **settings)
    return verify_gate(folder, None, features=EVERYTHING)


def write_gated(
    folder: Path,
    members: Mapping[str, Path],
    *,
    kind: str = "arrow",
    selection: Selection | None = None,
    seed: int | None = None,
    normalise: Normalise = "absolute",
    bias: Sequence[float] | None = None,
    width: int | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **manifest: Any,
) -> None:
    """Of these adapters' folders, in a folder of its own. Rows are Arrow's prototypes or, with a
    `seed`, random; `width` is theirs where the gate reads something else than x."""
    loras = {name: read_lora(path) for name, path in members.items()}
    selection = selection or Selection(top_k=2)
    generator = torch.Generator().manual_seed(seed or 0)
    layers, modules = {}, {}
    for module in sorted({module for lora in loras.values() for module in lora.modules}):
        own = [lora.modules.get(module) for lora in loras.values()]
        stacked = Stacked.of(own, torch.float32)
        outs = len(own) + selection.null
        d_in = stacked.a.shape[1]
        if seed is None:
            rows = torch.stack([torch.zeros(d_in) if f is None else prototype(f) for f in own])
        else:
            rows = torch.randn(outs, width or d_in, generator=generator)
        rows = Projection.of(rows, normalise).rows
        known = None if bias is None else torch.tensor(bias)
        layers[module] = gated_layer(stacked, rows, known, normalise, selection, width)
        modules[module] = GatedModule(ranks=stacked.ranks)
    made = Manifest(
        kind=kind,
        base=next(iter(loras.values())).base,
        members=members_of(list(loras), [lora.digest for lora in loras.values()]),
        normalise=normalise,
        selection=selection,
        modules=modules,
        **manifest,
    )
    folder.mkdir(parents=True)
    write_gate(folder, Gate(made, layers, dict(tensors or {})))


def by_loop(
    model: torch.nn.Module, loras: Sequence[Lora], weights: Any
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that add Σ w·s·B·A·x to each module that a member adapts, one member at a time.
    `weights` (module, x) → (…, E)."""

    def hook(module: str) -> Any:
        own: list[Factors | None] = [lora.modules.get(module) for lora in loras]

        def add(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            share = weights(module, args[0])
            for column, factors in enumerate(own):
                if factors is not None:
                    delta = args[0] @ factors.a.T @ factors.b.T * factors.scale
                    output = output + share[..., column, None] * delta
            return output

        return add

    modules = sorted({module for lora in loras for module in lora.modules})
    return [model.get_submodule(m).register_forward_hook(hook(m)) for m in modules]
