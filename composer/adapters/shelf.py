"""A folder of composed adapters within a budget of bytes. Knows no engine and no request.

Several processes may share it: who serves from a composition holds a shared lock on its provenance,
and nobody takes away what is held. Locks end with their process, however it ends. Blocks.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any

from composer.adapters.provenance import PROVENANCE
from composer.adapters.recipe import Recipe

_NAME = re.compile(r"[0-9a-f]{32}")
"""As `compose` names its folders: what else lies there is none of ours to take away."""

LEFTOVER_S = 3600
"""Age from which a folder with a dot before its name is a killed process's, not one being made."""


class Shelf:
    def __init__(self, folder: Path, budget: int) -> None:
        """`budget` is in bytes."""
        self.folder = folder.resolve()
        self.budget = budget
        self._held: dict[Path, IO[bytes]] = {}
        self._lock = Lock()

    def make(self, recipe: Recipe) -> Any:
        """The Composition, built where it is not there, and held from now on. Raises as
        `compose`."""
        # Seconds of imports (torch, peft), for whoever composes alone.
        from composer.adapters.compose import compose

        while True:
            made = compose(recipe, self.folder)
            if self._hold(made.folder):
                return made

    def expand(self, compressed: Path) -> Path:
        """The ordinary adapter of a compressed one, made where it is not there, and held from now
        on. Raises as `expand`."""
        from composer.adapters.compression import expand

        while True:
            folder = expand(compressed, self.folder)
            if self._hold(folder):
                return folder

    def let_go(self, folder: Path) -> None:
        with self._lock:
            file = self._held.pop(folder, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        for folder in list(self._held):
            self.let_go(folder)

    def keep(self, folders: Collection[Path]) -> int:
        """Lets go of all but these, and trims. Says how many were taken away."""
        for folder in self._held.keys() - set(folders):
            self.let_go(folder)
        return self.trim()

    def trim(self, known: Collection[str] | None = None) -> int:
        """Takes away what nobody holds: all with a member whose digest is not among the `known`
        (None: whatever they are), and then the longest unused, until the rest is within the
        budget. Says how many."""
        self._sweep()
        kept: list[tuple[float, int, Path]] = []
        gone = 0
        for folder in self._folders():
            if known is None or _members(folder) <= set(known):
                with suppress(FileNotFoundError):  # another process took it away just now
                    kept.append((folder.stat().st_mtime, _size(folder), folder))
            else:
                gone += self._remove(folder)
        total = sum(size for _, size, _ in kept)
        for _, size, folder in sorted(kept):
            if total <= self.budget:
                break
            if self._remove(folder):
                gone += 1
                total -= size
        return gone

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [f for f in self.folder.iterdir() if f.is_dir() and _NAME.fullmatch(f.name)]

    def _sweep(self) -> None:
        """What processes left that were killed while they made or took away a composition."""
        if not self.folder.is_dir():
            return
        for folder in self.folder.glob(".*"):
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                    shutil.rmtree(folder, ignore_errors=True)

    def _hold(self, folder: Path) -> bool:
        """False where another process has taken it away meanwhile."""
        with self._lock:
            try:
                held = self._held.get(folder)
                if held is not None and _is_at(held, folder):
                    os.utime(folder)
                    return True
                file = (folder / PROVENANCE).open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)
                os.utime(folder)
                same = _is_at(file, folder)
            except FileNotFoundError:
                return False
            if held is not None:  # of one that was damaged, and has been made anew
                held.close()
                del self._held[folder]
            if same:
                self._held[folder] = file
            else:
                file.close()
            return same

    def _remove(self, folder: Path) -> bool:
        """Under an exclusive lock, so that nobody begins to hold it: it is moved out of its name
        first, and whoever waits for the lock finds it gone. False where somebody holds it, or has
        made it anew since it was opened here."""
        with suppress(FileNotFoundError), (folder / PROVENANCE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not _is_at(file, folder):
                return False  # the lock is on one that is gone, and says nothing of this one
            shutil.rmtree(self._aside(folder), ignore_errors=True)
            return True
        return self._remove_nameless(folder)

    def _remove_nameless(self, folder: Path) -> bool:
        """One without provenance, so that nobody can hold it."""
        try:
            leaving = self._aside(folder)
        except FileNotFoundError:
            return False
        if (leaving / PROVENANCE).exists():  # made since, and perhaps held: back to its name
            with suppress(OSError):  # made once more: that one stands
                os.rename(leaving, folder)
                return False
        shutil.rmtree(leaving, ignore_errors=True)
        return True

    def _aside(self, folder: Path) -> Path:
        """Moved to a name of its own, and young, so that no sweep takes it for a leftover."""
        os.utime(folder)
        leaving = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".leaving", dir=self.folder)
        try:
            os.rename(folder, leaving)
        except OSError:
            os.rmdir(leaving)
            raise
        return Path(leaving)


def _is_at(file: IO[bytes], folder: Path) -> bool:
    """Whether this open provenance is the one that stands there now."""
    return os.fstat(file.fileno()).st_ino == (folder / PROVENANCE).stat().st_ino


def _members(folder: Path) -> set[str]:
    """The digests of what it was made of; where that cannot be read, it is a leftover, of a member
    that nobody knows."""
    try:
        told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return {str(member["digest"]) for member in told["members"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {""}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
