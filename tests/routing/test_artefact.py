"""Artefacts: whole or not at all, the same after loading, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.routing.artefact import (
    ARRAYS,
    MANIFEST,
    Artefact,
    ArtefactError,
    DataStamp,
    EmbedderStamp,
    ExpertStamp,
    Manifest,
    read_manifest,
)
from composer.routing.family import State
from tests.routing.test_curve import FALLING


def artefact(**changes: Any) -> Artefact:
    manifest = Manifest(
        family="kernel",
        settings={"ridge": 0.1},
        embedder=EmbedderStamp(id="mini", digest="d" * 64, dim=4),
        experts=(ExpertStamp(id="a", quality=0.5, cost=0.01), ExpertStamp(id="b", quality=0.4)),
        data=DataStamp(source="table.csv", digest="e" * 64, questions=12),
        curve=FALLING,
        metrics={"avg_acc": 0.61, "aiq": None},
    ).model_copy(update=changes)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 2)).astype(np.float32)
    return Artefact(
        manifest,
        {
            "family": State({"w": weights, "member/k": np.arange(3)}, {"why": "é"}),
            "views": State({}, {"names": ["embedding"]}),
        },
    )


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    before = artefact()
    written = before.save(tmp_path / "deep" / "router")
    after = Artefact.load(tmp_path / "deep" / "router")
    assert after.manifest == written
    assert after.manifest.curve == FALLING
    assert after.experts == ("a", "b")
    assert after.states.keys() == before.states.keys()
    for part, state in before.states.items():
        found = after.states[part]
        assert found.values == state.values
        assert found.arrays.keys() == state.arrays.keys()
        for name, array in state.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)
            assert found.arrays[name].dtype == array.dtype
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["router"]


def test_a_new_one_takes_the_old_ones_place(tmp_path: Path) -> None:
    artefact().save(tmp_path / "router")
    artefact(family="clusters").save(tmp_path / "router")
    assert read_manifest(tmp_path / "router").family == "clusters"
    assert [p.name for p in tmp_path.iterdir()] == ["router"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="is no artefact; name another folder"):
        artefact().save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def _alter(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    with pytest.raises(ArtefactError, match="there is no artefact in"):
        Artefact.load(folder)
    artefact().save(folder)
    _alter(folder, format=7)
    with pytest.raises(ArtefactError, match="is of format 7 and this program reads 1; train it"):
        read_manifest(folder)
    artefact().save(folder)
    _alter(folder, experts=[])
    with pytest.raises(ArtefactError, match="experts: Tuple should have at least 1 item"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("{", "utf-8")
    with pytest.raises(ArtefactError, match=r"manifest\.json cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize("harm", ["altered", "torn", "missing"])
def test_arrays_that_are_not_the_manifests(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "router"
    artefact().save(folder)
    path = folder / ARRAYS
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + b"\x7f" if harm == "altered" else data[:-9])
    with pytest.raises(ArtefactError, match="copy the whole folder"):
        Artefact.load(folder)
