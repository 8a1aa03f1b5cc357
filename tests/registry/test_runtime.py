"""Experts added at run time: joined, refused, told apart from the file, left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composer.registry import RUNTIME, RegistryError
from tests.registry.conftest import Load
from tests.registry.world import DEMANDING, RABBIT, said, write_adapter

Edit = Callable[[str, str], None]


def test_runtime_experts_join_and_match_patterns(load: Load) -> None:
    catalog = load(runtime=[RABBIT]).catalog
    assert catalog.experts["rabbit"].source == "runtime"
    assert catalog.experts["rabbit"].examples == ("write this like a fox",)
    assert catalog.policies["auto"].experts == ("fox", "general", "owl", "rabbit")


def test_a_name_in_both_places_is_an_error(load: Load, registry: Path) -> None:
    with pytest.raises(RegistryError) as refused:
        load(runtime=[{**RABBIT, "id": "fox"}])
    (problem,) = refused.value.problems
    assert str(problem).replace(str(registry.parent), "TMP") == (
        "runtime: experts.fox: expert 'fox' stands in TMP/experts.yaml:10 too. "
        "Remove one of the two: an id is either in the file or added at run time."
    )


def test_a_runtime_experts_card_counts_from_its_own_folder(load: Load, registry: Path) -> None:
    folder = registry.parent / "adapters" / "fox"
    (folder / "more.txt").write_text("bark\n")
    (folder / "README.md").write_text("---\ncomposer:\n  examples_from: more.txt\n---\n")
    assert load(runtime=[RABBIT]).catalog.experts["rabbit"].examples == ("bark",)
    (registry.parent / "own.txt").write_text("hop\n")
    own = {**RABBIT, "examples_from": "own.txt"}
    assert load(runtime=[own]).catalog.experts["rabbit"].examples == ("hop",)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"server": "local"}, "experts: an expert has no `id`"),
        ({**RABBIT, "id": 7}, "experts: the id 7 is no text"),
        ({**RABBIT, "id": "../rabbit"}, "experts.../rabbit: '../rabbit' cannot be an id"),
        ({**RABBIT, "sever": "local"}, "experts.rabbit.sever: unknown key"),
        ({**RABBIT, "server": "loca"}, "experts.rabbit.server: no server is called 'loca'"),
        (
            {**RABBIT, "adapter": "/etc"},
            "experts.rabbit.adapter: /etc: it lies outside the allowed folders (TMP)",
        ),
        (
            {**RABBIT, "adapter": "adapters/\0"},
            "experts.rabbit.adapter: TMP/adapters/�: there is no such folder",
        ),
        (
            {**RABBIT, "examples_from": "../../../../../../../../etc/passwd"},
            "experts.rabbit.examples_from: TMP/../../../../../../../../etc/passwd: it leads to "
            "/etc/passwd, outside the allowed folders (TMP)",
        ),
    ],
)
def test_a_wrong_runtime_expert_is_refused_like_one_in_the_file(
    spec: dict[str, Any], says: str, load: Load, registry: Path
) -> None:
    with pytest.raises(RegistryError) as refused:
        load(runtime=[spec])
    assert [line.replace(str(registry.parent), "TMP") for line in said(refused)] == [says]
    assert {problem.file for problem in refused.value.problems} == {RUNTIME}


def test_the_specs_own_problems_are_told_apart_from_the_files(load: Load, edit: Edit) -> None:
    edit("top: 3", "tip: 3")
    with pytest.raises(RegistryError) as refused:
        load(runtime=[RABBIT, {**RABBIT, "id": "hare", "server": "loca"}])
    assert len(refused.value.problems) == 2
    assert [p.path for p in refused.value.about("hare")] == ["experts.hare.server"]
    assert refused.value.about("rabbit") == ()


def test_a_card_is_its_experts_business(load: Load, registry: Path) -> None:
    """Its problems stand in a file, which is not the registry file."""
    folder = registry.parent / "adapters" / "hare"
    write_adapter(folder)
    (folder / "README.md").write_text("---\ncomposer: {skils: [hopping]}\n---\n")
    with pytest.raises(RegistryError) as refused:
        load(runtime=[{**RABBIT, "id": "hare", "adapter": "./adapters/hare"}])
    (problem,) = refused.value.about("hare")
    assert problem.file == str(folder / "README.md")


@pytest.mark.parametrize("spec", [{"server": "local"}, {**RABBIT, "id": 7}, {**RABBIT, "id": []}])
def test_a_spec_without_a_usable_id_can_be_asked_about(spec: dict[str, Any], load: Load) -> None:
    with pytest.raises(RegistryError) as refused:
        load(runtime=[spec])
    assert refused.value.about(spec.get("id")) == refused.value.problems


NAMELESS = {"server": "far", "context_window": 100}
"""What no router can find."""


@pytest.mark.parametrize(
    ("spec", "old", "new", "says"),
    [
        (
            {**RABBIT, "id": "auto"},
            *("k: 2", "k: 2"),
            "runtime: experts.auto: 'auto' is a policy too, and a request names either by "
            "`model`. Choose another id.",
        ),
        (
            {**NAMELESS, "id": "hare"},
            *("k: 2", "k: 2"),
            "runtime: experts.hare: the router of policy 'auto' has nothing to find it by. "
            "Add `examples` or a `description`.",
        ),
        (
            {**RABBIT, "id": "hare"},
            *(
                'experts: ["*"]\n',
                'experts: ["*", "!fox", "!owl"]\n    cost_weight: 0.1\n',
            ),
            "runtime: experts.hare.cost: it is missing, and costs count in policy 'auto'. "
            "Add `cost` (0 where it is free).",
        ),
    ],
)
def test_what_an_expert_spoils_for_a_policy_is_the_experts_problem(
    spec: dict[str, Any], old: str, new: str, says: str, load: Load, edit: Edit
) -> None:
    edit(old, new)
    load()
    with pytest.raises(RegistryError) as refused:
        load(runtime=[spec])
    assert [str(problem) for problem in refused.value.about(spec["id"])] == [says]
    assert refused.value.about(spec["id"]) == refused.value.problems
    loaded = load(runtime=[spec], may_skip=[spec["id"]])
    assert loaded.skipped == {spec["id"]: refused.value.problems}
    assert spec["id"] not in loaded.catalog.experts


def test_runtime_experts_that_fail_can_be_left_out(load: Load, registry: Path) -> None:
    gone = {**RABBIT, "id": "gone", "adapter": "./adapters/gone"}
    clash = {**RABBIT, "id": "fox"}
    specs = [gone, RABBIT, clash]
    loaded = load(runtime=specs, may_skip={"gone", "rabbit", "fox"})
    assert loaded.catalog == load(runtime=[RABBIT]).catalog
    assert loaded.catalog.experts["fox"].source == "file"
    assert {
        id_: [p.message.partition(" ")[0] for p in ps] for id_, ps in loaded.skipped.items()
    } == {
        "gone": [f"{registry.parent}/adapters/gone:"],
        "fox": ["expert"],
    }
    assert registry.parent / "adapters/gone" in loaded.watched  # its coming back is noticed


def test_only_those_named_may_be_left_out(load: Load) -> None:
    gone = {**RABBIT, "id": "gone", "adapter": "./adapters/gone"}
    with pytest.raises(RegistryError) as refused:
        load(runtime=[gone, {**gone, "id": "away"}], may_skip={"away"})
    assert refused.value.problems == refused.value.about("gone") != ()


GONE = {**RABBIT, "adapter": "./adapters/gone"}
"""The same, whose adapter is there no more."""

KEY = "keys:\n  ann: {key_env: ANN_KEY, exclude: [rabbit]}\n"


@pytest.mark.parametrize(
    ("old", "new", "where", "until"),
    [
        ("[fox, owl]", "[fox, rabbit]", "twice.experts[1]", "the policy goes without it"),
        ("default_expert: general", "default_expert: rabbit", "auto.default_expert", "has none"),
        ('["*"]\n', '["*"]\n    null_expert: rabbit\n', "auto.null_expert", "has none"),
        ("policies:\n", KEY + "policies:\n", "keys.ann.exclude[0]", "nobody can ask it"),
        ("centroid}", "asking, expert: rabbit}", "twice.router", "without asking it"),
    ],
)
def test_what_the_file_says_of_an_expert_left_out_waits_for_it(
    load: Load,
    edit: Edit,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    where: str,
    until: str,
) -> None:
    monkeypatch.setenv("ANN_KEY", "a")
    edit(old, new)
    whole = load(families=DEMANDING, runtime=[RABBIT])
    assert whole.warnings == ()
    loaded = load(families=DEMANDING, runtime=[GONE], may_skip={"rabbit"})
    assert loaded.skipped.keys() == {"rabbit"}
    (warning,) = loaded.warnings
    assert warning.path.endswith(where)
    assert "the run-time expert 'rabbit' is left out at present" in warning.message
    assert until in warning.message
    assert load(families=DEMANDING, runtime=[RABBIT], may_skip={"rabbit"}).catalog == whole.catalog
    edit("rabbit", "rabit")  # nobody was ever called that
    with pytest.raises(RegistryError) as refused:
        load(families=DEMANDING, runtime=[GONE], may_skip={"rabbit"})
    (problem,) = refused.value.problems
    assert problem.path.endswith(where)
    assert "no expert is called 'rabit'" in problem.message


def test_whom_a_key_excludes_stays_excluded_while_it_is_left_out(load: Load, edit: Edit) -> None:
    edit("policies:\n", KEY + "policies:\n")
    keys = load(families=DEMANDING, runtime=[GONE], may_skip={"rabbit"}).catalog.keys
    assert keys["ann"].exclude == {"rabbit"}


def test_a_policy_of_nobody_but_those_left_out_is_wrong(load: Load, edit: Edit) -> None:
    edit("experts: [fox, owl]", "experts: [rabbit]")
    with pytest.raises(RegistryError) as refused:
        load(families=DEMANDING, runtime=[GONE], may_skip={"rabbit"})
    assert said(refused) == [
        "policies.twice.experts: all its experts are left out at present: 'rabbit'"
    ]


def test_an_expert_that_a_router_refuses_is_left_out_too(load: Load, edit: Edit) -> None:
    """As one that a trained router knows nothing of, where the file's experts fit it."""
    edit("{name: neighbours, top: 3}", "{name: picky}")
    assert load(families=DEMANDING).catalog.policies["auto"].experts == ("fox", "general", "owl")
    with pytest.raises(RegistryError) as refused:
        load(families=DEMANDING, runtime=[RABBIT])
    (problem,) = refused.value.about("rabbit")
    assert str(problem) == (
        "runtime: experts.rabbit: it does not fit policy 'auto': 'rabbit' is not known. "
        "Train again."
    )
    loaded = load(families=DEMANDING, runtime=[RABBIT], may_skip={"rabbit"})
    assert loaded.skipped == {"rabbit": (problem,)}
    edit("[fox, owl]", "[fox, owl]\n    cost_weight: 0.1")
    with pytest.raises(RegistryError) as refused:
        load(families=DEMANDING, runtime=[RABBIT])
    assert len(refused.value.about("rabbit")) == 1  # what else is wrong is told beside it
    assert len(refused.value.problems) == 2


def test_an_aim_that_needs_an_expert_left_out_is_not_held_to_meanwhile(
    load: Load, edit: Edit
) -> None:
    edit("{name: centroid}", "{name: whole, of: [fox, rabbit]}\n    quality: 0.9")
    edit("[fox, owl]", "[fox, rabbit]")
    assert load(families=DEMANDING, runtime=[RABBIT]).warnings == ()
    loaded = load(families=DEMANDING, runtime=[GONE], may_skip={"rabbit"})
    told = [warning for warning in loaded.warnings if warning.path == "policies.twice.router"]
    assert len(told) == 1
    assert "requests that aim at a quality or a spend are refused" in told[0].message
