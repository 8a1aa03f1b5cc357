"""Work that several fits of the same questions have in common, done once: pools of one table share
their questions, and so do families. Knows no family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import numpy as np
from scipy.sparse import issparse

T = TypeVar("T")

_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Within it `shared` remembers, in this thread; everything is forgotten at its end. Scopes
    within a scope share with it."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def shared(key: Callable[[], Hashable], make: Callable[[], T]) -> T:
    """What `make` gives, made once for all with an equal `key` within `sharing`; outside it each
    time, and no key is asked for. Nobody may change what was shared."""
    kept = _kept.get()
    if kept is None:
        return make()
    name = key()
    if name not in kept:
        kept[name] = make()
    return cast(T, kept[name])


def digest(*values: Any) -> bytes:
    """Of arrays, CSR matrices, texts, plain values, and sequences and mappings of such."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        _feed(found, value)
    return found.digest()


def _feed(found: Any, value: Any) -> None:
    if issparse(value):
        for part in (value.data, value.indices, value.indptr, np.asarray(value.shape)):
            _feed(found, part)
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape};".encode())
        found.update(np.ascontiguousarray(value).data)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            _feed(found, name)
            _feed(found, value[name])
    elif isinstance(value, list | tuple):
        found.update(f"{len(value)}[".encode())
        for part in value:
            _feed(found, part)
    else:
        data = repr(value).encode("utf-8", "surrogatepass")
        found.update(f"{len(data)}:".encode() + data)
