"""A lower bound on a mean that holds at every look at once, however often and whenever one looks
and stops. Pure numbers: knows no log and no policy.

A test supermartingale for variables with a known lower bound (Howard, Ramdas, McAuliffe & Sekhon
2021, arXiv:1810.08240, by the inequality of Fan, Grama & Liu 2015), mixed over its bets, as for
contextual bandits by Waudby-Smith, Wu, Ramdas, Karampatziakis & Mineiro 2022, "Anytime-valid
off-policy inference for contextual bandits", arXiv:2210.10768. No normality is assumed, and what
large weights do upwards only raises the variance that is seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

BETS = np.array([0.9, 0.5, 0.2, 0.07, 0.02, 0.005])
"""Fractions of the greatest bet; each is best at another number of rows."""

STEPS = 60


def lower_bound(series: Sequence[tuple[Float64, float]], alpha: float = 0.05) -> float:
    """Below the mean, in [−1, 1], with probability 1 − `alpha` for all numbers of rows together.

    `series` are versions of the same rows in the order of their time, (n,) each with the same mean,
    which lies in [−1, 1], and the number b with which every term is at least −b, fixed before the
    rows were seen; the bound is that of all versions together. −1 where nothing is known.
    """
    state = []
    for terms, below in series:
        scale = below + 1
        x = np.asarray(terms, np.float64) / scale
        n = len(x)
        before = np.concatenate([[0.0], np.cumsum(x)[:-1]]) / np.maximum(np.arange(n), 1)
        guess = np.minimum(before, 1 / scale)  # so that no term is below it by more than 1
        state.append((scale, float(x.sum()), n, float(((x - guess) ** 2).sum())))
    cost = -np.log1p(-BETS) - BETS
    bar = np.log(len(state) * len(BETS) / alpha)

    def told(mean: float) -> float:
        """The logarithm of the mixture, unnormalised: falls as the mean rises."""
        logs = [
            BETS * (total - n * mean / scale) - cost * spread for scale, total, n, spread in state
        ]
        return float(np.logaddexp.reduce(np.concatenate(logs)))

    low, high = -1.0, 1.0
    if told(low) < bar:
        return low
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if told(middle) >= bar else (low, middle)
    return low
