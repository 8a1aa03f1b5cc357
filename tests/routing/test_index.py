"""Similarity per expert against brute force, and the inverted lists against the exact index."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.index import FlatIndex, IvfIndex, Rows, build_index
from composer.types import FloatArray
from tests.routing.helpers import DIM, clustered, queries, unit


def brute_force(x: FloatArray, rows: Rows) -> FloatArray:
    out = np.full((len(x), len(rows.start) - 1), -1.0, np.float32)
    for q, query in enumerate(x):
        for e in range(out.shape[1]):
            own = sorted(rows.rows[rows.start[e] : rows.start[e + 1]] @ query, reverse=True)
            if own:
                out[q, e] = np.mean(own[: rows.m])
    return out


def rows_of(counts: list[int], m: int, seed: int = 0) -> Rows:
    rows, texts = clustered(counts, seed=seed)
    return Rows(rows, rows, texts.start, m)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    m=st.integers(1, 5),
    n=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_flat_is_brute_force(counts: list[int], m: int, n: int, seed: int) -> None:
    rows = rows_of(counts, m, seed)
    x = queries(n, seed=seed)
    assert FlatIndex(rows).similarity(x) == pytest.approx(brute_force(x, rows), abs=1e-5)


def test_flat_search_is_faiss_flat() -> None:
    rows = rows_of([7] * 30, 1)
    x = queries(9)
    reference = faiss.IndexFlatIP(DIM)
    reference.add(rows.rows)
    similarity, row = reference.search(x, 5)
    ours = FlatIndex(rows).search(x, 5)
    assert ours[0] == pytest.approx(similarity, abs=1e-5)
    assert np.array_equal(ours[1], row)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([4, 0, 9], 2)
    x = queries(11)
    whole = FlatIndex(rows).similarity(x)
    monkeypatch.setattr("composer.routing.index.BLOCK", 30)
    assert FlatIndex(rows).similarity(x) == pytest.approx(whole, abs=1e-6)


def test_nearest_row_of_an_expert() -> None:
    rows = rows_of([3, 0, 5], 1)
    query = rows.rows[6]
    near = FlatIndex(rows).nearest(query, [2, 1, 0])
    assert near[0] is not None
    assert (near[0].row, near[0].similarity) == (3, pytest.approx(1, abs=1e-5))
    assert near[1] is None
    assert near[2] is not None


def test_auto_is_exact_up_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([5] * 20, 1)
    assert build_index(rows, "auto", 0).kind == "flat"
    monkeypatch.setattr("composer.routing.index.FLAT_ROWS", 99)
    assert build_index(rows, "auto", 0).kind == "ivf"
    assert build_index(rows, "flat", 0).kind == "flat"


# --- inverted lists ------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> tuple[Rows, FloatArray]:
    """10,000 rows of 500 experts in 64 dimensions, and queries near them that are no rows."""
    rows, texts = clustered([20] * 500, spread=0.8, dim=64)
    rng = np.random.default_rng(7)
    near = rows[rng.integers(len(rows), size=400)]
    x = unit(near + rng.standard_normal(near.shape).astype(np.float32) * 0.05)
    return Rows(rows, rows, texts.start, 2), x


@pytest.fixture(scope="module")
def ivf(large: tuple[Rows, FloatArray]) -> IvfIndex:
    return IvfIndex(large[0], seed=0)


def test_ivf_finds_the_nearest_row(large: tuple[Rows, FloatArray], ivf: IvfIndex) -> None:
    rows, x = large
    exact = FlatIndex(rows)
    assert ivf.nprobe < ivf._index.nlist / 2  # it does search a part only
    assert ivf.recall >= 0.995
    assert (ivf.search(x, 1)[1] == exact.search(x, 1)[1]).mean() >= 0.99


def test_ivf_chooses_the_expert_the_exact_index_chooses(
    large: tuple[Rows, FloatArray], ivf: IvfIndex
) -> None:
    rows, x = large
    exact, found = FlatIndex(rows).similarity(x), ivf.similarity(x)
    assert (exact.argmax(axis=1) == found.argmax(axis=1)).mean() >= 0.99
    best = exact.argmax(axis=1)[:, None]
    difference = np.take_along_axis(exact - found, best, axis=1)
    assert np.median(np.abs(difference)) < 1e-5
    # Experts not found stand at the mean of their rows, never above what they really reach.
    assert (found <= exact + 0.05).mean() > 0.99


def test_ivf_with_every_list_read_is_exact_for_all_it_finds() -> None:
    rows = rows_of([6] * 40, 2)
    ivf = IvfIndex(rows, seed=0)
    ivf.nprobe = ivf._index.nlist
    x = queries(5)
    assert ivf.similarity(x) == pytest.approx(brute_force(x, rows), abs=1e-5)
    assert [n and n.row for n in ivf.nearest(x[0], range(40))] == [
        n and n.row for n in FlatIndex(rows).nearest(x[0], range(40))
    ]


def test_ivf_excluded_experts_do_not_push_others_out(
    large: tuple[Rows, FloatArray], ivf: IvfIndex
) -> None:
    """With all but five experts excluded, those five are still searched for and found."""
    rows, x = large
    exact = FlatIndex(rows).similarity(x[:50])
    eligible = np.zeros(500, np.bool_)
    eligible[np.random.default_rng(3).permutation(500)[:5]] = True
    found = ivf.similarity(x[:50], eligible)
    best = np.where(eligible, exact, -np.inf).argmax(axis=1)
    assert (np.where(eligible, found, -np.inf).argmax(axis=1) == best).mean() >= 0.98


def test_ivf_experts_without_rows() -> None:
    rows = rows_of([0, 30, 0, 30, 0], 2)
    similarity = IvfIndex(rows, seed=0).similarity(queries(3))
    assert (similarity[:, [0, 2, 4]] == -1).all()
    assert (similarity[:, [1, 3]] > -1).all()
