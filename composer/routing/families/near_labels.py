"""What kind of question a query is, by the kinds of the questions nearest to it. Knows no expert's
score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.families.common import chunks
from composer.routing.families.sharing import digest, shared
from composer.routing.outcomes import IntArray
from composer.routing.state import State
from composer.routing.views import Features
from composer.types import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class NearLabels:
    """k-nearest-neighbour classification: `rows` (m, d) unit vectors of the questions of a kind,
    `owner` (m,) its number in `names` (C,). All `k` neighbours count the same."""

    names: tuple[str, ...]
    rows: FloatArray
    owner: IntArray
    k: int

    @classmethod
    def fit(cls, features: Features, kinds: Sequence[str], k: int) -> NearLabels:
        """Questions of kind "" are left out. Raises ValueError where that leaves none."""
        kind = np.array(kinds)
        named = kind != ""
        if not named.any():
            raise ValueError("no question has a category to learn; name some")
        names, owner = np.unique(kind[named], return_inverse=True)
        rows = np.ascontiguousarray(features["embedding"][named], np.float32)
        return cls(tuple(str(name) for name in names), rows, np.asarray(owner, np.int64), k)

    def posterior(self, features: Features) -> FloatArray:
        """(n, C) the share of each kind among the k nearest."""
        vectors = features["embedding"]
        out = np.empty((len(vectors), len(self.names)), np.float32)
        for part in chunks(len(vectors)):
            out[part] = self._shares(vectors[part] @ self.rows.T)
        return out

    def of_others(self) -> FloatArray:
        """(m, C) the same of its own questions, none of which counts for itself."""
        return shared(
            lambda: ("near labels of others", digest(self.rows, self.owner), self.k),
            self._of_others,
        )

    def _of_others(self) -> FloatArray:
        out = np.empty((len(self.rows), len(self.names)), np.float32)
        for part in chunks(len(self.rows)):
            cosine = self.rows[part] @ self.rows.T
            cosine[np.arange(len(cosine)), np.arange(len(self.rows))[part]] = -np.inf
            out[part] = self._shares(cosine)
        return out

    def _shares(self, cosine: npt.NDArray[np.float32]) -> FloatArray:
        k = min(self.k, cosine.shape[1])
        near = self.owner[np.argpartition(-cosine, k - 1, axis=1)[:, :k]]  # (n, k)
        return np.asarray((near[:, :, None] == np.arange(len(self.names))).mean(axis=1), np.float32)

    def state(self) -> State:
        values = {"names": list(self.names), "k": self.k}
        return State({"rows": self.rows, "owner": self.owner}, values)

    @classmethod
    def restore(cls, state: State) -> NearLabels:
        a, v = state.arrays, state.values
        return cls(tuple(v["names"]), a["rows"], a["owner"], v["k"])
