"""`composition:` in experts.yaml: what a sound one becomes, and what is said of the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from composer.adapters.factors import read_lora
from composer.adapters.files import WEIGHTS
from composer.adapters.shelf import Shelf
from composer.eligibility import composed_of
from composer.errors import CatalogError
from composer.registry import RegistryError, catalog_table
from composer.types import Expert
from tests.registry.conftest import Load
from tests.registry.world import adapter_config, adapter_tensors, said, write_adapter, write_base

Compose = Callable[..., None]


@pytest.fixture
def write(registry: Path) -> Compose:
    """Adds an expert `both` with this composition, on the server `local`."""

    def run(composition: object, *, id_: str = "both", **more: Any) -> None:
        file = yaml.safe_load(registry.read_text())
        file["experts"][id_] = {"server": "local", "composition": composition, **more}
        registry.write_text(yaml.safe_dump(file, sort_keys=False))

    return run


def composed(load: Load, id_: str = "both", **more: Any) -> Expert:
    return load(**more).catalog.experts[id_]


def test_it_is_the_members_weighted_sum_and_says_so(
    load: Load, write: Compose, registry: Path
) -> None:
    write({"members": {"fox": 0.7, "owl": 0.3}})
    both = composed(load)
    assert both.adapter is not None
    assert both.adapter.composed is not None
    shares = [(one.name, one.weight) for one in both.adapter.composed.members]
    assert (both.adapter.composed.method, shares) == ("cat", [("fox", 0.7), ("owl", 0.3)])
    assert both.adapter.path.parent == registry.parent.resolve() / ".compositions"
    made = read_lora(both.adapter.path)
    assert made.digest == both.adapter.digest
    fox, owl = (
        read_lora(registry.parent / place / name).modules
        for place, name in (("adapters", "fox"), ("scanned", "owl"))
    )
    for module, factors in made.modules.items():
        want = 0.7 * fox[module].delta() + 0.3 * owl[module].delta()
        assert (factors.delta() - want).abs().max() < 1e-5


def test_it_has_what_its_members_have_together_where_it_says_nothing(
    load: Load, write: Compose
) -> None:
    write({"members": ["fox", "owl"]})
    both = composed(load)
    assert both.description == "writes like a fox writes like a owl"
    assert both.skills == ("fox writing", "owl writing")
    assert both.examples == ("write this like a fox", "write this like a owl")
    write({"members": ["fox", "owl"]}, skills=["zoology"], examples=["tell of both"])
    both = composed(load)
    assert both.skills == ("zoology",)
    assert both.examples == ("tell of both",)


def test_folders_add_what_their_cards_say(load: Load, write: Compose, registry: Path) -> None:
    write({"members": {"./adapters/fox": 0.5, "./scanned/owl": 0.5}})
    card = registry.parent / "adapters" / "fox" / "README.md"
    written = card.read_text() if card.is_file() else None
    text = "---\ncomposer:\n  description: barks\n  examples_from: more.txt\n---\n"
    card.write_text(text)
    (card.parent / "more.txt").write_text("bark twice\n")
    both = composed(load)
    assert both.description == "barks writes like a owl"
    assert both.skills == ("owl writing",)
    assert both.examples == ("bark twice", "write this like a owl")
    card.write_text(text.replace("description", "descripton"))
    with pytest.raises(CatalogError) as refused:
        load()
    assert any(p.file == str(card) and p.line == 3 for p in refused.value.problems)
    if written is None:
        card.unlink()
        assert composed(load).examples == ("write this like a owl",)


def test_the_second_load_builds_nothing_and_another_cache_everything(
    load: Load, write: Compose, tmp_path: Path
) -> None:
    write({"members": {"fox": 0.7, "owl": 0.3}})
    first = composed(load)
    assert first.adapter is not None
    weights = first.adapter.path / WEIGHTS
    stamp = weights.stat().st_mtime_ns
    assert composed(load) == first
    assert weights.stat().st_mtime_ns == stamp
    elsewhere = composed(load, compositions=tmp_path / "cache").adapter
    assert elsewhere is not None
    assert elsewhere.digest == first.adapter.digest
    assert elsewhere.path.parent == (tmp_path / "cache").resolve()


def test_who_serves_from_compositions_holds_them_and_who_only_looks_does_not(
    load: Load, write: Compose, tmp_path: Path
) -> None:
    serving, other = (Shelf(tmp_path / "cache", 0) for _ in range(2))
    write({"members": {"fox": 0.7, "owl": 0.3}})
    composed(load, compositions=tmp_path / "cache")
    assert other.trim() == 1
    adapter = composed(load, compositions=serving).adapter
    assert adapter is not None
    assert other.trim() == 0
    assert serving.keep([adapter.path]) == 0
    serving.close()
    assert other.trim() == 1


def test_what_a_crash_left_half_written_is_made_anew(load: Load, write: Compose) -> None:
    write({"members": ["fox", "owl"]})
    first = composed(load).adapter
    assert first is not None
    (first.path / WEIGHTS).write_bytes(b"")
    assert composed(load).adapter == first


def test_one_that_stands_there_as_an_adapter_is_still_made_of_its_members(
    load: Load, write: Compose, registry: Path
) -> None:
    write({"members": {"fox": 0.7, "owl": 0.3}})
    made = composed(load).adapter
    assert made is not None
    own = registry.parent / "adapters" / "own"
    shutil.copytree(made.path, own)
    file = yaml.safe_load(registry.read_text())
    file["experts"]["own"] = {"server": "local", "adapter": "./adapters/own", "description": "own"}
    registry.write_text(yaml.safe_dump(file, sort_keys=False))
    loaded = load().catalog
    adapter = loaded.experts["own"].adapter
    assert adapter is not None
    assert adapter.composed == made.composed
    assert "own" in composed_of(frozenset({"fox"}), loaded)

    trained = registry.parent / "adapters" / "fox"
    shutil.copyfile(trained / WEIGHTS, own / WEIGHTS)
    shutil.copyfile(trained / "adapter_config.json", own / "adapter_config.json")
    adapter = load().catalog.experts["own"].adapter
    assert adapter is not None
    assert adapter.composed is None  # what is told is told of another


def test_reading_a_registry_imports_no_torch() -> None:
    code = "import sys, composer.registry; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_member_that_changes_makes_another_adapter(
    load: Load, write: Compose, registry: Path
) -> None:
    write({"members": ["fox", "owl"]})
    before = load()
    write_adapter(registry.parent / "adapters" / "fox", seed=7)
    after = load()
    one, other = (x.catalog.experts["both"].adapter for x in (before, after))
    assert one is not None
    assert other is not None
    assert one.digest != other.digest
    assert before.catalog.digest != after.catalog.digest
    assert registry.parent / "adapters" / "fox" in before.watched
    assert other.path in {path.resolve() for path in after.watched}


def test_a_recipe_of_its_own_with_folders_and_weights_by_module(
    load: Load, write: Compose, registry: Path
) -> None:
    folder = registry.parent / "recipes"
    folder.mkdir()
    modules = {"model.layers.0.self_attn.q_proj": [2.0, 0.0]}
    recipe = {"members": {"../adapters/fox": 1, "owl": 0.5}, "modules": modules}
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    write("./recipes/mine.yaml")
    loaded = load()
    both = loaded.catalog.experts["both"]
    assert folder / "mine.yaml" in loaded.watched
    assert both.examples == ("write this like a fox", "write this like a owl")
    assert both.adapter is not None
    made = read_lora(both.adapter.path).modules
    fox = read_lora(registry.parent / "adapters" / "fox").modules
    (module,) = modules
    assert (made[module].delta() - 2 * fox[module].delta()).abs().max() < 1e-5

    (folder / "mine.yaml").write_text("members: {fox: much}\n")
    with pytest.raises(CatalogError) as refused:
        load()
    assert [(p.file, p.line) for p in refused.value.problems] == [(str(folder / "mine.yaml"), 1)]


def test_members_may_be_compositions(load: Load, write: Compose, registry: Path) -> None:
    write({"members": {"half": 1.0, "fox": -0.5}}, id_="owlish")
    write({"members": {"fox": 0.5, "owl": 0.5}}, id_="half")
    made = composed(load, "owlish").adapter
    assert made is not None
    owl = read_lora(registry.parent / "scanned" / "owl").modules
    for module, factors in read_lora(made.path).modules.items():
        assert (factors.delta() - 0.5 * owl[module].delta()).abs().max() < 1e-5


def test_what_is_general_is_subtracted(load: Load, write: Compose, registry: Path) -> None:
    write({"members": {"fox": 2.0}, "subtract": "./scanned/owl"})
    made = composed(load).adapter
    assert made is not None
    fox = read_lora(registry.parent / "adapters" / "fox").modules
    owl = read_lora(registry.parent / "scanned" / "owl").modules
    for module, factors in read_lora(made.path).modules.items():
        want = 2 * (fox[module].delta() - owl[module].delta())
        assert (factors.delta() - want).abs().max() < 1e-5
    catalog = load().catalog
    fox_, owl_ = (catalog.experts[name].adapter for name in ("fox", "owl"))
    assert fox_ is not None
    assert owl_ is not None
    assert made.parts == {fox_.digest, owl_.digest}
    assert composed_of(frozenset({"owl"}), catalog) == {"owl", "both"}
    console = Console(width=200, record=True, file=StringIO())
    console.print(catalog_table(catalog))
    assert "cat of (2 fox), each less ./scanned/owl" in console.export_text()
    write({"members": {"fox": 2.0}, "subtract": "owls"})
    with pytest.raises(CatalogError) as refused:
        load()
    assert [p.path for p in refused.value.problems] == ["experts.both.composition.subtract"]


def test_a_ring_of_compositions_is_refused(load: Load, write: Compose) -> None:
    write({"members": ["one", "fox"]}, id_="two")
    write({"members": ["two"]}, id_="one")
    with pytest.raises(CatalogError) as refused:
        load()
    assert {p.path for p in refused.value.problems} == {
        "experts.one.composition",
        "experts.two.composition",
    }
    assert "it is composed of itself" in str(refused.value)


def test_its_rank_fits_the_server_and_what_was_cut_is_told(
    load: Load, write: Compose, registry: Path
) -> None:
    write({"members": ["fox", "owl"]})
    assert composed(load).adapter.rank == 8  # type: ignore[union-attr]  # vLLM's least above 4
    text = registry.read_text().replace(
        "engine: embedded", "engine: embedded\n    max_lora_rank: 3"
    )
    registry.write_text(text)
    both = composed(load)
    assert both.adapter is not None
    assert both.adapter.rank == 3
    assert both.adapter.composed is not None
    assert 0.5 < both.adapter.composed.energy < 1
    table = catalog_table(load().catalog)
    cells = "".join(str(cell) for cell in table.columns[2].cells)
    assert "cat of 0.5 fox + 0.5 owl, keeping" in cells


def test_where_a_server_sees_it(load: Load, write: Compose) -> None:
    write({"members": ["fox"]}, server_path="/mnt/composed")
    adapter = composed(load).adapter
    assert adapter is not None
    assert adapter.server_path == f"/mnt/composed/{adapter.path.name}"


def test_a_pinned_digest_is_that_of_what_is_made(load: Load, write: Compose) -> None:
    write({"members": ["fox"]}, digest=f"sha256:{'0' * 64}")
    with pytest.raises(CatalogError, match="its digest is"):
        load()


@pytest.mark.parametrize(
    ("composition", "at", "message"),
    [
        ({"members": ["fix"]}, ".members.fix", "no expert is called 'fix'. Did you mean `fox`?"),
        ({"members": ["./none"]}, ".members../none", "there is no such folder"),
        ({"members": ["../.."]}, ".members.../..", "outside the allowed folders"),
        ({"members": ["general"]}, ".members.general", "alone, without an adapter"),
        ({"members": []}, ".members", "it is empty"),
        ({"members": ["fox", "fox"]}, "", "named twice"),
        ({"members": {"fox": "1"}}, ".members", "number"),
        ({"members": ["fox"], "method": "soup"}, ".method", "there is no method 'soup'"),
        ({"members": ["fox"], "method": "svd", "settings": {"r": 2}}, ".settings", "rank"),
        ({"members": ["fox"], "modules": {"x": [1, 2]}}, "", "Give one for each"),
        ({"members": {"fox": 0.0}}, "", "every weight is 0"),
        ({"members": ["fox"], "wieghts": [1]}, ".wieghts", "unknown key"),
        ({}, ".members", "it is missing"),
        (3, "", "it should have keys below it"),
        ("./none.yaml", "", "it cannot be read"),
    ],
)
def test_what_is_wrong_is_told_at_its_place(
    load: Load, write: Compose, composition: object, at: str, message: str
) -> None:
    write(composition)
    with pytest.raises(RegistryError) as refused:
        load()
    problems = refused.value.problems
    assert all(p.path.startswith("experts.both.composition") for p in problems), problems
    assert any(
        p.path.startswith(f"experts.both.composition{at}") and message in str(p) for p in problems
    ), problems


def test_either_an_adapter_or_a_composition(load: Load, write: Compose) -> None:
    write({"members": ["owl"]}, adapter="./adapters/fox")
    with pytest.raises(CatalogError, match="either an `adapter` or a `composition`"):
        load()


def test_a_member_that_is_wrong_itself_is_told_once(
    load: Load, write: Compose, registry: Path
) -> None:
    write({"members": ["fox", "owl"]})
    os.remove(registry.parent / "adapters" / "fox" / WEIGHTS)
    with pytest.raises(CatalogError) as refused:
        load()
    assert [problem.path for problem in refused.value.problems] == ["experts.fox.adapter"]


def test_a_member_of_another_base_is_refused(load: Load, write: Compose, registry: Path) -> None:
    write_base(registry.parent / "bases" / "wide", name="acme/wide", width=16)
    config = adapter_config(base_model_name_or_path="acme/wide")
    write_adapter(registry.parent / "adapters" / "bear", config, adapter_tensors(width=16))
    file = yaml.safe_load(registry.read_text())
    file["servers"]["other"] = {"engine": "embedded", "model": "./bases/wide"}
    file["experts"]["bear"] = {"server": "other", "adapter": "./adapters/bear"}
    registry.write_text(yaml.safe_dump(file, sort_keys=False))
    write({"members": ["fox", "bear"]})
    with pytest.raises(CatalogError) as refused:
        load()
    assert said(refused) == [
        "experts.both.composition.members.bear: 'bear' is an adapter of another base model than "
        "that of server 'local'"
    ]


def test_one_at_run_time_is_left_out_with_its_member(load: Load, write: Compose) -> None:
    runtime = [
        {"id": "wolf", "server": "local", "adapter": "./adapters/wolf"},
        {"id": "pack", "server": "local", "composition": {"members": ["wolf", "fox"]}},
        {"id": "pair", "server": "local", "composition": {"members": ["fox", "owl"]}},
    ]
    loaded = load(runtime=runtime, may_skip=["wolf", "pack", "pair"])
    assert loaded.skipped.keys() == {"wolf", "pack"}
    assert "pair" in loaded.catalog.experts
    assert "no expert is called 'wolf'" in str(loaded.skipped["pack"][0])


def test_the_provenance_holds_no_more_than_the_recipe(load: Load, write: Compose) -> None:
    write({"members": {"fox": 0.25, "owl": 0.75}, "method": "svd", "settings": {"rank": 2}})
    adapter = composed(load).adapter
    assert adapter is not None
    told = json.loads((adapter.path / "composition.json").read_text())
    assert told["adapter"] == adapter.digest
    assert [(m["name"], m["weight"]) for m in told["members"]] == [("fox", 0.25), ("owl", 0.75)]
