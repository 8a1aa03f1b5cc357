"""Gated experts in experts.yaml: what is checked before an engine sees them."""

# ruff: noqa: E501  (messages are one line each, as they are printed)

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from composer import build
from composer.adapters.cache import FileCache
from composer.adapters.factors import read_lora
from composer.adapters.files import CARD
from composer.adapters.gates.files import MANIFEST, TENSORS, write_gate
from composer.adapters.gates.untrained import arrow
from composer.adapters.gates.vllm_folder import write_vllm_folder
from composer.adapters.lora_config import AdapterFeature
from composer.build import ENGINES
from composer.eligibility import composed_of
from composer.errors import CatalogError
from composer.registry import Families, StrategyFamily, load_catalog
from composer.registry.table import catalog_table
from composer.types import Catalog
from examples.tiny.experts import base_folder, expert_folder
from tests.gated import EVERYTHING, write_gated
from tests.registry.world import CARD as CARD_TEXT
from tests.registry.world import FAMILIES, RABBIT, adapter_tensors, write_adapter, write_world
from tests.vllm_gates import BASE, folder_of, tiny_gate

MEMBERS = ("fox", "owl")
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path)


class MixingSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str | None = None


def gated(folder: Path, name: str = "both", **settings: Any) -> Path:
    members = {"fox": folder / "adapters" / "fox", "owl": folder / "scanned" / "owl"}
    write_gated(folder / "gates" / name, members, **settings)
    return folder / "gates" / name


def families(features: Collection[AdapterFeature] = EVERYTHING) -> Families:
    local = replace(FAMILIES.engines["embedded"], adapter_features=frozenset(features))
    mixing = StrategyFamily(MixingSettings, weighs=lambda settings: settings.gate)
    return replace(
        FAMILIES,
        engines={**FAMILIES.engines, "embedded": local},
        strategies={**FAMILIES.strategies, "mixing": mixing},
    )


def load(file: Path, features: Collection[AdapterFeature] = EVERYTHING, **keys: Any) -> Catalog:
    """With an expert `mixed` that has these keys."""
    data = yaml.safe_load(file.read_text())
    data["experts"]["mixed"] = {"server": "local", "description": "both", **keys}
    file.write_text(yaml.safe_dump(data))
    cache = FileCache()
    return load_catalog(file, families(features), version=1, cache=cache).catalog


def test_a_gate_is_an_expert_like_any_other(world: Path) -> None:
    gated(world.parent)
    catalog = load(world, gate="./gates/both")
    adapter = catalog.experts["mixed"].adapter
    assert adapter is not None
    assert adapter.gate is not None
    own = [catalog.experts[name].adapter for name in MEMBERS]
    assert adapter.gate.members == MEMBERS
    assert adapter.gate.digests == tuple(one.digest for one in own if one is not None)
    assert (adapter.rank, adapter.gate.kind, adapter.gate.passes) == (4, "arrow", 1)
    assert "mixed" in catalog.policies["auto"].experts

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(catalog_table(catalog))
    shown = " ".join(console.export_text().split())
    assert "arrow gate of fox (" in shown
    assert adapter.digest[:20] in shown


def test_who_was_subtracted_from_a_gate_is_part_of_it(world: Path) -> None:
    folder = world.parent / "gates" / "less"
    folder.mkdir(parents=True)
    fox = read_lora(world.parent / "adapters" / "fox")
    write_gate(folder, arrow({"fox": fox}, general=read_lora(world.parent / "scanned" / "owl")))
    catalog = load(world, gate="./gates/less")
    assert composed_of(frozenset({"owl"}), catalog) == {"owl", "mixed"}
    adapter = catalog.experts["mixed"].adapter
    assert adapter is not None
    assert len(adapter.parts) == 2


def test_a_gate_counts_by_its_content_and_may_be_pinned(world: Path) -> None:
    folder = gated(world.parent)
    digest = json.loads((folder / MANIFEST).read_text())["digest"]
    first = load(world, gate="./gates/both", digest=digest)
    gated(world.parent, "other", seed=3)
    assert load(world, gate="./gates/other").digest != first.digest
    with pytest.raises(CatalogError, match="not the pinned sha256:0"):
        load(world, gate="./gates/both", digest=DIGEST)


def test_it_comes_at_run_time_too(world: Path) -> None:
    gated(world.parent)
    rabbit = {key: value for key, value in RABBIT.items() if key != "adapter"}
    loaded = load_catalog(
        world, families(), runtime=[{**rabbit, "gate": "./gates/both"}], version=1
    )
    adapter = loaded.catalog.experts["rabbit"].adapter
    assert adapter is not None
    assert adapter.gate is not None
    assert world.parent / "gates" / "both" in loaded.watched


def test_a_scanned_folder_may_hold_gates_beside_adapters(world: Path) -> None:
    folder = gated(world.parent)
    folder.rename(world.parent / "scanned" / "both")
    with pytest.raises(CatalogError, match=r"scanned/both/README\.md has no `composer:` block"):
        load_catalog(world, families(), version=1)
    (world.parent / "scanned" / "both" / CARD).write_text(CARD_TEXT.format(name="both"))
    loaded = load_catalog(world, families(), version=1)
    adapter = loaded.catalog.experts["both"].adapter
    assert adapter is not None
    assert adapter.gate is not None
    assert adapter.gate.members == MEMBERS
    assert loaded.catalog.experts["owl"].adapter is not None
    with pytest.raises(CatalogError, match="adapters_from") as refused:
        load_catalog(world, families(()), version=1)
    assert "composer compose --gate" in str(refused.value)


def test_a_gate_that_is_named_as_an_adapter_says_how_to_name_it(world: Path) -> None:
    gated(world.parent)
    with pytest.raises(CatalogError, match="An expert names it by `gate`") as refused:
        load(world, adapter="./gates/both")
    assert "it holds a gate" in str(refused.value)


def other_base(folder: Path) -> dict[str, Any]:
    path = folder / "adapters" / "far"
    write_adapter(path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "acme/other"
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_gated(folder / "gates" / "g", {"far": path})
    return {"gate": "./gates/g"}


def other_width(folder: Path) -> dict[str, Any]:
    write_adapter(folder / "adapters" / "wide", tensors=adapter_tensors(width=16))
    write_gated(folder / "gates" / "g", {"wide": folder / "adapters" / "wide"})
    return {"gate": "./gates/g"}


def outside(folder: Path) -> dict[str, Any]:
    return {"gate": "../elsewhere"}


def missing(folder: Path) -> dict[str, Any]:
    (gated(folder) / TENSORS).unlink()
    return {"gate": "./gates/both"}


def damaged(folder: Path) -> dict[str, Any]:
    file = gated(folder) / TENSORS
    file.write_bytes(file.read_bytes()[:-9])
    return {"gate": "./gates/both"}


def two(folder: Path) -> dict[str, Any]:
    gated(folder)
    return {"gate": "./gates/both", "adapter": "./adapters/fox"}


def composed_of_a_gate(folder: Path) -> dict[str, Any]:
    gated(folder)
    data = yaml.safe_load((folder / "experts.yaml").read_text())
    data["experts"]["first"] = {"server": "local", "gate": "./gates/both", "description": "x"}
    (folder / "experts.yaml").write_text(yaml.safe_dump(data))
    return {"composition": {"members": {"first": 1.0}}}


def features(folder: Path) -> dict[str, Any]:
    tensors = {"features.0.weight": torch.ones(5, 8)}
    gated(folder, passes=2, kind="xlora", seed=1, normalise="none", width=6, tensors=tensors)
    return {"gate": "./gates/both"}


def hidden(folder: Path) -> dict[str, Any]:
    tensors = {"features.0.weight": torch.ones(5, 12)}
    gated(folder, passes=2, kind="xlora", seed=1, normalise="none", width=5, tensors=tensors)
    return {"gate": "./gates/both"}


def hidden_at_once(folder: Path) -> dict[str, Any]:
    gated(folder, passes=2, kind="xlora", seed=1, normalise="none", width=12)
    return {"gate": "./gates/both"}


def prior(folder: Path) -> dict[str, Any]:
    gated(folder, per_request=True, kind="glider", tensors={"prior.rows": torch.ones(3, 4)})
    return {"gate": "./gates/both"}


def mounted(folder: Path) -> dict[str, Any]:
    gated(folder)
    return {"gate": "./gates/both", "server_path": "/mnt/both"}


REFUSED = {
    other_base: "its members were trained on 'acme/other', the server's model is './bases/tiny'",
    other_width: "model.layers.0.self_attn.q_proj: it is made for a linear layer of (16, 16), the base's is (8, 8)",
    outside: "outside the allowed folders",
    missing: "gate.safetensors is missing",
    damaged: "cannot be read",
    two: "an expert has a `gate`, which holds its members, or adapter",
    composed_of_a_gate: "'first' is a gate, which weighs its members anew at every token",
    features: "its classifier gives 5 features, and the layers read 6",
    hidden: "it reads a hidden state of 12 numbers, the base's has 8",
    hidden_at_once: "it reads a hidden state of 12 numbers, the base's has 8",
    prior: "the tensor prior.rows must hold one row for each member",
    mounted: "it is an adapter's folder, but the expert has none",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_a_wrong_gate_is_refused(world: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    keys = write(world.parent)
    with pytest.raises(CatalogError) as caught:
        load(world, **keys)
    problem = caught.value.problems[0]
    assert REFUSED[write] in problem.message  # type: ignore[index]
    assert problem.path.startswith("experts.mixed")


@pytest.mark.parametrize(
    ("able", "settings", "told"),
    [
        ((), {}, "this server's engine cannot mix adapters inside the model"),
        (("gate",), {"passes": 2}, "arrow reads a first pass of the whole model"),
        (("gate",), {"per_request": True, "tensors": {"prior.rows": torch.ones(2, 4)}}, "reads the request's text"),
    ],
)  # fmt: skip
def test_an_engine_is_asked_for_what_the_gate_needs(
    world: Path, able: Collection[AdapterFeature], settings: dict[str, Any], told: str
) -> None:
    gated(world.parent, **settings)
    with pytest.raises(CatalogError, match=told):
        load(world, able, gate="./gates/both")
    assert load(world, gate="./gates/both").experts["mixed"].adapter is not None


def test_the_engines_that_can_say_so() -> None:
    able = {name: set(e.adapter_features) & set(EVERYTHING) for name, e in ENGINES.items()}
    assert {name for name, features in able.items() if features} == {"embedded"}
    assert able["embedded"] == set(EVERYTHING)


WEIGHERS = {
    "nobody": (
        "nobody",
        ["fox", "owl"],
        "'nobody' is to weigh its experts, and no expert is called",
    ),
    "plain": (
        "fox",
        ["fox", "owl"],
        "'fox' is to weigh its experts, and has no gate whose weights",
    ),
    "few": ("mixed", ["fox"], "1 of them is among the gate's members (fox, owl, by the adapters"),
}


@pytest.mark.parametrize(("weigher", "own", "message"), WEIGHERS.values(), ids=WEIGHERS)
def test_a_strategy_is_weighed_by_a_gate_of_its_experts(
    world: Path, weigher: str, own: list[str], message: str
) -> None:
    gated(world.parent)
    data = yaml.safe_load(world.read_text())
    policy = {"router": {"name": "neighbours"}, "experts": ["fox", "owl"]}
    data["policies"]["sound"] = {**policy, "strategy": {"name": "mixing", "gate": "mixed"}}
    world.write_text(yaml.safe_dump(data))
    load(world, gate="./gates/both")
    data["policies"]["mixing"] = {
        **policy, "experts": own, "strategy": {"name": "mixing", "gate": weigher}
    }  # fmt: skip
    world.write_text(yaml.safe_dump(data))
    with pytest.raises(CatalogError) as caught:
        load(world, gate="./gates/both")
    [problem] = caught.value.problems
    assert message in problem.message
    assert problem.path == "policies.mixing.strategy"
    assert problem.remedy


def with_a_gate_inside(world: Path, folder: Path) -> Path:
    """The world's `local`, but for `there`, a vLLM whose model has a gate of two tiny adapters
    inside; one of them, `apart` and a gate of both stand beside it."""
    data = yaml.safe_load(world.read_text())
    gate = folder_of(tiny_gate("phatgoose", ("reverse", "add")), folder / "gate")
    write_vllm_folder(gate, base_folder("large"), folder / "gated", base_name=BASE)
    data["servers"] = {
        "there": {"engine": "vllm", "model": str(folder / "gated"), "url": "http://127.0.0.1:9"},
        "here": {"engine": "embedded", "model": str(base_folder("large")), "model_name": BASE},
    }
    own = {
        name: {"server": "here", "adapter": str(expert_folder("large", name)), "description": name}
        for name in ("reverse", "add", "plural")
    }
    data["experts"] = own | {"mixed": {"server": "there", "description": "both"}}
    data["policies"] = {
        "auto": {"router": {"name": "neighbours"}, "strategy": {"name": "single"}, "experts": ["*"]}
    }
    for other in ("devices", "adapters_from"):
        data.pop(other, None)
    world.write_text(yaml.safe_dump(data))
    return world


def load_inside(file: Path) -> Catalog:
    roots = (file.parent, expert_folder("large", "add").parent)
    return load_catalog(file, build.families(), version=1, cache=FileCache(), roots=roots).catalog


def test_whoever_excludes_an_adapter_excludes_the_gate_inside_a_servers_model(
    world: Path, tmp_path: Path
) -> None:
    file = with_a_gate_inside(world, tmp_path / "inside")
    catalog = load_inside(file)
    inside = catalog.servers["there"].gate
    assert inside is not None
    assert inside.members == ("reverse", "add")
    assert composed_of(frozenset({"reverse"}), catalog) == {"reverse", "mixed"}
    assert composed_of(frozenset({"plural"}), catalog) == {"plural"}
    assert composed_of(frozenset({"mixed"}), catalog) == {"mixed"}


@pytest.mark.parametrize(
    ("missing", "told"), [("members", "gated_adapter.members"), ("settings", "does not say how")]
)
def test_a_gate_inside_that_cannot_be_read_is_told_with_the_remedy(
    world: Path, tmp_path: Path, missing: str, told: str
) -> None:
    file = with_a_gate_inside(world, tmp_path / "inside")
    config = tmp_path / "inside" / "gated" / "config.json"
    written = json.loads(config.read_text())
    del written["gated_adapter"][missing]
    config.write_text(json.dumps(written))
    with pytest.raises(CatalogError) as refused:
        load_inside(file)
    (problem,) = refused.value.problems
    assert problem.path == "servers.there.model"
    assert told in problem.message
    assert problem.remedy == "Compose the folder again, with this composer."


def test_a_gate_inside_a_model_is_not_passed_over_by_an_engine_that_takes_them_beside_it(
    world: Path, tmp_path: Path
) -> None:
    file = with_a_gate_inside(world, tmp_path / "inside")
    data = yaml.safe_load(file.read_text())
    data["servers"]["there"] = {"engine": "embedded", "model": str(tmp_path / "inside" / "gated")}
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(CatalogError) as refused:
        load_inside(file)
    (problem,) = refused.value.problems
    assert problem.path == "servers.there.model"
    assert "which is for vLLM" in problem.message
