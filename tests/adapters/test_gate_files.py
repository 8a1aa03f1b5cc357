"""A gate's folder: what is written is what is read, and a damaged one is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.adapters.factors import Factors
from composer.adapters.gates.files import (
    MANIFEST,
    TENSORS,
    Gate,
    GatedModule,
    Manifest,
    gated_layer,
    members_of,
    read_gate,
    write_gate,
)
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import Stacked
from composer.errors import AdapterError


def gate(null: bool = False) -> Gate:
    torch.manual_seed(0)
    selection = Selection(top_k=2, null=null)
    outs = 3 + null
    layers = {}
    modules = {}
    for module, ranks in {"a.q_proj": (2, 3, 1), "a.up_proj": (2, 0, 1)}.items():
        own = [Factors(torch.randn(r, 6), torch.randn(5, r), 0.5) if r else None for r in ranks]
        stacked = Stacked.of(own, torch.float32)
        rows = torch.randn(outs, 6)
        layers[module] = gated_layer(stacked, rows, None, "absolute", selection)
        modules[module] = GatedModule(ranks=ranks)
    manifest = Manifest(
        kind="arrow",
        base="some/base",
        members=members_of(["x", "y", "z"], ["sha256:1", "sha256:2", "sha256:3"]),
        normalise="absolute",
        selection=selection,
        modules=modules,
        settings={"temperature": 1.0},
    )
    return Gate(manifest, layers, {"prior.rows": torch.randn(3, 4)})


@pytest.mark.parametrize("null", [False, True])
def test_what_was_written_is_read(tmp_path: Path, null: bool) -> None:
    made = gate(null)
    digest = write_gate(tmp_path, made)
    again = read_gate(tmp_path)
    assert again.manifest == made.manifest.model_copy(update={"digest": digest})
    assert torch.equal(again.tensors["prior.rows"], made.tensors["prior.rows"])
    x = torch.randn(4, 6)
    for module, layer in made.layers.items():
        assert torch.equal(layer.weights(x), again.layers[module].weights(x))
        assert torch.equal(layer.delta(x), again.layers[module].delta(x))


def test_who_has_no_factors_in_a_layer_is_not_asked_there() -> None:
    weights = gate().layers["a.up_proj"].weights(torch.randn(50, 6))
    assert torch.equal(weights[:, 1], torch.zeros(50))
    assert torch.allclose(weights.sum(-1), torch.ones(50))


def test_the_digest_is_of_what_is_computed(tmp_path: Path) -> None:
    made = gate()
    first = write_gate(tmp_path, made)
    told = made.manifest.model_copy(update={"report": {"loss": 1.0}, "base": "elsewhere/base"})
    assert write_gate(tmp_path, Gate(told, made.layers, made.tensors)) == first
    cold = made.manifest.model_copy(update={"selection": Selection(top_k=1)})
    assert write_gate(tmp_path, Gate(cold, made.layers, made.tensors)) != first
    own = {"prior.rows": torch.zeros(3, 4)}
    assert write_gate(tmp_path, Gate(made.manifest, made.layers, own)) != first


def damaged(folder: Path, how: str) -> None:
    manifest = folder / MANIFEST
    data: dict[str, Any] = json.loads(manifest.read_text())
    if how == "changed":
        data["selection"]["top_k"] = 1
    elif how == "ranks":
        data["modules"]["a.q_proj"]["ranks"] = [2, 3]
    elif how == "unknown":
        data["colour"] = "red"
    elif how == "cut":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])
    elif how == "gone":
        manifest.unlink()
        return
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("changed", "its digest is"),
        ("ranks", "modules.a.q_proj.ranks: 2 ranks for 3 members"),
        ("unknown", "colour"),
        ("cut", "cannot be read"),
        ("gone", "Name a gate's folder"),
    ],
)
def test_a_damaged_gate_is_refused(tmp_path: Path, how: str, told: str) -> None:
    write_gate(tmp_path, gate())
    damaged(tmp_path, how)
    with pytest.raises(AdapterError) as caught:
        read_gate(tmp_path)
    assert told in " ".join(map(str, caught.value.problems))


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    made = gate()
    write_gate(tmp_path, Gate(made.manifest, made.layers, {"own": torch.tensor([torch.nan])}))
    with pytest.raises(AdapterError, match="NaN"):
        read_gate(tmp_path)
