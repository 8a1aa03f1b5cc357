"""The state of a file or folder as a value to compare. Opens no file."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path

Stamp = Hashable
"""Equal as long as the file, or the folder with what is directly in it, stays as it is; None:
it is not there, which is a state too. Like make, it misses an overwrite that keeps the size and
comes within the same tick of the file system's clock (a few ms) as the write before it."""

Stamps = Mapping[Path, Stamp]


def stamp(path: Path) -> Stamp:
    """The present state of `path`, symlinks followed."""
    try:
        with os.scandir(path) as entries:
            return tuple(sorted((entry.name, _of_file(entry)) for entry in entries))
    except NotADirectoryError:
        return _of_file(path)
    except (OSError, ValueError):  # a name that no file system takes is never there
        return None


def _of_file(file: Path | os.DirEntry[str]) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
