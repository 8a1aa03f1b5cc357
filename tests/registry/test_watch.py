"""The watch says once, and soon, that something it watches changed, however it was changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import watchfiles

from composer.registry import watch as watch_module
from composer.registry.watch import watch

SOON = 10.0
"""Seconds to wait for what takes a fraction of one; only a failure lasts this long."""


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


@asynccontextmanager
async def watching(paths: Callable[[], set[Path]], changes: Changes) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(watch(paths, changes, stop))
    # A change made before the first stamps are taken is part of what is known: wait for them.
    await asyncio.sleep(0.3)
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, SOON)


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
    change: Callable[[Path], None], files: Path
) -> None:
    changes = Changes()
    async with watching(lambda: {files / "experts.yaml"}, changes):
        change(files / "experts.yaml")
        await changes.next()
        await asyncio.sleep(0.8)
        assert changes.count == 1


async def test_files_in_a_watched_folder_count(files: Path) -> None:
    changes = Changes()
    async with watching(lambda: {files / "adapter"}, changes):
        (files / "adapter" / "README.md").write_text("another card")
        await changes.next()
        (files / "adapter" / "adapter_config.json").write_text("{}")
        await changes.next()


async def test_a_path_that_is_not_there_yet(files: Path) -> None:
    changes = Changes()
    async with watching(lambda: {files / "new" / "folder" / "file.txt"}, changes):
        (files / "new" / "folder").mkdir(parents=True)
        await asyncio.sleep(0.3)
        (files / "new" / "folder" / "file.txt").write_text("here")
        await changes.next()


async def test_a_swapped_symlink(files: Path) -> None:
    """As Kubernetes changes a mounted ConfigMap."""
    for version in ("one", "two"):
        (files / version).mkdir()
        (files / version / "experts.yaml").write_text(f"version: 1 # {version}")
    (files / "current").symlink_to("one")
    (files / "mounted.yaml").symlink_to("current/experts.yaml")
    changes = Changes()
    async with watching(lambda: {files / "mounted.yaml"}, changes):
        (files / "next").symlink_to("two")
        os.replace(files / "next", files / "current")
        await changes.next()


async def test_other_files_are_nobodys_business(files: Path) -> None:
    changes = Changes()
    async with watching(lambda: {files / "experts.yaml"}, changes):
        (files / "unrelated.db").write_text("busy")
        (files / "adapter" / "README.md").write_text("not watched")
        await asyncio.sleep(1)
        assert changes.count == 0


async def test_what_is_watched_may_change_with_a_change(files: Path) -> None:
    watched = {files / "experts.yaml"}
    changes = Changes()
    async with watching(lambda: set(watched), changes):
        watched.add(files / "adapter")
        write(files / "experts.yaml")
        await changes.next()
        await asyncio.sleep(0.3)
        (files / "adapter" / "README.md").write_text("now watched")
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

    stop = asyncio.Event()
    task = asyncio.create_task(watch(lambda: {files / "experts.yaml"}, changed, stop))
    await asyncio.sleep(0.3)
    replace(files / "experts.yaml")
    await asyncio.wait_for(handled.wait(), SOON)
    assert seen == ["version: 1 # replaced", "version: 1 # changed"]
    stop.set()
    await asyncio.wait_for(task, SOON)


async def test_an_error_in_what_follows_ends_nothing(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = Changes()

    async def changed() -> None:
        await changes()
        raise ValueError("the first reload fails")

    stop = asyncio.Event()
    task = asyncio.create_task(watch(lambda: {files / "experts.yaml"}, changed, stop))
    await asyncio.sleep(0.3)
    write(files / "experts.yaml")
    await changes.next()
    await asyncio.sleep(0.3)
    replace(files / "experts.yaml")
    await changes.next()
    assert "what follows a change of the registry failed" in caplog.text
    stop.set()
    await asyncio.wait_for(task, SOON)


async def test_without_file_system_events_it_looks(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise OSError(28, "OS file watch limit reached")

    monkeypatch.setattr(watch_module, "awatch", exhausted)
    assert watchfiles.awatch is not exhausted
    changes = Changes()
    async with watching(lambda: {files / "experts.yaml"}, changes):
        write(files / "experts.yaml")
        await changes.next()
