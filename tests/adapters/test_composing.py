"""Compositions as folders: what peft makes of them, what they say they are, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from composer.adapters.compose import PROVENANCE, compose
from composer.adapters.factors import read_lora
from composer.adapters.files import CONFIG, WEIGHTS
from composer.adapters.recipe import Member, Recipe
from composer.adapters.ternary import compress, load_ternary, save_ternary
from composer.adapters.verify import verify_adapter
from composer.cli import app
from composer.errors import AdapterError
from tests.tiny import TINY

EXPERTS_LARGE = TINY / "experts" / "large"
SKILLS = ("uppercase", "reverse", "add")


def recipe(**more: object) -> Recipe:
    weights = (0.5, 0.3, 0.2)
    members = tuple(
        Member(name, EXPERTS_LARGE / name, weight)
        for name, weight in zip(SKILLS, weights, strict=True)
    )
    return Recipe(members, **more)  # type: ignore[arg-type]


def test_a_composition_is_an_ordinary_adapter(tmp_path: Path) -> None:
    made = compose(recipe(), tmp_path)
    assert (made.built, made.needed, made.rank, made.energy) == (True, 24, 32, 1.0)
    adapter = verify_adapter(made.folder, None, roots=[tmp_path])
    assert adapter.rank == adapter.alpha == 32
    got = read_lora(made.folder)
    members = [read_lora(EXPERTS_LARGE / name) for name in SKILLS]
    for module, factors in got.modules.items():
        want = sum(
            w * m.modules[module].delta() for w, m in zip((0.5, 0.3, 0.2), members, strict=True)
        )
        off = (factors.delta() - want).norm() / want.norm()
        assert off < 2e-3  # bfloat16 on disk, as the members'


def test_it_says_what_it_was_made_of(tmp_path: Path) -> None:
    made = compose(recipe(max_rank=16), tmp_path)
    told = json.loads((made.folder / PROVENANCE).read_text())
    assert [m["name"] for m in told["members"]] == list(SKILLS)
    assert [m["weight"] for m in told["members"]] == [0.5, 0.3, 0.2]
    digests = [read_lora(EXPERTS_LARGE / name).digest for name in SKILLS]
    assert [m["digest"] for m in told["members"]] == digests
    assert (told["method"], told["rank"], told["needed"]) == ("cat", 16, 24)
    assert 0.9 < told["energy"] == made.energy < 1


def test_the_second_use_builds_nothing(tmp_path: Path) -> None:
    first = compose(recipe(), tmp_path)
    stamp = (first.folder / WEIGHTS).stat().st_mtime_ns
    second = compose(recipe(), tmp_path)
    assert second.folder == first.folder
    assert not second.built
    assert (first.folder / WEIGHTS).stat().st_mtime_ns == stamp
    assert (second.rank, second.needed, second.energy) == (first.rank, first.needed, first.energy)


def test_general_knowledge_is_taken_out_of_every_member(tmp_path: Path) -> None:
    general = Member("plural", EXPERTS_LARGE / "plural")
    plain, less = compose(recipe(), tmp_path), compose(recipe(subtract=general), tmp_path)
    assert (plain.needed, less.needed) == (24, 48)
    rid = read_lora(general.folder).modules
    without = read_lora(less.folder)
    assert without.dtype == read_lora(plain.folder).dtype  # no wider than its members
    for module, factors in read_lora(plain.folder).modules.items():
        want = factors.delta() - rid[module].delta()  # the weights add up to 1
        off = (without.modules[module].delta() - want).norm() / want.norm()
        assert off < 4e-3  # bfloat16 on disk
    told = json.loads((less.folder / PROVENANCE).read_text())
    assert told["subtract"]["digest"] == read_lora(general.folder).digest
    assert [share.name for share in less.composed.members] == list(SKILLS)


def test_names_of_members_do_not_matter_and_weights_do(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(EXPERTS_LARGE / "add", copy)
    one = compose(Recipe((Member("add", EXPERTS_LARGE / "add", 1.0),)), tmp_path / "out")
    same = compose(Recipe((Member("sum", copy, 1.0),)), tmp_path / "out")
    other = compose(Recipe((Member("add", copy, 0.9),)), tmp_path / "out")
    assert same.folder == one.folder != other.folder


def test_adapters_of_two_bases_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "add"
    shutil.copytree(EXPERTS_LARGE / "add", copy)
    config = json.loads((copy / CONFIG).read_text()) | {"base_model_name_or_path": "other"}
    (copy / CONFIG).write_text(json.dumps(config))
    members = (Member("reverse", EXPERTS_LARGE / "reverse"), Member("add", copy))
    with pytest.raises(AdapterError, match="'add' was trained on 'other'"):
        compose(Recipe(members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "soup"}, "there is no method 'soup'"),
        ({"method": "svd", "settings": {"rank": 0}}, "greater than or equal to 1"),
        ({"method": "svd", "settings": {"ranks": 4}}, "ranks"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_and_leaves_nothing(
    tmp_path: Path, more: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        compose(recipe(**more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_changed_is_refused(tmp_path: Path) -> None:
    member = Member("add", EXPERTS_LARGE / "add", digest="sha256:other")
    with pytest.raises(AdapterError, match="has the digest"):
        compose(Recipe((member,)), tmp_path)


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("composer.adapters.factors.save_file", full)
    with pytest.raises(OSError, match="no space"):
        compose(recipe(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ternary_keeps_the_largest_signs_and_restores(tmp_path: Path) -> None:
    lora = read_lora(EXPERTS_LARGE / "add")
    tensors = compress(lora, density=0.25, alpha=2.0)
    save_ternary(tmp_path, tensors, lora.base)
    got = load_ternary(tmp_path)
    assert got.base == lora.base
    for module, factors in lora.modules.items():
        a = factors.a.float()
        back = got.modules[module].a
        size = 2.0 * a.std(correction=0)
        kept = back != 0
        assert torch.allclose(back[kept].abs(), size.expand(int(kept.sum())))
        assert torch.equal(back[kept].sign(), a[kept].sign())
        assert a[kept].abs().min() >= a[~kept].abs().max()
        assert int(kept.sum()) >= round(0.25 * a.numel())
        assert got.modules[module].scale == factors.scale
    small = (tmp_path / "adapter_ternary.safetensors").stat().st_size
    assert small < (EXPERTS_LARGE / "add" / WEIGHTS).stat().st_size


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["compose", *words], env={"COLUMNS": "200"})


def test_the_command_composes_by_words_and_by_recipe_alike(tmp_path: Path) -> None:
    folders = [str(EXPERTS_LARGE / name) for name in ("add", "reverse")]
    words = ("--weight", "0.5", "--weight", "-0.25", "--method", "svd", "--set", "rank=8")
    made = run(*folders, "--out", str(tmp_path / "out"), *words, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert (told["rank"], told["built"]) == (8, True)
    text = {
        "members": dict(zip(folders, (0.5, -0.25), strict=True)),
        "method": "svd",
        "settings": {"rank": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    again = run("--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"))
    assert f"{told['folder']}: rank 8; was there already" in again.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: {add: heavy}", "members.add: Input should be a valid number"),
        ("- add", "Input should be a valid dictionary"),
        ("members: [", "it cannot be read"),
        ("members: [./none]", "none"),
    ],
)
def test_a_recipe_file_that_is_wrong_is_refused_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    refused = run("--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert str(tmp_path) in refused.output
    assert message in refused.output
    assert not (tmp_path / "out").exists()


def test_words_and_a_recipe_exclude_each_other(tmp_path: Path) -> None:
    both = run("x", "--recipe", "y", "--out", str(tmp_path))
    assert both.exit_code == 1
    assert "not both" in both.output
