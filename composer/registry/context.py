"""What one load of the registry carries from part to part. Knows no part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from composer.adapters.cache import FileCache
from composer.adapters.shelf import Shelf
from composer.errors import Problem
from composer.registry.blocks import Place
from composer.registry.families import Families
from composer.registry.stamps import Stamp, stamp
from composer.source import Document


@dataclass(frozen=True, slots=True)
class Mount:
    """What a server sees as `seen` in place of our `folder`."""

    server: str
    folder: Path
    seen: PurePosixPath


@dataclass(slots=True)
class Context:
    """`folder` is where relative paths start, `compositions` where composed adapters are kept. The
    rest grows as the load goes on: `problems` of the file, those of run-time experts by id (`""`:
    of a spec without one), `warnings` about this machine, the stamp of each path from before it
    was first read, and the folders that servers see elsewhere.
    `experts_missing`: some experts could not be gathered, so that a name that is not there may be
    one of theirs. `left_out` are run-time experts that are passed over: the file may name them, and
    is told that they are not there now."""

    file: Document
    folder: Path
    families: Families
    roots: tuple[Path, ...]
    cache: FileCache
    compositions: Shelf
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    of_runtime: dict[str, list[Problem]] = field(default_factory=dict)
    watched: dict[Path, Stamp] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    experts_missing: bool = False
    left_out: frozenset[str] = frozenset()

    def add_runtime(self, id_: str, problems: Sequence[Problem]) -> None:
        """Problems that a run-time expert has or makes, as opposed to those of the file."""
        if problems:
            self.of_runtime.setdefault(id_, []).extend(problems)

    def warn_left_out(self, place: Place, id_: str, until: str) -> None:
        """What the file says of an expert that is left out has to wait: `until` then …"""
        message = f"the run-time expert {id_!r} is left out at present; until it is back, {until}"
        remedy = "GET /health says why: mend it, or delete it and take its name out here."
        self.warnings.append(place.problem(message, remedy))

    def look(self, path: Path) -> None:
        """To be called before `path` is read, from any thread: the stamp from before the first
        reading is the one that tells of every change since."""
        if path not in self.watched:
            self.watched.setdefault(path, stamp(path))

    def seen_by(self, server: str, folder: Path) -> str | None:
        """`folder` as the server sees it, where that has been said; of several ways, the one
        with the longest part of the path in common."""
        absolute = Path(os.path.abspath(folder))
        mounts = [
            mount
            for mount in self.mounts
            if mount.server == server and absolute.is_relative_to(mount.folder)
        ]
        if not mounts:
            return None
        best = max(mounts, key=lambda mount: len(mount.folder.parts))
        return str(best.seen / absolute.relative_to(best.folder))

    def located(self, path: str, start: Path | None = None) -> Path:
        """`path` from `start` (default: the registry's folder), `~` expanded."""
        return (start or self.folder) / self.expanded(path)

    def expanded(self, path: str) -> str:
        """`path` with `~` expanded, and fit to be asked of a file system (none knows NUL)."""
        return os.path.expanduser(path.replace("\0", "\N{REPLACEMENT CHARACTER}"))
