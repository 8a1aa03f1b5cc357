"""Devices, placements, paths of engines' settings, and what servers in containers see."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from composer.registry import (
    EngineFamily,
    Families,
    RegistryError,
    catalog_table,
    load_catalog,
)
from composer.registry.specs import PlacementSpec
from composer.types import SAFE_PARAMETERS, Device, Placement
from tests.registry.conftest import Load
from tests.registry.world import (
    DEVICES,
    FAMILIES,
    FULL,
    PLACED,
    RABBIT,
    REGISTRY,
    Strict,
    said,
    write_world,
)

Edit = Callable[[str, str], None]


@pytest.fixture
def full(registry: Path) -> Path:
    registry.write_text(FULL)
    return registry


@pytest.mark.usefixtures("full")
def test_devices_and_what_stands_on_them(load: Load) -> None:
    catalog = load().catalog
    assert catalog.devices == {"gpu": Device("gpu", 24.0), "spare": Device("spare", 8.5)}
    placement = Placement("gpu", 16.0, start_s=40.0, sleep_level=1)
    assert catalog.servers["far"].placement == placement
    assert catalog.servers["local"].placement is None


def test_what_a_placement_leaves_out_is_as_the_type_has_it() -> None:
    spec = PlacementSpec(device="gpu", memory_gb=1.0)
    assert Placement(**spec.model_dump()) == Placement("gpu", 1.0)


def test_what_this_machine_lacks_is_a_warning(load: Load, full: Path) -> None:
    """The file is right; it may be served elsewhere."""
    (warning,) = load().warnings
    assert (warning.path, warning.line) == ("servers.far.launch.python", 12)
    program = full.parent / "venv" / "bin" / "python"
    assert warning.message == f"there is no program {program} on this machine"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    assert load().warnings == ()


def test_a_key_that_is_not_set_is_a_warning(
    load: Load, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyed(Strict):
        url: str
        api_key_env: str | None = None

    engine = EngineFamily(Keyed, frozenset({"tools", "json"}), model_field=None)
    families = Families(
        FAMILIES.routers, FAMILIES.strategies, {**FAMILIES.engines, "remote": engine}
    )
    assert load(families=families).warnings == ()
    edit("    url: http://127.0.0.1:9\n", "    url: http://127.0.0.1:9\n    api_key_env: FAR_KEY\n")
    monkeypatch.delenv("FAR_KEY", raising=False)
    (warning,) = load(families=families).warnings
    assert (warning.path, warning.line) == ("servers.far.api_key_env", 9)
    assert warning.message == "the environment variable 'FAR_KEY' is not set"
    monkeypatch.setenv("FAR_KEY", "secret")
    assert load(families=families).warnings == ()


def test_without_devices_there_are_none(load: Load) -> None:
    assert load().catalog.devices == {}


# --- paths in settings -----------------------------------------------------------------------


@pytest.mark.usefixtures("full")
def test_paths_of_settings_start_at_the_file(load: Load, registry: Path) -> None:
    launch = load().catalog.servers["far"].settings.launch
    assert launch.python == str(registry.parent / "venv" / "bin" / "python")
    assert launch.log == str(registry.parent / "logs" / "far.log")


@pytest.mark.usefixtures("full")
def test_an_interpreter_that_is_a_link_is_not_followed(load: Load, registry: Path) -> None:
    """The python of a virtual environment is one: followed, it would be the system's."""
    (registry.parent / "venv" / "bin").mkdir(parents=True)
    (registry.parent / "venv" / "bin" / "python").symlink_to("/usr/bin/env")
    assert load().catalog.servers["far"].settings.launch.python.endswith("/venv/bin/python")


@pytest.mark.parametrize(
    ("field", "old", "written", "found"),
    [
        ("python", "./venv/bin/python", "python3", "python3"),
        ("python", "./venv/bin/python", "/opt/vllm/bin/python", "/opt/vllm/bin/python"),
        ("python", "./venv/bin/python", "~/vllm/bin/python", "/home/ann/vllm/bin/python"),
        ("log", "logs/far.log", "far.log", "HERE/far.log"),
        ("log", "logs/far.log", "/var/log/far.log", "/var/log/far.log"),
    ],
)
@pytest.mark.usefixtures("full")
def test_other_paths_of_settings(
    field: str,
    old: str,
    written: str,
    found: str,
    load: Load,
    edit: Edit,
    registry: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    edit(old, written)
    launch = load().catalog.servers["far"].settings.launch
    assert getattr(launch, field) == found.replace("HERE", str(registry.parent))


@pytest.mark.parametrize(
    "launch", ["launch: 3", "launch: {python: 3}", "launch: [a/b]", "launch: {log: {a: b/c}}"]
)
@pytest.mark.usefixtures("full")
def test_a_path_of_another_kind_is_refused_as_such(launch: str, load: Load, edit: Edit) -> None:
    edit("launch: {python: ./venv/bin/python, log: logs/far.log}", launch)
    with pytest.raises(RegistryError) as refused:
        load()
    [problem] = said(refused)
    assert problem.startswith("servers.far.launch")


def test_an_engine_may_not_have_a_key_of_the_registrys_own() -> None:
    class Greedy(Strict):
        placement: str = ""

    with pytest.raises(ValueError, match="engine greedy have 'placement', a key that is the reg"):
        Families({}, {}, {"greedy": EngineFamily(Greedy)})


# --- what a server sees ----------------------------------------------------------------------


@pytest.mark.usefixtures("full")
def test_a_scanned_adapter_as_its_server_sees_it(load: Load) -> None:
    experts = load().catalog.experts
    assert experts["owl"].adapter is not None
    assert experts["owl"].adapter.server_path == "/mnt/owls/owl"
    assert experts["fox"].adapter is not None
    assert experts["fox"].adapter.server_path is None


@pytest.mark.usefixtures("full")
def test_what_comes_before_the_first_star_is_replaced(load: Load, edit: Edit) -> None:
    edit("./scanned/*", "./*/owl")
    edit("/mnt/owls", "/mnt/all")
    owl = load().catalog.experts["owl"].adapter
    assert owl is not None
    assert owl.server_path == "/mnt/all/scanned/owl"


@pytest.mark.usefixtures("full")
def test_an_expert_says_itself_where_its_adapter_is_seen(load: Load, edit: Edit) -> None:
    edit("adapter: ./adapters/fox", "adapter: ./adapters/fox\n    server_path: /data/fox")
    fox = load().catalog.experts["fox"].adapter
    assert fox is not None
    assert fox.server_path == "/data/fox"


@pytest.mark.usefixtures("full")
def test_a_folder_that_is_mounted_counts_for_run_time_experts_too(load: Load) -> None:
    spec = {**RABBIT, "adapter": "./adapters/../scanned/owl"}
    rabbit = load(runtime=[spec]).catalog.experts["rabbit"].adapter
    assert rabbit is not None
    assert rabbit.server_path == "/mnt/owls/owl"


@pytest.mark.usefixtures("full")
def test_another_servers_mount_does_not_count(load: Load, edit: Edit, registry: Path) -> None:
    second = "  second:\n    engine: embedded\n    model: ./bases/tiny\n  far:\n"
    edit("  far:\n", second)
    spec = {**RABBIT, "adapter": "./scanned/owl", "server": "second"}
    rabbit = load(runtime=[spec]).catalog.experts["rabbit"].adapter
    assert rabbit is not None
    assert rabbit.server_path is None


def test_a_run_time_expert_cannot_say_what_a_server_loads(load: Load) -> None:
    """An API's caller would else have the server read any folder of its machine."""
    with pytest.raises(RegistryError) as refused:
        load(runtime=[{**RABBIT, "server_path": "/etc"}])
    assert said(refused) == [
        "experts.rabbit.server_path: an expert that is added at run time cannot say it"
    ]


# --- parameters, waits, tolerance ------------------------------------------------------------


def test_what_a_policy_allows_by_default(load: Load) -> None:
    policy = load().catalog.policies["twice"]
    assert policy.parameters == SAFE_PARAMETERS
    assert (policy.max_wait_s, policy.tolerance, policy.stay) == (None, 0.0, 0.0)


@pytest.mark.parametrize(
    ("written", "allowed"),
    [
        ("[top_k]", {"top_k"}),
        ("[]", set()),
        ("[+cache_salt]", SAFE_PARAMETERS | {"cache_salt"}),
        ("[top_k, cache_salt]", {"top_k", "cache_salt"}),
    ],
)
@pytest.mark.usefixtures("full")
def test_names_replace_the_default_and_plus_adds(
    written: str, allowed: set[str], load: Load, edit: Edit
) -> None:
    edit("parameters: [top_k]", f"parameters: {written}")
    policy = load().catalog.policies["twice"]
    assert policy.parameters == allowed
    assert policy.max_wait_s == 30.0


def test_an_experts_parameters_are_its_engines(load: Load) -> None:
    experts = load().catalog.experts
    assert experts["general"].parameters == {"top_k", "cache_salt"}
    assert experts["fox"].parameters == frozenset()


# --- digest and table ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("memory_gb: 24}", "memory_gb: 25}"),
        ("memory_gb: 16,", "memory_gb: 15,"),
        ("start_s: 40", "start_s: 41"),
        ("sleep_level: 1", "sleep_level: 2"),
        ("logs/far.log", "logs/away.log"),
        ("/mnt/owls", "/mnt/birds"),
        ("max_wait_s: 30", "max_wait_s: 31"),
        ("parameters: [top_k]", "parameters: []"),
        ("    max_wait_s: 30\n", "    max_wait_s: 30\n    tolerance: 0.1\n"),
        ("    max_wait_s: 30\n", "    max_wait_s: 30\n    stay: 0.1\n"),
    ],
)
@pytest.mark.usefixtures("full")
def test_the_digest_follows_all_of_it(old: str, new: str, load: Load, edit: Edit) -> None:
    """What it missed would be taken for no change, and not be served."""
    before = load().catalog.digest
    edit(old, new)
    assert load().catalog.digest != before


def test_the_digest_does_not_follow_where_the_file_lies(
    load: Load, full: Path, tmp_path: Path
) -> None:
    other = write_world(tmp_path / "elsewhere")
    other.write_text(full.read_text())
    moved = load_catalog(other, FAMILIES, version=1).catalog
    assert moved.servers["far"].settings != load().catalog.servers["far"].settings
    assert moved.digest == load().catalog.digest


def test_the_table_shows_devices_and_who_shares_them(load: Load, full: Path, edit: Edit) -> None:
    edit("max_wait_s: 30\n", "max_wait_s: 30\n    tolerance: 0.05\n    stay: 0.1\n")
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(catalog_table(load().catalog))
    text = console.export_text()
    assert "device gpu: 24 GB, shared by far (16 GB)" in text
    assert "device spare: 8.5 GB, unused" in text
    assert "k 2, vote; waits 30 s at most; gives up 0.05 for who is loaded; gives up 0.1 " in text
    assert "for who answered last" in text


def test_the_full_registry_differs_where_it_should() -> None:
    """Its pieces are put in by replacing text, which does nothing where the text has changed."""
    assert DEVICES in FULL
    assert PLACED in FULL
    assert "server_path" in FULL
    assert "max_wait_s" in FULL
    assert len(FULL) > len(REGISTRY)
