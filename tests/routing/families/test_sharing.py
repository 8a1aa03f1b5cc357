"""What fits have in common is made once within a scope, and never outside one."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from composer.routing.families.points import Points, solved, table_of
from composer.routing.families.sharing import digest, shared, sharing


def test_equal_keys_share_within_the_scope_alone() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [shared(lambda: "a", make), shared(lambda: "a", make)] == [1, 2]
    with sharing():
        first = shared(lambda: "a", make)
        with sharing():
            assert shared(lambda: "a", make) == first
        assert shared(lambda: "b", make) == first + 1
        assert shared(lambda: "a", make) == first
    assert shared(lambda: "a", make) == first + 2


def test_digests_tell_values_apart_and_nothing_else() -> None:
    x = np.arange(6, dtype=np.float32)
    same = np.concatenate([x, x])[6:]
    assert digest(x, csr_matrix(x)) == digest(same, csr_matrix(same))
    assert digest({"b": x, "a": "t"}) == digest({"a": "t", "b": x})
    unlike = [x, x + 1, x.reshape(2, 3), x.astype(np.float64), csr_matrix(x), ["a", "b"], ["ab"]]
    assert len({digest(value) for value in unlike}) == len(unlike)
    assert digest("a", "b") != digest("ab")


def test_landmarks_of_some_rows_are_those_of_a_table_of_them() -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((60, 5)).astype(np.float32)
    points = Points(dense, None, np.einsum("nd,nd->n", dense, dense))
    seen = rng.random(60) < 0.7
    target = rng.standard_normal((int(seen.sum()), 3)).astype(np.float32)
    _, table = table_of(points, 10, 0)  # more questions than may be exact: landmarks
    alpha = solved(table, target, 0.3, [0.5], seen)[0]
    near = np.exp(-0.3 * table.questions[seen].astype(np.float64))
    inner = np.exp(-0.3 * table.centres.astype(np.float64))
    expected = np.linalg.lstsq(near.T @ near + 0.5 * inner, near.T @ target, rcond=None)[0]
    np.testing.assert_allclose(near @ alpha, near @ expected, atol=2e-3)
