"""Verified adapters kept by their files' stamps, so that a reload reads only what changed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from composer.adapters.base_model import BaseModelInfo
from composer.adapters.files import file_problems, stamp
from composer.adapters.lora_config import AdapterFeature
from composer.adapters.verify import verify_adapter
from composer.errors import AdapterError
from composer.types import Adapter

_GRAIN_NS = 100_000_000
"""A file written less than this ago may be written again without its stamp changing (coarse
file clocks), so what was read of it is not kept."""


class AdapterCache:
    """Remembers the adapters that passed. Safe from several threads; holds `size` at most."""

    def __init__(self, size: int = 65_536) -> None:
        self._size = size
        self._known: OrderedDict[Any, Adapter] = OrderedDict()
        self._lock = Lock()

    def verify(
        self,
        folder: Path,
        base: BaseModelInfo | None,
        *,
        roots: Sequence[Path],
        max_rank: int | None = None,
        features: Collection[AdapterFeature] = (),
        digest: str | None = None,
    ) -> Adapter:
        """As `verify_adapter`. Where the folder lies is checked each time, since a symlink can
        change without its target."""
        problems = file_problems(folder, roots)
        if problems:
            raise AdapterError(problems)
        before = stamp(folder)
        key = (
            folder.resolve(),
            before,
            base.stamp if base else None,
            base.names if base else None,
            max_rank,
            frozenset(features),
            digest,
        )
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        adapter = verify_adapter(
            folder, base, roots=roots, max_rank=max_rank, features=features, digest=digest
        )
        settled = time.time_ns() - max(entry[1] for entry in before) > _GRAIN_NS
        if settled and stamp(folder) == before:
            with self._lock:
                self._known[key] = adapter
                while len(self._known) > self._size:
                    self._known.popitem(last=False)
        return adapter
