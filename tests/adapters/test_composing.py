"""Compositions as folders: what peft makes of them, what they say they are, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from composer.adapters import factors as factors_module
from composer.adapters.base_model import read_base_model
from composer.adapters.cache import FileCache
from composer.adapters.compose import PROVENANCE, compose
from composer.adapters.factors import Factors, Lora, lora_json, read_lora, write_lora
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


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_damaged_at_its_full_size_is_made_anew(
    tmp_path: Path, name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that has not seen it before, as after a power cut."""
    first = compose(recipe(), tmp_path)
    right = (first.folder / name).read_bytes()
    (first.folder / name).write_bytes(right[:-200] + bytes(200))
    if not known:
        monkeypatch.setattr("composer.adapters.factors._DIGESTS", FileCache(4))
    second = compose(recipe(), tmp_path)
    assert second.built
    assert second.adapter == first.adapter
    assert (second.folder / name).read_bytes() == right
    assert [f for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    assert not compose(recipe(), tmp_path).built


def test_a_move_that_fails_is_told_as_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And moves nothing away: only where a folder stands is there one to replace."""
    moved: list[str] = []

    def full(source: object, target: object) -> None:
        moved.append(str(target))
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="no space left") as caught:
        compose(recipe(), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert len(moved) == 1
    assert list(tmp_path.iterdir()) == []


def test_its_bytes_are_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync, rename = os.fsync, os.rename

    def noted(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    def checked(source: Path, target: Path) -> None:
        files = {file.stat().st_ino for file in (source, *source.iterdir())}
        assert files <= set(synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    made = compose(recipe(), tmp_path)
    assert synced[-1] == tmp_path.stat().st_ino
    assert {file.name for file in made.folder.iterdir()} == {WEIGHTS, CONFIG, PROVENANCE}


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


def damaged(folder: Path, how: str) -> Path:
    """A tiny expert whose weights are not what its config says."""
    if how == "missing":
        return folder
    shutil.copytree(EXPERTS_LARGE / "add", folder)
    if how == "no config":
        (folder / CONFIG).unlink()
        return folder
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    if how == "rank":
        cut = {n: t[:4] if "lora_A" in n else t[:, :4] for n, t in tensors.items()}
        tensors = {n: t.contiguous() for n, t in cut.items()}
    else:
        tensors[name][0, 0] = float(how)
    save_file(tensors, folder / WEIGHTS)
    return folder


DAMAGES = {
    "rank": "'odd': its rank is 4, adapter_config.json says 8",
    "nan": "'odd': it holds NaN or infinity",
    "inf": "'odd': it holds NaN or infinity",
    "missing": "'odd': there is no such folder",
    "no config": "'odd': adapter_config.json is missing",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_folder_that_nobody_verified_is_verified_as_the_registry_does(
    tmp_path: Path, how: str
) -> None:
    odd = Member("odd", damaged(tmp_path / "folder", how))
    sound = Member("reverse", EXPERTS_LARGE / "reverse")
    for asked in (Recipe((sound, odd)), Recipe((sound,), subtract=odd)):
        with pytest.raises(AdapterError, match=DAMAGES[how]):
            compose(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_changed_is_refused(tmp_path: Path) -> None:
    member = Member("add", EXPERTS_LARGE / "add", digest="sha256:other")
    with pytest.raises(AdapterError, match="has the digest"):
        compose(Recipe((member,)), tmp_path)


def on_layers(folder: Path, name: str, layers: str) -> Member:
    """One of the tiny experts, of which only these layers' factors are left."""
    shutil.copytree(EXPERTS_LARGE / name, folder)
    lora = read_lora(folder)
    kept = {m: f for m, f in lora.modules.items() if m.split(".")[2] in layers}
    write_lora(folder, Lora(kept, lora.base))
    return Member(name, folder, 0.5)


@pytest.mark.parametrize("layers", [("01", "01"), ("01", "1"), ("0", "2")])
def test_members_on_some_layers_make_an_adapter_that_is_served(
    tmp_path: Path, layers: tuple[str, str]
) -> None:
    names = ("add", "reverse")
    members = [on_layers(tmp_path / n, n, own) for n, own in zip(names, layers, strict=True)]
    base = read_base_model(TINY / "bases" / "large", ["composer/tiny-large"])
    for member in members:
        verify_adapter(member.folder, base, roots=[tmp_path])
    made = compose(Recipe(tuple(members)), tmp_path / "out")
    verify_adapter(made.folder, base, roots=[tmp_path])
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "bases" / "large")
    peft = PeftModel.from_pretrained(model, str(made.folder))
    found = {n.removeprefix("base_model.model.") for n, _ in peft.named_modules()}
    found = {n.removesuffix(".lora_A.default") for n in found if n.endswith(".lora_A.default")}
    assert found == set(read_lora(made.folder).modules)


def test_targets_are_whole_names_where_layers_do_not_say_it_all() -> None:
    def targets(*modules: str) -> dict[str, Any]:
        factors = Factors(torch.ones(1, 2), torch.ones(2, 1))
        told = lora_json(Lora(dict.fromkeys(modules, factors), "base"), 1)
        return {k: told[k] for k in ("target_modules", "layers_to_transform") if k in told}

    layer = "model.layers.{}.self_attn.{}".format
    assert targets(layer(1, "q"), layer(1, "v")) == {
        "target_modules": ["q", "v"],
        "layers_to_transform": [1],
    }
    for uneven in (
        [layer(0, "q"), layer(1, "v")],
        [layer(0, "q"), "lm_head"],
        [layer(0, "q"), "model.layers.0.cross_attn.q"],
        ["model.layers.0.experts.3.w1"],
        ["layers.0.q"],
    ):
        assert targets(*uneven) == {"target_modules": sorted(uneven)}


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, weight: float) -> None:
    member = Member("add", EXPERTS_LARGE / "add", weight)
    with pytest.raises(AdapterError, match="its weight is"):
        compose(Recipe((member,)), tmp_path / "out")
    module = next(iter(read_lora(member.folder).modules))
    plain = Member("add", EXPERTS_LARGE / "add")
    with pytest.raises(AdapterError, match="its weight is"):
        compose(Recipe((plain,), modules={module: (weight,)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_its_type_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="Lower the weights"):
        compose(Recipe((Member("add", EXPERTS_LARGE / "add", 1e39),)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_who_comes_second_tells_what_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of members under other names, whose sum is the same folder."""
    first = Recipe((Member("add", EXPERTS_LARGE / "add", 1.0),))
    real = factors_module.write_lora

    def overtaken(*args: Any, **more: Any) -> None:
        monkeypatch.undo()
        made = compose(first, tmp_path / "out")
        provenance = made.folder / PROVENANCE
        provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {"energy": 0.5}))
        real(*args, **more)

    monkeypatch.setattr("composer.adapters.compose.write_lora", overtaken)
    assert compose(first, tmp_path / "out").energy == 0.5
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_full_disk_and_an_out_that_is_a_file_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused = run(str(EXPERTS_LARGE / "add"), "--out", str(tmp_path / "file"))
    assert (refused.exit_code, refused.exception.__class__) == (1, SystemExit)
    assert "nothing was made below" in refused.output

    def full(*args: object, **more: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("composer.adapters.factors.save_file", full)
    refused = run(str(EXPERTS_LARGE / "add"), "--out", str(tmp_path / "out"))
    assert (refused.exit_code, refused.exception.__class__) == (1, SystemExit)
    assert "No space left" in refused.output
    assert list((tmp_path / "out").iterdir()) == []


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
    save_ternary(tmp_path, tensors, lora)
    got, dtype = load_ternary(tmp_path)
    assert dtype == lora.dtype
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
    assert told["energy"] == told["report"]["energy"] < 1
    kept = f"keeping at least {told['energy']:.1%} of each module's squared norm"
    assert f"{told['folder']}: rank 8, {kept}; was there already" in again.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: {add: heavy}", "members.add: Input should be a valid number"),
        (
            "members:\n  ./add: 0.5\n  ./add: 0.7",
            "yaml:3: the key './add' stands here a second",
        ),
        ("method: cat", "members: Field required"),
        ("- add", "there are no keys with values in it"),
        ("", "there is nothing in it. Write `members:`"),
        ("members: [", "this is not YAML"),
        ("members: [./none]", "'./none': there is no such folder"),
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
