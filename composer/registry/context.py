"""What one load of the registry carries from part to part. Knows no part."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from composer.adapters.cache import FileCache
from composer.errors import Problem
from composer.registry.families import Families
from composer.registry.source import Document


@dataclass(slots=True)
class Context:
    """`folder` is where relative paths start. `problems` and `watched` grow as the load goes on.
    `experts_missing`: some experts could not be gathered, so that a name that is not there may
    be one of theirs."""

    file: Document
    folder: Path
    families: Families
    roots: tuple[Path, ...]
    cache: FileCache
    problems: list[Problem] = field(default_factory=list)
    watched: set[Path] = field(default_factory=set)
    experts_missing: bool = False

    def located(self, path: str, start: Path | None = None) -> Path:
        """`path` from `start` (default: the registry's folder), `~` expanded."""
        return (start or self.folder) / self.expanded(path)

    def expanded(self, path: str) -> str:
        """`path` with `~` expanded, and fit to be asked of a file system (none knows NUL)."""
        return os.path.expanduser(path.replace("\0", "\N{REPLACEMENT CHARACTER}"))
