"""The watcher says once, and soon, that something differs from what a load last looked at."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import watchfiles

from composer.registry import RegistryError, cards, servers
from composer.registry import load as load_module
from composer.registry import watch as watch_module
from composer.registry.stamps import Stamps, stamp
from composer.registry.watch import Watcher
from tests.registry.conftest import Load

SOON = 10.0
"""Seconds to wait for what takes a fraction of one; only a failure lasts this long."""
QUIET = 0.8
"""Seconds after which what was to be told would have been."""


class Changes:
    """Counts the calls of `changed`, and lets a test wait for the next."""

    def __init__(self) -> None:
        self.count = 0
        self._called = asyncio.Event()

    async def __call__(self) -> None:
        self.count += 1
        self._called.set()

    async def next(self) -> None:
        await asyncio.wait_for(self._called.wait(), SOON)
        self._called.clear()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text("version: 1")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("card")
    return tmp_path


@pytest.fixture
def changes() -> Changes:
    return Changes()


def look(*paths: Path) -> Stamps:
    """As a load does."""
    return {path: stamp(path) for path in paths}


@asynccontextmanager
async def running(watcher: Watcher, changed: Callable[[], Any]) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(watcher.run(changed, stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, SOON)


@asynccontextmanager
async def watching(changed: Callable[[], Any], *paths: Path) -> AsyncIterator[Watcher]:
    watcher = Watcher()
    watcher.looked_at(look(*paths))
    async with running(watcher, changed):
        yield watcher


def write(file: Path) -> None:
    file.write_text("version: 1 # changed")


def replace(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_text("version: 1 # replaced")
    os.replace(new, file)


def delete_and_create(file: Path) -> None:
    file.unlink()
    file.write_text("version: 1 # again")


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [write, replace, delete_and_create, delete])
async def test_every_way_of_changing_a_file_is_one_change(
    change: Callable[[Path], None], files: Path, changes: Changes
) -> None:
    file = files / "experts.yaml"
    async with watching(changes, file):
        await asyncio.sleep(0.2)  # by now it listens
        change(file)
        await changes.next()
        await asyncio.sleep(QUIET)
        assert changes.count == 1


async def test_files_in_a_watched_folder_count(files: Path, changes: Changes) -> None:
    async with watching(changes, files / "adapter"):
        (files / "adapter" / "README.md").write_text("another card")
        await changes.next()
        (files / "adapter" / "adapter_config.json").write_text("{}")
        await changes.next()


async def test_a_path_that_is_not_there_yet(files: Path, changes: Changes) -> None:
    async with watching(changes, files / "new" / "folder" / "file.txt"):
        (files / "new" / "folder").mkdir(parents=True)
        await asyncio.sleep(0.3)
        (files / "new" / "folder" / "file.txt").write_text("here")
        await changes.next()


async def test_a_swapped_symlink(files: Path, changes: Changes) -> None:
    """As Kubernetes changes a mounted ConfigMap."""
    for version in ("one", "two"):
        (files / version).mkdir()
        (files / version / "experts.yaml").write_text(f"version: 1 # {version}")
    (files / "current").symlink_to("one")
    (files / "mounted.yaml").symlink_to("current/experts.yaml")
    async with watching(changes, files / "mounted.yaml"):
        (files / "next").symlink_to("two")
        os.replace(files / "next", files / "current")
        await changes.next()


async def test_other_files_are_nobodys_business(files: Path, changes: Changes) -> None:
    async with watching(changes, files / "experts.yaml"):
        (files / "unrelated.db").write_text("busy")
        (files / "adapter" / "README.md").write_text("not watched")
        await asyncio.sleep(QUIET)
        assert changes.count == 0


async def test_a_change_from_before_the_watching_counts(files: Path, changes: Changes) -> None:
    """The models are loaded between the first look at the file and the watching."""
    watcher = Watcher()
    watcher.looked_at(look(files / "experts.yaml"))
    write(files / "experts.yaml")
    async with running(watcher, changes):
        await changes.next()


async def test_a_change_between_a_look_and_its_telling_counts(
    files: Path, changes: Changes
) -> None:
    """So with an adapter whose copy ends while the load that finds it incomplete still runs."""
    async with watching(changes, files / "experts.yaml") as watcher:
        await asyncio.sleep(0.3)
        before = look(files / "adapter")
        (files / "adapter" / "README.md").write_text("complete")
        watcher.looked_at(before, in_part=True)
        await changes.next()


async def test_what_a_load_adds_is_watched_at_once(files: Path, changes: Changes) -> None:
    """As by an expert added at run time: nothing that is watched has changed."""
    async with watching(changes, files / "experts.yaml") as watcher:
        await asyncio.sleep(0.3)
        watcher.looked_at(look(files / "experts.yaml", files / "adapter"))
        await asyncio.sleep(1)
        (files / "adapter" / "README.md").write_text("now watched")
        await changes.next()
        await asyncio.sleep(QUIET)
        assert changes.count == 1


async def test_what_a_load_drops_is_watched_no_more(files: Path, changes: Changes) -> None:
    async with watching(changes, files / "experts.yaml", files / "adapter") as watcher:
        watcher.looked_at(look(files / "experts.yaml"))
        (files / "adapter" / "README.md").write_text("not any more")
        await asyncio.sleep(QUIET)
        assert changes.count == 0


@pytest.mark.parametrize("comes_to", ["experts.yaml", "adapter"])
async def test_what_stays_broken_is_told_once(comes_to: str, files: Path) -> None:
    """Whether or not the load that fails comes to what changed."""
    watcher = Watcher()
    watcher.looked_at(look(files / "experts.yaml", files / "adapter"))
    changes = Changes()

    async def fails() -> None:
        watcher.looked_at(look(files / comes_to), in_part=True)
        await changes()

    async with running(watcher, fails):
        write(files / "experts.yaml")
        await changes.next()
        await asyncio.sleep(QUIET)
        assert changes.count == 1
        replace(files / "experts.yaml")
        await changes.next()


async def test_a_change_taken_back_while_a_load_saw_it_counts(files: Path) -> None:
    """What was told is no excuse for not telling it again once something else was looked at."""
    file, aside = files / "experts.yaml", files / "aside"
    watcher = Watcher()
    watcher.looked_at(look(file))
    changes = Changes()

    async def back_and_forth() -> None:
        if not changes.count:
            os.replace(aside, file)
            watcher.looked_at(look(file))
            os.replace(file, aside)
        await changes()

    async with running(watcher, back_and_forth):
        os.replace(file, aside)
        await changes.next()
        await changes.next()


async def test_a_change_while_the_last_one_is_handled_is_not_lost(files: Path) -> None:
    handled = asyncio.Event()
    seen: list[str] = []

    async def changed() -> None:
        seen.append((files / "experts.yaml").read_text())
        if len(seen) == 1:
            write(files / "experts.yaml")  # nobody listens now
        else:
            handled.set()

    async with watching(changed, files / "experts.yaml"):
        replace(files / "experts.yaml")
        await asyncio.wait_for(handled.wait(), SOON)
    assert seen == ["version: 1 # replaced", "version: 1 # changed"]


async def test_a_long_copy_does_not_call_without_pause(files: Path, changes: Changes) -> None:
    async with watching(changes, files / "adapter"):
        began = monotonic()
        for part in range(60):
            (files / "adapter" / "weights").write_bytes(b"x" * part)
            await asyncio.sleep(0.02)
        await changes.next()
        assert changes.count <= (monotonic() - began) / watch_module._SETTLE_S


async def test_an_error_in_what_follows_ends_nothing(
    files: Path, changes: Changes, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        await changes()
        raise ValueError("the first reload fails")

    async with watching(fails, files / "experts.yaml"):
        write(files / "experts.yaml")
        await changes.next()
        replace(files / "experts.yaml")
        await changes.next()
    assert "what follows a change of the registry failed" in caplog.text


async def test_without_file_system_events_it_looks(
    files: Path, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise OSError(28, "OS file watch limit reached")

    monkeypatch.setattr(watch_module, "awatch", exhausted)
    assert watchfiles.awatch is not exhausted
    async with watching(changes, files / "experts.yaml"):
        write(files / "experts.yaml")
        await changes.next()


async def test_nothing_looked_at_yet(files: Path, changes: Changes) -> None:
    async with watching(changes) as watcher:
        await asyncio.sleep(0.3)
        watcher.looked_at(look(files / "experts.yaml"))
        write(files / "experts.yaml")
        await changes.next()


# --- with a load -----------------------------------------------------------------------------


def test_stamps_are_from_before_the_reading(
    load: Load, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written while it is read shows as a change afterwards."""
    owl = registry.parent / "scanned" / "owl"
    (owl / "more.txt").write_text("hoot\n")
    (owl / "README.md").write_text("---\ncomposer:\n  examples_from: more.txt\n---\n")

    def touching(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Path, *rest: Any) -> Any:
            made = real(path, *rest)
            os.utime(path / "config.json" if path.is_dir() else path, ns=(1, 1))
            return made

        return read

    for module, name in (
        (load_module, "_read"),
        (cards, "_read_text"),
        (servers, "read_base_model"),
    ):
        monkeypatch.setattr(module, name, touching(getattr(module, name)))
    watched = load().watched
    assert {path for path, known in watched.items() if stamp(path) != known} == {
        registry,
        registry.parent / "bases/tiny",
        registry.parent / "adapters/fox",
        owl,
        owl / "more.txt",
    }


async def test_an_adapter_that_becomes_complete_while_it_is_refused(
    load: Load, registry: Path, changes: Changes
) -> None:
    weights = registry.parent / "adapters" / "fox" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(RegistryError) as refused:
        load()
    weights.write_bytes(whole)
    watcher = Watcher()
    watcher.looked_at(refused.value.watched, in_part=True)
    async with running(watcher, changes):
        await changes.next()
    assert "fox" in load().catalog.experts
