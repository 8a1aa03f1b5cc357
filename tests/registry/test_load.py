"""What a sound registry becomes: experts, servers, policies, digest, watched paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from composer.errors import CatalogError, Problem
from composer.registry import EngineFamily, Families, RegistryError, RouterFamily, catalog_table
from composer.source import parse_yaml
from composer.types import Component, Cost
from tests.registry.conftest import Load
from tests.registry.world import (
    FAMILIES,
    FULL,
    RABBIT,
    REGISTRY,
    EmbeddedSettings,
    NeighboursSettings,
    said,
    write_adapter,
)

Edit = Callable[[str, str], None]


def test_an_expert_takes_what_it_does_not_say_from_its_card(load: Load, edit: Edit) -> None:
    edit("    adapter: ./adapters/fox\n", "    adapter: ./adapters/fox\n    description: mine\n")
    fox = load().catalog.experts["fox"]
    assert fox.description == "mine"
    assert fox.skills == ("fox writing",)
    assert fox.examples == ("write this like a fox",)
    assert fox.adapter is not None
    assert (fox.adapter.rank, fox.adapter.alpha) == (2, 4.0)
    assert fox.adapter.target_modules == ("q_proj", "v_proj")


def test_the_window_is_the_bases_and_logprobs_come_with_the_engine(load: Load) -> None:
    experts = load().catalog.experts
    assert experts["fox"].context_window == 512
    assert experts["fox"].abilities == {"logprobs"}
    assert experts["general"].abilities == {"tools", "json"}


def test_a_price_that_is_not_given_stays_unknown(load: Load) -> None:
    experts = load().catalog.experts
    assert experts["general"].cost == Cost(0.5, 1.5)
    assert experts["fox"].cost is None


def test_policies_hold_their_experts_in_the_catalogs_order(load: Load) -> None:
    policies = load().catalog.policies
    assert policies["auto"].experts == ("fox", "general", "owl")
    assert policies["auto"].router == Component("neighbours", NeighboursSettings(top=3))
    assert policies["twice"].experts == ("fox", "owl")
    assert policies["twice"].k == 2


def test_patterns_leave_experts_out(load: Load, edit: Edit) -> None:
    edit('["*"]', '["*", "!f*"]')
    assert load().catalog.policies["auto"].experts == ("general", "owl")


def test_a_models_path_starts_at_the_file(load: Load, registry: Path) -> None:
    server = load().catalog.servers["local"]
    assert server.settings.model == str(registry.parent.resolve() / "bases" / "tiny")


def test_relative_registry_paths_work_from_any_folder(
    registry: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.registry import load_catalog

    whole = load().catalog
    monkeypatch.chdir(registry.parent.parent)
    relative = Path(registry.parent.name) / registry.name
    found = load_catalog(relative, FAMILIES, version=1).catalog
    assert found == whole


def test_one_server_makes_a_plain_pattern_enough(load: Load, edit: Edit, registry: Path) -> None:
    text = registry.read_text()
    registry.write_text(
        text.partition("  far:")[0]
        + "adapters_from: ./*/owl\npolicies:\n  auto:\n    router: {name: neighbours}\n"
        + "    strategy: {name: single}\n"
    )
    assert list(load().catalog.experts) == ["owl"]


def test_a_prefix_keeps_scanned_ids_apart(load: Load, edit: Edit) -> None:
    edit(
        "  - path: ./scanned/*\n    server: local\n",
        "  - path: ./scanned/*\n    server: local\n"
        "  - path: ./scanned/*\n    server: local\n    id_prefix: second/\n",
    )
    assert list(load().catalog.experts) == ["fox", "general", "owl", "second/owl"]


def test_a_folder_that_holds_no_adapter_yet(load: Load, registry: Path, edit: Edit) -> None:
    (registry.parent / "later").mkdir()
    edit("./scanned/*", "./later/*")
    edit("experts: [fox, owl]", "experts: [fox]")
    loaded = load()
    assert list(loaded.catalog.experts) == ["fox", "general"]
    assert registry.parent / "later" in loaded.watched
    (registry.parent / "later" / "fox").mkdir()
    edit("./later/*", "./later/o*")
    with pytest.raises(CatalogError, match=r"no folder matches \./later/o\*"):
        load()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("more.txt", "first one\n\n  second one \n"),
        ("more.jsonl", '"first one"\n{"text": "second one", "label": 3}\n'),
    ],
)
def test_examples_from_a_file_follow_the_written_ones(
    name: str, content: str, load: Load, edit: Edit, registry: Path
) -> None:
    (registry.parent / name).write_text(content)
    edit(
        "    adapter: ./adapters/fox\n", f"    adapter: ./adapters/fox\n    examples_from: {name}\n"
    )
    loaded = load()
    assert loaded.catalog.experts["fox"].examples == (
        "write this like a fox",
        "first one",
        "second one",
    )
    assert registry.parent / name in loaded.watched


def test_a_cards_example_file_lies_beside_the_card(load: Load, registry: Path) -> None:
    folder = registry.parent / "scanned" / "owl"
    (folder / "more.txt").write_text("hoot\n")
    (folder / "README.md").write_text("---\ncomposer:\n  examples_from: more.txt\n---\n")
    assert load().catalog.experts["owl"].examples == ("hoot",)


def test_examples_outside_the_roots_are_not_read(load: Load, edit: Edit) -> None:
    """Examples show up in answers, so they must not be any file of the machine."""
    edit(
        "    adapter: ./adapters/fox\n",
        "    adapter: ./adapters/fox\n    examples_from: /etc/passwd\n",
    )
    with pytest.raises(CatalogError, match="/etc/passwd: it lies outside the allowed folders"):
        load()


def test_a_pinned_digest_is_compared(load: Load, edit: Edit) -> None:
    adapter = load().catalog.experts["fox"].adapter
    assert adapter is not None
    line = f"    adapter: ./adapters/fox\n    digest: {adapter.digest}\n"
    edit("    adapter: ./adapters/fox\n", line)
    assert load().catalog.experts["fox"].adapter == adapter
    edit(adapter.digest, "sha256:" + "1" * 64)
    with pytest.raises(CatalogError, match="not the pinned sha256:1111"):
        load()


def test_aliases_are_written_out(load: Load, edit: Edit) -> None:
    edit("[tools, json]\n", "&all [tools, json]\n")
    edit("    context_window: 8192\n", "    context_window: 8192\n    skills: *all\n")
    with pytest.raises(CatalogError, match=r"experts.yaml:17: the alias \*all names nothing"):
        load()
    edit("    skills: *all\n", "")
    edit("output_per_1m: 1.5}\n", "output_per_1m: 1.5}\n    skills: *all\n")
    assert load().catalog.experts["general"].skills == ("tools", "json")


# --- engines' limits -----------------------------------------------------------------------


def families(**changes: Any) -> Families:
    engine = EngineFamily(EmbeddedSettings, frozenset({"logprobs"}), **changes)
    return Families(FAMILIES.routers, FAMILIES.strategies, {**FAMILIES.engines, "embedded": engine})


def test_rank_patterns_depend_on_the_engine(load: Load, registry: Path) -> None:
    from tests.registry.world import adapter_config

    config = adapter_config(rank_pattern={"v_proj": 2}, r=2)
    write_adapter(registry.parent / "adapters" / "fox", config)
    with pytest.raises(CatalogError, match="rank_pattern"):
        load()
    able = families(adapter_features=frozenset({"rank_pattern"}))
    assert load(families=able).catalog.experts["fox"].adapter is not None


def test_a_server_may_take_no_adapters(load: Load) -> None:
    def refuse(settings: EmbeddedSettings) -> None:
        raise ValueError(f"takes no adapters for {settings.queue} calls; give it more")

    with pytest.raises(CatalogError) as refused:
        load(families=families(check_adapters=refuse))
    assert said(refused) == [
        "experts.fox.adapter: server 'local' takes no adapters for 64 calls",
        "adapters_from[0].path: server 'local' takes no adapters for 64 calls",
    ]
    assert {problem.remedy for problem in refused.value.problems} == {"Give it more."}


def test_families_must_forbid_unknown_keys() -> None:
    class Loose(BaseModel):
        pass

    with pytest.raises(ValueError, match="the settings of router r accept unknown keys"):
        Families({"r": RouterFamily(Loose)}, {}, {})


# --- digest --------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_key_order(load: Load, registry: Path) -> None:
    before = load().catalog.digest
    data = parse_yaml(REGISTRY, "").data

    def reverse(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reverse(value[key]) for key in reversed(value)}
        return value

    registry.write_text(json.dumps(reverse(data)))  # JSON is YAML
    assert load().catalog.digest == before


def test_the_digest_is_the_same_in_another_process_and_place(load: Load, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from composer.registry import load_catalog;"
        "from tests.registry.world import FAMILIES, write_world;"
        "print(load_catalog(write_world(Path(sys.argv[1])), FAMILIES, version=9).catalog.digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "elsewhere")],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == load().catalog.digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threshold: 0.4", "threshold: 0.5"),
        ("top: 3", "top: 4"),
        ("anything else", "anything"),
        ("url: http://127.0.0.1:9", "url: http://127.0.0.1:8"),
        ("k: 2", "k: 1"),
        ("output_per_1m: 1.5", "output_per_1m: 1.6"),
    ],
)
def test_the_digest_follows_the_content(old: str, new: str, load: Load, edit: Edit) -> None:
    before = load().catalog.digest
    edit(old, new)
    assert load().catalog.digest != before


def test_the_digest_follows_the_adapters_weights(load: Load, registry: Path) -> None:
    before = load().catalog.digest
    write_adapter(registry.parent / "adapters" / "fox", seed=5)
    assert load().catalog.digest != before


# --- watched paths and the table -------------------------------------------------------------


def test_everything_that_was_read_is_watched(load: Load, registry: Path) -> None:
    folder = registry.parent
    assert load().watched.keys() == {
        registry,
        folder / "bases/tiny",
        folder / "adapters/fox",
        folder / "scanned",
        folder / "scanned/owl",
    }


def test_folders_on_the_way_to_a_match_are_watched(load: Load, edit: Edit, registry: Path) -> None:
    (registry.parent / "piles" / "a").mkdir(parents=True)
    edit("./scanned/*", "./piles/*/lora")
    edit("experts: [fox, owl]", "experts: [fox]")
    with pytest.raises(RegistryError) as refused:
        load()
    assert registry.parent / "piles/a/lora" in refused.value.watched
    edit("./piles/*/lora", "./later/*")
    with pytest.raises(RegistryError) as refused:
        load()
    assert registry.parent / "later" in refused.value.watched


def test_a_refusal_tells_what_to_watch_too(load: Load, edit: Edit, registry: Path) -> None:
    edit("./adapters/fox", "./adapters/wolf")
    with pytest.raises(RegistryError) as refused:
        load()
    assert registry.parent / "adapters/wolf" in refused.value.watched
    registry.write_text("{")
    with pytest.raises(RegistryError) as refused:
        load()
    assert refused.value.watched.keys() == {registry}


def test_the_table_names_every_expert_policy_and_digest(load: Load) -> None:
    from rich.console import Console

    catalog = load(runtime=[RABBIT]).catalog
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(catalog_table(catalog))
    text = console.export_text()
    for expert in catalog.experts.values():
        assert expert.id in text
        assert expert.adapter is None or expert.adapter.digest in text
    assert "policy auto (default): neighbours over 4 experts, k 1, single, else general" in text
    assert "added at run time" in text


@pytest.mark.parametrize("model", ["./" + "x" * 300, "x" * 300])
def test_a_model_folder_that_no_file_system_takes_is_refused(
    load: Load, registry: Path, model: str
) -> None:
    registry.write_text(REGISTRY.replace("./bases/tiny", model))
    with pytest.raises(CatalogError, match=r"no such folder|neither a folder"):
        load()


# --- any text at all -------------------------------------------------------------------------

PIECES = [
    *("", ":", "- ", "[", "}", '"', "&a ", "*a", "!!int ", "~", "\t", "\n", "  ", "|", "%", "<<: "),
    *("-1", "1e999", ".nan", "true", "{}", "x" * 300, "hub: a/b", "experts", "../", "\0", "é"),
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_raises_anything_but_catalog_errors(
    data: st.DataObject, load: Load, registry: Path
) -> None:
    text = data.draw(st.sampled_from([REGISTRY, FULL]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text = text[:start] + data.draw(st.sampled_from(PIECES)) + text[end:]
    registry.write_text(text)
    check(load)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_value_in_any_place_raises_anything_but_catalog_errors(
    data: st.DataObject, load: Load, registry: Path
) -> None:
    tree = parse_yaml(data.draw(st.sampled_from([REGISTRY, FULL])), "").data
    at = tree
    while True:
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at)))))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
        else:
            break
    at[key] = data.draw(JSON)
    registry.write_text(json.dumps(tree), encoding="utf-8")
    check(load)


def check(load: Load) -> None:
    problems: Sequence[Problem] = ()
    try:
        load()
    except CatalogError as error:
        problems = error.problems
        assert str(error)  # noqa: PT017  (either outcome is right)
    assert all(problem.file and problem.message and problem.remedy for problem in problems)


@pytest.mark.slow
def test_ten_thousand_experts(registry: Path, load: Load) -> None:
    """Shows that it works at that size; how long it takes is for a benchmark."""
    entry = "  e{0}:\n    server: far\n    context_window: 4096\n    examples:\n{1}"
    rows = "".join(f"      - please do it the way of {row}\n" for row in range(20))
    head, _, tail = REGISTRY.partition("experts:\n")
    many = "".join(entry.format(number, rows) for number in range(10_000))
    registry.write_text(f"{head}experts:\n{many}{tail}")
    catalog = load().catalog
    assert len(catalog.policies["auto"].experts) == 10_003
