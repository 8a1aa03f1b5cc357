"""Signs of whether a question is anybody's, read off its vector and the experts' margins. Knows
intents as numbers; what the signs amount to is `scope.py`'s."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.families.common import chunks, softmax
from composer.routing.families.labels import Labels
from composer.routing.state import State, packed, part_of
from composer.types import FloatArray

NEAREST, TEMPERATURE = 20, 0.05
"""Neighbours who vote, and how fast the farther ones count for less."""

SHRINKAGE = 0.3
"""How far the covariance within intents is drawn to a multiple of the identity."""

SHARPNESS = 50.0
"""Inverse penalty of the logistic regression."""

NOBODY = "nobody"


@dataclass(frozen=True, slots=True, eq=False)
class Familiar:
    """`labels` tells the intents and nobody's apart by the vector alone. `rows` (m, d) are the
    vectors that are somebody's, `owner` (m,) whose. `whitening` (d, d) makes the covariance within
    intents the identity, `means` (C, d) are theirs after it.

    Where two views of a question disagree on whether it is anybody's, neither is to be trusted
    alone: a threshold on the best margin finds fewer of clinc150's out-of-scope queries than all
    these together.
    """

    labels: Labels
    rows: FloatArray
    owner: npt.NDArray[np.int32]
    whitening: FloatArray
    means: FloatArray

    @classmethod
    def fit(cls, vectors: FloatArray, owner: npt.NDArray[np.integer], experts: int) -> Familiar:
        """Vectors (n, d) and whose they are (n,): `experts` is nobody. Both kinds are there."""
        kinds = [NOBODY if o == experts else str(o) for o in owner.tolist()]
        labels = Labels.fit({"embedding": vectors}, kinds, SHARPNESS)
        some = owner < experts
        # In half precision, as they are kept.
        rows = np.asarray(np.asarray(vectors[some], np.float16), np.float32)
        found, number = np.unique(owner[some], return_inverse=True)
        hot = np.eye(len(found), dtype=np.float32)[number]
        means = (hot.T @ rows) / hot.sum(axis=0)[:, None]  # (C, d)
        rest = rows - means[number]
        spread = (rest.T @ rest / len(rest)).astype(np.float64)  # (d, d)
        even = float(np.trace(spread)) / len(spread) + 1e-9
        spread = (1 - SHRINKAGE) * spread + SHRINKAGE * even * np.eye(len(spread))
        root = np.linalg.inv(np.linalg.cholesky(spread)).astype(np.float32)
        return cls(labels, rows, np.asarray(owner[some], np.int32), root, means @ root.T)

    def signs(self, vectors: FloatArray, margin: FloatArray) -> FloatArray:
        """Vectors (n, d) and margins (n, E + 1), nobody's last → (n, 7), each larger where a
        question is more likely somebody's: the best margin, how far it is ahead of the second,
        nobody's negated; the log odds of the vector's being nobody's, negated; the largest cosine,
        the share of the neighbours' votes for the expert with the best margin, and the Mahalanobis
        distance to the nearest intent, negated."""
        own = margin[:, :-1]
        best = own.argmax(axis=1)
        two = -np.partition(-own, min(1, own.shape[1] - 1), axis=1)[:, :2]
        cosine, share = self._neighbours(vectors, best)
        return np.stack(
            [
                two[:, 0],
                two[:, 0] - two[:, -1],
                -margin[:, -1],
                self._log_odds(vectors),
                cosine,
                share,
                -self._distance(vectors),
            ],
            axis=1,
        ).astype(np.float32)

    def _log_odds(self, vectors: FloatArray) -> FloatArray:
        posterior = self.labels.posterior({"embedding": vectors})
        nobody = np.array([name == NOBODY for name in self.labels.names])
        low = np.float32(1e-20)
        inside, outside = posterior[:, ~nobody].sum(axis=1), posterior[:, nobody].sum(axis=1)
        return np.asarray(np.log(inside + low) - np.log(outside + low), np.float32)

    def _neighbours(
        self, vectors: FloatArray, best: npt.NDArray[np.integer]
    ) -> tuple[FloatArray, FloatArray]:
        cosine = np.empty(len(vectors), np.float32)
        share = np.empty(len(vectors), np.float32)
        k = min(NEAREST, len(self.rows))
        for part in chunks(len(vectors)):
            near = vectors[part] @ self.rows.T  # (c, m)
            place = np.argpartition(-near, k - 1, axis=1)[:, :k]
            near = np.take_along_axis(near, place, axis=1)
            cosine[part] = near.max(axis=1)
            agree = self.owner[place] == best[part, None]
            share[part] = (softmax(near / np.float32(TEMPERATURE)) * agree).sum(axis=1)
        return cosine, share

    def _distance(self, vectors: FloatArray) -> FloatArray:
        white = vectors @ self.whitening.T  # (n, d)
        squared = (white**2).sum(axis=1, keepdims=True) + (self.means**2).sum(axis=1)
        squared = squared - 2 * (white @ self.means.T)
        return np.asarray(np.sqrt(np.maximum(squared.min(axis=1), 0)), np.float32)

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "rows": np.asarray(self.rows, np.float16),
            "owner": self.owner,
            "whitening": self.whitening,
            "means": self.means,
        }
        return packed({"labels": self.labels.state(), "own": State(arrays, {})})

    @classmethod
    def restore(cls, state: State) -> Familiar:
        a = part_of(state, "own").arrays
        return cls(
            Labels.restore(part_of(state, "labels")),
            np.asarray(a["rows"], np.float32),
            a["owner"],
            a["whitening"],
            a["means"],
        )
