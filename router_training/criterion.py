"""What settings and families are chosen by: what the decisions of predictions earn, question by
question. Knows no family."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from composer.routing.family import decided
from composer.routing.outcomes import Outcomes
from composer.types import FloatArray
from router_training.cells import listed
from router_training.curves import operating_points
from router_training.errors import NoBudget, TrainingError
from router_training.measures import earned

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Criterion:
    """What settings and families are chosen by: the mean quality of the decisions. Without
    `budgets` those for quality alone; with them the mean over decisions within each budget, US
    dollars a question, by `expected_cost` (n, E). With `strong`, the column of the better of two
    experts without prices, the mean over all shares of calls to it (see `over_shares`)."""

    budgets: tuple[float, ...] = ()
    expected_cost: FloatArray | None = None
    strong: int | None = None

    @property
    def words(self) -> str:
        """What the mean is of."""
        if self.budgets:
            return "mean quality within the budgets"
        if self.strong is not None:
            return "mean quality over all shares of calls to the stronger expert"
        return "mean quality of its decisions"

    def values(self, predicted: FloatArray, outcomes: Outcomes) -> Float64:
        """(n,) what the decisions of these predictions (n, E) earn, question by question; NaN where
        a question is not `decidable`. Raises TrainingError where a cost is missing, NoBudget where
        no budget can be kept."""
        rows = outcomes.decidable
        out = np.full(len(outcomes), np.nan)
        if rows.any():
            cost = None if self.expected_cost is None else self.expected_cost[rows]
            out[rows] = self._earned(predicted[rows], cost, outcomes.rows(rows))
        return out

    def _earned(
        self, predicted: FloatArray, expected_cost: FloatArray | None, outcomes: Outcomes
    ) -> Float64:
        if self.strong is not None:
            return over_shares(predicted, outcomes, self.strong)
        if not self.budgets:
            return earned(outcomes.quality, decided(predicted, outcomes.known))
        found = None
        if expected_cost is not None:
            found = operating_points(predicted, expected_cost, outcomes)
        if found is None:
            raise TrainingError(
                "budgets need the cost of every outcome; give prices, or choose by accuracy"
            )
        points, chosen = found
        within = []
        for budget in self.budgets:
            if (at := points.mixed(budget)) is not None:
                low, high, share = at
                one, other = (earned(outcomes.quality, chosen[p]) for p in (low, high))
                within.append((1 - share) * one + share * other)
        if not within:
            raise NoBudget(
                f"no budget can be kept: the cheapest choice costs {points.cost[0]:.3g} US dollars "
                f"a question, the largest budget is {max(self.budgets):.3g}; name a larger one"
            )
        return np.asarray(np.mean(within, axis=0), np.float64)


def need_prices(outcomes: Outcomes, source: str = "") -> None:
    """Raises TrainingError where an outcome has no cost, so that no budget means anything: it names
    the experts. `source` is the file that the outcomes are from."""
    if outcomes.priced:
        return
    lacking = np.asarray((np.isnan(outcomes.cost) & outcomes.known).any(axis=0))
    unpriced = [expert for expert, lacks in zip(outcomes.experts, lacking, strict=True) if lacks]
    place = f"{source}: " if source else ""
    raise TrainingError(
        f"{place}budgets need the cost of every outcome, and outcomes of {listed(unpriced)} have "
        "none; add costs or lengths with a table of prices (models.csv beside the data, or "
        "--prices), leave these experts out, or choose by accuracy, without budgets"
    )


def need_decisions(outcomes: Outcomes, place: str) -> None:
    """Raises TrainingError where no question is `decidable`. `place` is what needs one."""
    if not outcomes.decidable.any():
        raise TrainingError(
            f"{place}: none of the {len(outcomes)} questions has known outcomes of two experts, so "
            "nothing tells a better decision from a worse one; ask several experts the same "
            "questions (`router-training collect`), or name one family and no budget for `train`"
        )


def over_shares(predicted: FloatArray, outcomes: Outcomes, strong: int) -> Float64:
    """(n,) what each question earns in the mean over all shares of calls to the stronger of two
    experts, those that need it most first. The questions are ranked within their benchmark; one
    that stands at rank r of 0 to 1 is answered by the weaker expert at the first r of the shares.
    The mean is that of the two experts plus the gap times (APGR − ½), without APGR's bins."""
    need = predicted[:, strong].astype(np.float64) - predicted[:, 1 - strong]
    of = np.asarray(outcomes.benchmark)
    rank = np.empty(len(need))
    for benchmark in np.unique(of):
        here = of == benchmark
        rank[here] = (rankdata(-need[here]) - 0.5) / here.sum()
    strongly, weakly = (outcomes.quality[:, e].astype(np.float64) for e in (strong, 1 - strong))
    return np.asarray(rank * weakly + (1 - rank) * strongly, np.float64)
