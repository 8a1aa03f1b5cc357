"""What was made of files, kept by the files' stamps, so that a reload reads only what changed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from composer.adapters.base_model import BaseModelInfo
from composer.adapters.files import CONFIG, WEIGHTS, file_problems
from composer.adapters.lora_config import AdapterFeature
from composer.adapters.verify import verify_adapter
from composer.errors import AdapterError
from composer.types import Adapter

T = TypeVar("T")

_GRAIN_NS = 100_000_000
"""A file written less than this ago may be written again without its stamp changing (coarse
file clocks), so what was made of it is not kept."""


class FileCache:
    """Remembers results by the files they were made of. Safe from several threads; holds `size`
    results at most, the longest unused of which go first."""

    def __init__(self, size: int = 131_072) -> None:
        self._size = size
        self._known: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, files: Sequence[Path], question: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, now or as of the last time with the same files and question.

        Whatever else the result depends on belongs into `question`. Raises OSError for a file
        that is not there, and what `make` raises; that is not remembered.
        """
        before = _stamps(files)
        key = (tuple(files), before, question)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                known: T = self._known[key]
                return known
        made = make()
        settled = time.time_ns() - max(modified for modified, _, _ in before) > _GRAIN_NS
        if settled and _stamps(files) == before:
            with self._lock:
                self._known[key] = made
                while len(self._known) > self._size:
                    self._known.popitem(last=False)
        return made

    def keep(self, files: Sequence[Path], question: Hashable, made: Any) -> None:
        """What is known of files that the caller wrote itself, and that nobody writes again."""
        with self._lock:
            self._known[tuple(files), _stamps(files), question] = made


def verify_cached(
    cache: FileCache,
    folder: Path,
    base: BaseModelInfo | None,
    *,
    roots: Sequence[Path],
    max_rank: int | None = None,
    features: Collection[AdapterFeature] = (),
    digest: str | None = None,
) -> Adapter:
    """As `verify_adapter`, but an adapter that passed once is not read again until it changes.

    Where it lies is checked each time, since a symlink can change without its target.
    """
    problems = file_problems(folder, roots)
    if problems:
        raise AdapterError(problems)
    known_base = (base.stamp, base.names) if base is not None else None
    return cache.get(
        [folder / CONFIG, folder / WEIGHTS],
        (known_base, max_rank, frozenset(features), digest),
        lambda: verify_adapter(
            folder, base, roots=roots, max_rank=max_rank, features=features, digest=digest
        ),
    )


def gate_cached(
    cache: FileCache,
    folder: Path,
    base: BaseModelInfo | None,
    *,
    roots: Sequence[Path],
    features: Collection[AdapterFeature],
    digest: str | None = None,
) -> Adapter:
    """As `verify_gate`, remembered in the same way."""
    # Here, since it imports torch, which a registry without gates is checked without.
    from composer.adapters.gates.files import MANIFEST, TENSORS
    from composer.adapters.gates.verify import gate_files_problem, verify_gate

    problem = gate_files_problem(folder, roots)
    if problem is not None:
        raise AdapterError([problem])
    known_base = (base.stamp, base.names) if base is not None else None
    return cache.get(
        [folder / MANIFEST, folder / TENSORS],
        (known_base, frozenset(features), digest),
        lambda: verify_gate(folder, base, features=features, digest=digest),
    )


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    """(modification time in ns, size in bytes, inode) of each."""
    stats = (file.stat() for file in files)
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
