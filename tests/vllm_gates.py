"""Gates over the tiny adapters of the large base, as the published settings have them, made without
training: what a test of serving needs of a gate is that it switches, not that it is good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from composer.adapters.factors import read_lora
from composer.adapters.gates.arrow import prototype
from composer.adapters.gates.files import Gate, GatedModule, Manifest, gated_layer, members_of
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import Stacked
from examples.tiny.experts import EXPERTS, expert_folder

BASE = "composer/tiny-large"

SETTINGS: dict[str, tuple[Normalise, Selection]] = {
    "arrow": ("absolute", Selection(top_k=3)),
    "phatgoose": ("standardised", Selection(top_k=2)),
    "softmax": ("none", Selection(temperature=0.5)),
    "null": ("none", Selection(top_k=2, null=True)),
    "top_p": ("none", Selection(top_p=0.6)),
    "tsallis": ("none", Selection(top_k=1, tsallis={"q": 1.1, "above": 1.6})),
}


def tiny_gate(
    kind: str,
    skills: Sequence[str] = tuple(EXPERTS["large"]),
    *,
    seed: int = 0,
    times: float = 1.0,
    **manifest: object,
) -> Gate:
    """Rows of a trained gate are drawn; Arrow's are the adapters' prototypes. The adapters count
    `times` as much as they were trained to: mixed at random they hardly change an answer."""
    normalise, selection = SETTINGS[kind]
    loras = [read_lora(expert_folder("large", skill)) for skill in skills]
    generator = torch.Generator().manual_seed(seed)
    layers, told = {}, {}
    for module in sorted({name for lora in loras for name in lora.modules}):
        there = [lora.modules.get(module) for lora in loras]
        own = [None if factors is None else factors.times(times) for factors in there]
        stacked = Stacked.of(own, torch.float32)
        outs, d_in = len(own) + selection.null, stacked.a.shape[1]
        if kind == "arrow":
            vectors = torch.stack([torch.zeros(d_in) if f is None else prototype(f) for f in own])
        else:
            vectors = torch.randn(outs, d_in, generator=generator)
            if normalise == "none":
                vectors /= 8  # as drawn, a rounding of 1e-6 would be one of 1e-3 in an answer
        bias = torch.randn(outs, generator=generator) / 4 if normalise == "none" else None
        rows = Projection.of(vectors, normalise).rows
        layers[module] = gated_layer(stacked, rows, bias, normalise, selection)
        told[module] = GatedModule(ranks=stacked.ranks)
    named = members_of(skills, [lora.digest for lora in loras])
    settings = {"kind": kind, "base": BASE, "normalise": normalise, "selection": selection}
    return Gate(Manifest(members=named, modules=told, **{**settings, **manifest}), layers)


def folder_of(gate: Gate, path: Path) -> Path:
    from composer.adapters.gates.files import write_gate

    path.mkdir(parents=True)
    write_gate(path, gate)
    return path
