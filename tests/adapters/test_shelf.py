"""A shelf that several processes share: what one holds, no other takes away, however they meet."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composer.adapters.factors import read_lora
from composer.adapters.files import WEIGHTS
from composer.adapters.recipe import Member, Recipe
from composer.adapters.shelf import LEFTOVER_S, PROVENANCE, Shelf
from tests.registry.world import write_adapter


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folders = [tmp_path / name for name in ("fox", "owl")]
    for seed, folder in enumerate(folders):
        write_adapter(folder, seed=seed)
    return Recipe(tuple(Member(f.name, f, 0.5, read_lora(f).digest) for f in folders))


def shelf(tmp_path: Path, budget: int = 0) -> Shelf:
    return Shelf(tmp_path / "shelf", budget)


def known(recipe: Recipe) -> set[str]:
    return {str(member.digest) for member in recipe.members}


def before_the_lock(monkeypatch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """`other` runs once, when an exclusive lock is about to be taken: the folder is open by then,
    and not yet locked."""
    real, turns = fcntl.flock, [other]

    def slow(file: Any, how: int) -> None:
        if how & fcntl.LOCK_EX and turns:
            turns.pop()()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)


def test_a_slow_trim_leaves_what_was_built_anew_and_is_held(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = shelf(tmp_path), shelf(tmp_path)
    folder = ours.make(recipe).folder
    ours.let_go(folder)

    def taken_and_made_again() -> None:
        assert theirs.trim(known(recipe)) == 1
        assert theirs.make(recipe).built

    before_the_lock(monkeypatch, taken_and_made_again)
    assert ours.trim(known(recipe)) == 0
    assert (folder / PROVENANCE).is_file()
    theirs.close()
    assert ours.trim(known(recipe)) == 1
    assert list(ours.folder.iterdir()) == []


def test_one_that_is_damaged_while_it_is_held_is_made_anew_and_held(
    recipe: Recipe, tmp_path: Path
) -> None:
    ours, theirs = shelf(tmp_path), shelf(tmp_path)
    weights = ours.make(recipe).folder / WEIGHTS
    right = weights.read_bytes()
    weights.write_bytes(bytes(len(right)))
    assert ours.make(recipe).built
    assert weights.read_bytes() == right
    assert theirs.trim(()) == 0
    ours.close()
    assert theirs.trim(()) == 1


def test_one_without_provenance_that_is_made_meanwhile_stays(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = shelf(tmp_path), shelf(tmp_path)
    folder = ours.make(recipe).folder
    ours.let_go(folder)
    told = (folder / PROVENANCE).read_bytes()
    (folder / PROVENANCE).unlink()
    real = os.rename

    def late(source: Any, target: Any) -> None:
        if str(target).endswith(".leaving"):
            (folder / PROVENANCE).write_bytes(told)
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert ours.trim(()) == 0
    monkeypatch.undo()
    assert theirs.make(recipe).built is False


def test_leftovers_are_swept_when_they_are_old_and_stop_nothing(
    recipe: Recipe, tmp_path: Path
) -> None:
    ours = shelf(tmp_path)
    folder = ours.make(recipe).folder
    ours.let_go(folder)
    old, young = (ours.folder / f".{folder.name}.{word}" for word in ("leaving", "making"))
    for leftover in (old, young):
        leftover.mkdir()
        (leftover / "adapter_model.safetensors").write_bytes(b"cut short")
    then = time.time() - LEFTOVER_S - 1
    os.utime(old, (then, then))
    assert ours.trim(known(recipe)) == 1
    assert list(ours.folder.iterdir()) == [young]


def test_a_composition_that_another_process_takes_away_just_now_is_not_counted(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = shelf(tmp_path), shelf(tmp_path)
    ours.let_go(ours.make(recipe).folder)

    def gone(folder: Path) -> int:
        monkeypatch.undo()
        assert theirs.trim(()) == 1
        raise FileNotFoundError(folder)

    monkeypatch.setattr("composer.adapters.shelf._size", gone)
    assert ours.trim(known(recipe)) == 0


def test_what_is_no_longer_to_be_kept_goes_when_there_is_too_much(
    recipe: Recipe, tmp_path: Path
) -> None:
    """And nothing that is not a composition."""
    ours, theirs = shelf(tmp_path), shelf(tmp_path)
    other = replace(recipe, max_rank=1)
    first, second = ours.make(recipe).folder, ours.make(other).folder
    queries = ours.folder / "queries"
    (queries / first.name).mkdir(parents=True)
    assert ours.keep([first, second]) == 0
    assert theirs.keep([]) == 0
    assert ours.keep([second]) == 1
    assert set(ours.folder.iterdir()) == {second, queries}
    assert list(queries.iterdir()) == [queries / first.name]
    roomy = shelf(tmp_path, budget=2**30)
    assert ours.make(recipe).built
    ours.close()
    assert roomy.keep([]) == 0


@pytest.mark.parametrize("told", ["{}", "[]", "{", json.dumps({"members": [{}]})])
def test_what_says_nothing_of_its_members_goes(told: str, recipe: Recipe, tmp_path: Path) -> None:
    ours = shelf(tmp_path, budget=2**30)
    folder = ours.make(recipe).folder
    ours.let_go(folder)
    assert ours.trim(known(recipe)) == 0
    (folder / PROVENANCE).write_text(told)
    assert ours.trim(known(recipe)) == 1
