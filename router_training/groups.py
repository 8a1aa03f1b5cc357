"""Which rows are one question asked twice. Knows no file."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from composer.routing.outcomes import IntArray
from composer.routing.trained import normalised


def groups_of(texts: Sequence[str], labels: Sequence[str | None]) -> IntArray:
    """(n,) group numbers, counted by first appearance. Rows share one if their normalised texts
    are equal or their labels are (None is nobody's), and so does whoever shares with those."""
    n = len(texts)
    keys: list[tuple[int, Hashable]] = [
        *((row, ("text", normalised(text))) for row, text in enumerate(texts)),
        *((row, ("label", label)) for row, label in enumerate(labels) if label is not None),
    ]
    node = {key: n + i for i, key in enumerate(dict.fromkeys(key for _, key in keys))}
    rows = np.array([row for row, _ in keys])
    columns = np.array([node[key] for _, key in keys])
    size = n + len(node)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    component = connected_components(graph, directed=False)[1][:n]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.asarray(rank[inverse], np.int64)
