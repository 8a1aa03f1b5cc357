"""Rows grouped by expert, and the similarity of queries to each expert. Knows nothing of texts,
embedders or probabilities.

Two kinds behind one interface: `FlatIndex` is exact; `IvfIndex` (faiss) searches a part of the
rows, for registries where reading all of them would take longer than the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from composer.routing.metric import IntArray
from composer.types import BoolArray, FloatArray

FLAT_ROWS = 100_000
"""Up to here the exact index answers in a few milliseconds."""

RECALL = 0.995
"""Of the very nearest row, that an IVF index must reach on rows withheld from it."""

SEARCH_ROWS = 512
"""Rows an IVF search brings back: the experts of a plan are among their owners."""

ENOUGH_EXPERTS = 16
"""When fewer eligible experts own a found row, eligible rows are searched for by themselves."""

BLOCK = 1 << 24
"""Similarities held at once, in floats (64 MB)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """(n, d) rows of all experts, one expert's rows side by side: expert e has those from
    `start[e]` to `start[e + 1]`, possibly none. An expert's similarity to a query is the mean of
    the `m` largest inner products with its rows (of all, if it has fewer). `as_queries` (n, d)
    are the rows as they would look if they were asked."""

    rows: FloatArray
    as_queries: FloatArray
    start: IntArray
    m: int

    @property
    def owner(self) -> IntArray:
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


@dataclass(frozen=True, slots=True)
class Nearest:
    """One expert's row closest to a query. `row` counts within the expert."""

    row: int
    similarity: float


class Index(Protocol):
    kind: str

    def similarity(self, queries: FloatArray, eligible: BoolArray | None = None) -> FloatArray:
        """(q, d) → (q, E) per expert; −1 for an expert without rows. `eligible` (E,) promises
        that only those columns will be read, and that no other expert's rows push theirs out."""
        ...

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """(q, d) → the k rows nearest to each, best first: similarities and row numbers (q, k).
        Number −1 where an IVF index found fewer."""
        ...

    def nearest(self, query: FloatArray, experts: Sequence[int]) -> list[Nearest | None]:
        """(d,) → the closest row of each expert named; None where it has none (or, by an IVF
        index, where none was found)."""
        ...


def build_index(rows: Rows, kind: str, seed: int) -> Index:
    """`kind` is flat, ivf or auto (flat up to 100,000 rows)."""
    if kind == "flat" or (kind == "auto" and len(rows.rows) <= FLAT_ROWS):
        return FlatIndex(rows)
    return IvfIndex(rows, seed)


class FlatIndex:
    """Every inner product, in one matrix product: the scores of faiss's IndexFlatIP, all of them
    kept, because every expert needs one, not only the owners of the top few rows."""

    kind = "flat"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows.rows
        self._start = rows.start
        self._m = rows.m
        self._n_experts = len(rows.start) - 1
        self._columns = _columns(rows.start, rows.m)

    def similarity(self, queries: FloatArray, eligible: BoolArray | None = None) -> FloatArray:
        out = np.full((len(queries), self._n_experts), -1.0, np.float32)
        step = max(1, BLOCK // max(1, len(self._rows)))
        for first in range(0, len(queries), step):
            block = slice(first, first + step)
            products = _products(queries[block], self._rows)
            for experts, columns, valid in self._columns:
                own = products[:, columns]  # (q, e, w)
                if not valid.all():
                    own[:, ~valid] = -np.inf
                out[block, experts] = _top_mean(own, self._m)
        return out

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        products = _products(queries, self._rows)
        row = np.argpartition(-products, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(products, row, axis=1), axis=1, kind="stable")
        row = np.take_along_axis(row, order, axis=1)
        return np.take_along_axis(products, row, axis=1), row

    def nearest(self, query: FloatArray, experts: Sequence[int]) -> list[Nearest | None]:
        found: list[Nearest | None] = []
        for expert in experts:
            own = self._rows[self._start[expert] : self._start[expert + 1]] @ query
            best = int(own.argmax()) if len(own) else None
            found.append(None if best is None else Nearest(best, float(own[best])))
        return found


def _products(queries: FloatArray, rows: FloatArray) -> FloatArray:
    """(q, d), (n, d) → (q, n) inner products."""
    if len(queries) == 1:
        # numpy's own loop reads the rows twice as fast as its BLAS's matrix-vector product
        # (20,000 rows of 384: 1.1 against 2.1 ms), and as fast as faiss's.
        return np.asarray(np.einsum("nd,d->n", rows, queries[0])[None], np.float32)
    return np.asarray(queries @ rows.T, np.float32)


def _columns(start: IntArray, m: int) -> list[tuple[IntArray, IntArray, BoolArray]]:
    """Experts of like size together, so that ragged groups become few rectangles: the experts
    (e,), the rows of each (e, w), and which of them are not padding (e, w)."""
    count = np.diff(start)
    groups = []
    sizes = np.ceil(np.log2(np.maximum(count, 1))).astype(np.int64)
    for size in np.unique(sizes[count > 0]):
        experts = np.flatnonzero((sizes == size) & (count > 0))
        width = int(count[experts].max())
        offset = np.arange(width)[None, :]
        valid = offset < count[experts, None]
        columns = np.where(valid, start[experts, None] + offset, start[experts, None])
        groups.append((experts, columns, valid))
    return groups


def _top_mean(values: FloatArray, m: int) -> FloatArray:
    """(…, w) → (…,) mean of the m largest; −inf counts as absent."""
    if m == 1:
        return np.asarray(values.max(axis=-1), np.float32)
    if values.shape[-1] > m:
        values = np.partition(values, values.shape[-1] - m, axis=-1)[..., -m:]
    present = np.isfinite(values)
    total = np.where(present, values, 0.0).sum(axis=-1)
    return np.asarray(total / np.maximum(present.sum(axis=-1), 1), np.float32)


class IvfIndex:
    """faiss IndexIVFFlat: rows in lists by k-means, of which a query reads the nearest `nprobe`.

    `nprobe` is chosen while building: raised by half until the nearest row found is the true one
    for `RECALL` of rows withheld from the index (`recall` is what was reached). IVF, not HNSW: at
    200,000 rows HNSW takes minutes to build where this takes seconds.

    Exact are the experts who own `m` rows among those found. A row not found is taken at the
    last similarity found, which it cannot exceed (as far as recall is full); an expert not found
    at all, at the mean of its rows, which its best rows cannot fall below. So the order of those
    who could be chosen is right, and that of the far-off rest approximate.
    """

    kind = "ivf"

    def __init__(self, rows: Rows, seed: int) -> None:
        import faiss

        self._m = rows.m
        self._start = rows.start
        self._owner = rows.owner
        count = np.diff(rows.start)
        self._count = count
        sums = np.zeros((len(count), rows.rows.shape[1]), np.float64)
        filled = count > 0
        sums[filled] = np.add.reduceat(rows.rows.astype(np.float64), rows.start[:-1][filled])
        self._mean = np.asarray(sums / np.maximum(count, 1)[:, None], np.float32)  # (E, d)

        n, d = rows.rows.shape
        rng = np.random.default_rng(seed)
        order = rng.permutation(n)
        held = min(512, n // 20)
        withheld, first = order[:held], order[held:]
        lists = int(min(4 * np.sqrt(n), max(1, len(first) // 40)))
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.seed = seed
        self._index.cp.niter = 8
        self._index.cp.max_points_per_centroid = 40
        self._index.train(rows.rows[first[: 40 * lists]])
        self._index.add_with_ids(rows.rows[first], first)
        self.nprobe, self.recall = self._tune(rows.rows, first, rows.as_queries[withheld])
        self._index.add_with_ids(rows.rows[withheld], withheld)

    def _tune(self, rows: FloatArray, present: IntArray, queries: FloatArray) -> tuple[int, float]:
        if not len(queries):
            return int(self._index.nlist), 1.0
        truth = present[(queries @ rows[present].T).argmax(axis=1)]
        nprobe = 4
        while True:
            nprobe = min(nprobe, int(self._index.nlist))
            found = self._search(queries, 1, nprobe=nprobe)[1][:, 0]
            # A row equal to the true one is as good: compare similarities, not ids.
            hit = (rows[found] * queries).sum(1) >= (rows[truth] * queries).sum(1) - 1e-6
            recall = float((hit & (found >= 0)).mean())
            if recall >= RECALL or nprobe == self._index.nlist:
                return nprobe, recall
            nprobe += max(1, nprobe // 2)

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        return self._search(queries, k)

    def _search(
        self, queries: FloatArray, k: int, *, nprobe: int | None = None, among: Any = None
    ) -> tuple[FloatArray, IntArray]:
        """(q, k) similarities and row ids, best first; id −1 where fewer were found."""
        import faiss

        parameters = faiss.SearchParametersIVF(  # type: ignore[call-arg]
            nprobe=nprobe or self.nprobe, sel=among
        )
        similarity, row = self._index.search(
            np.ascontiguousarray(queries, np.float32), k, params=parameters
        )
        return similarity, row

    def similarity(self, queries: FloatArray, eligible: BoolArray | None = None) -> FloatArray:
        out = _products(queries, self._mean)  # (q, E), from below
        out[:, self._count == 0] = -1.0
        step = max(1, BLOCK // max(1, out.shape[1]))
        k = min(SEARCH_ROWS, int(self._index.ntotal))
        for first in range(0, len(queries), step):
            block = slice(first, first + step)
            found = self._search(queries[block], k)
            self._raise_to_found(out[block], *found)
            if eligible is None or eligible.all():
                continue
            seen = eligible[self._owner[np.maximum(found[1], 0)]] & (found[1] >= 0)
            owners = np.where(seen, self._owner[np.maximum(found[1], 0)], -1)
            distinct = np.sort(owners, axis=1)
            n_distinct = ((np.diff(distinct, axis=1) > 0) & (distinct[:, 1:] >= 0)).sum(axis=1) + (
                distinct[:, 0] >= 0
            )
            few = np.flatnonzero(n_distinct < min(ENOUGH_EXPERTS, int(eligible.sum())))
            if len(few):
                wanted = eligible[self._owner]
                among, keep_alive = _selector(wanted)
                # Rows few and far between: as many more lists, for about as many inner products.
                wider = int(self.nprobe * len(wanted) / max(1, wanted.sum()))
                nprobe = min(int(self._index.nlist), wider)
                again = self._search(queries[block][few], k, nprobe=nprobe, among=among)
                del keep_alive
                part = out[block][few]
                self._raise_to_found(part, *again)
                out[first + few] = part
        return out

    def _raise_to_found(self, out: FloatArray, similarity: FloatArray, row: IntArray) -> None:
        """Raises `out` (q, E) where found rows (q, k), best first, show a higher similarity."""
        n_queries, n_experts = out.shape
        present = row >= 0
        last = np.where(present, similarity, np.inf).min(axis=1)  # (q,) the least one found
        owner = np.where(present, self._owner[np.maximum(row, 0)], n_experts)
        order = np.argsort(owner, axis=1, kind="stable")  # an expert's rows together, best first
        by_owner = np.take_along_axis(owner, order, axis=1)
        begins = np.ones_like(present)
        begins[:, 1:] = by_owner[:, 1:] != by_owner[:, :-1]
        position = np.arange(row.shape[1])[None, :]
        rank = position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)
        kept = (rank < self._m) & (by_owner < n_experts)
        query, slot = np.nonzero(kept)
        cell = query * n_experts + by_owner[query, slot]
        value = np.take_along_axis(similarity, order, axis=1)[query, slot]
        size = n_queries * n_experts
        total = np.bincount(cell, weights=value, minlength=size).reshape(out.shape)
        found = np.bincount(cell, minlength=size).reshape(out.shape)
        wanted = np.minimum(self._count, self._m)[None, :]
        missing = np.maximum(wanted - found, 0)
        with np.errstate(invalid="ignore"):
            mean = (total + missing * last[:, None]) / np.maximum(wanted, 1)
        np.maximum(out, mean, out=out, where=found > 0, casting="same_kind")

    def nearest(self, query: FloatArray, experts: Sequence[int]) -> list[Nearest | None]:
        wanted = np.zeros(len(self._count), np.bool_)
        wanted[list(experts)] = True
        among, keep_alive = _selector(wanted[self._owner])
        k = int(min(self._count[list(experts)].sum(), SEARCH_ROWS))
        if k == 0:
            return [None] * len(experts)
        (similarity,), (row,) = self._search(query[None], k, among=among)
        del keep_alive
        owner = np.where(row >= 0, self._owner[np.maximum(row, 0)], -1)
        found: list[Nearest | None] = []
        for expert in experts:
            hits = np.flatnonzero(owner == expert)
            found.append(
                Nearest(int(row[hits[0]] - self._start[expert]), float(similarity[hits[0]]))
                if len(hits)
                else None
            )
        return found


def _selector(rows: BoolArray) -> tuple[Any, Any]:
    """A faiss selector of the rows marked True, and the bits it points into: keep both alive."""
    import faiss

    bits = np.packbits(rows, bitorder="little")
    return faiss.IDSelectorBitmap(len(rows), faiss.swig_ptr(bits)), bits
