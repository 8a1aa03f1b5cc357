"""Published routers rebuilt on our families: which form, which settings were searched, which paper.
Knows families by name alone, and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from composer.routing.families.category import CategorySettings
from composer.routing.families.clusters import ClustersSettings
from composer.routing.families.common import FamilySettings
from composer.routing.families.neighbours import NeighboursSettings
from composer.routing.families.predictor import PredictorSettings
from composer.routing.families.skills import SkillsSettings

BAR = "tuned kNN"


@dataclass(frozen=True, slots=True)
class Published:
    """`grid`: the best of these by cross-validation, without the benefit of the doubt that a
    family's own default has. Decided by its own predictions, uncalibrated, as in the paper."""

    name: str
    family: str
    grid: Sequence[FamilySettings]
    paper: str


UNSURE = (0.0, 0.05, 0.1, 0.2, 0.3)
"""Shares of the questions fitted on whose kind is too unsure to be believed."""


def _factored(kind: Literal["mf", "irt"]) -> list[PredictorSettings]:
    """By width and penalty; the widest, which takes thrice as long, with one penalty."""
    tried = [(32, 10.0), (32, 3.0), (32, 30.0), (8, 10.0), (8, 3.0), (8, 30.0), (128, 10.0)]
    return [PredictorSettings(kind=kind, rank=r, penalty=p) for r, p in tried]


PUBLISHED: Mapping[str, Published] = {
    method.name: method
    for method in (
        Published(
            BAR,
            "neighbours",
            [
                NeighboursSettings(k=k, temperature=t)
                for t in (0.1, None, 0.05)
                for k in (10, 20, 40, 80, 160, 320)
            ],
            "2505.12601",
        ),
        Published(
            "Avengers (k-means)",
            "clusters",
            [
                *(
                    ClustersSettings(k=k, prior=0.0, nearest=nearest, beta=beta)
                    for k in (64, 16, 32, 128)
                    for nearest in (4, 2, 8)
                    for beta in (9.0, 3.0, 30.0)
                ),
                *(ClustersSettings(k=k, prior=0.0, nearest=1) for k in (64, 16, 32, 128)),
            ],
            "2505.19797",
        ),
        Published(
            "RouteLLM (matrix factorisation)",
            "predictor",
            _factored("mf"),
            "2406.18665, fitted to outcomes",
        ),
        Published(
            "RouterBench (MLP)",
            "predictor",
            [
                *(PredictorSettings(kind="mlp", penalty=p) for p in (10.0, 3.0, 30.0)),
                PredictorSettings(kind="mlp", rank=8),
                PredictorSettings(kind="mlp", rank=128),
            ],
            "2403.12031",
        ),
        Published(
            "IRT-Router",
            "predictor",
            _factored("irt"),
            "2506.01048",
        ),
        Published(
            "Composition of Experts",
            "category",
            [
                CategorySettings(prior=0.0),
                *(
                    CategorySettings(prior=0.0, kinds="likeliest", sharpness=c, unsure=u)
                    for c in (8.0, 2.0, 32.0)
                    for u in UNSURE
                ),
                *(
                    CategorySettings(
                        prior=0.0, kinds="likeliest", classifier="neighbours", k=k, unsure=u
                    )
                    for k in (20, 10, 40)
                    for u in UNSURE
                ),
            ],
            "2412.01868",
        ),
        Published(
            "Symbolic-MoE",
            "skills",
            [
                SkillsSettings(sharpness=None, prior=0.0, overall=True, nearest=nearest, trim=trim)
                for nearest in (3, 1, 5)
                for trim in (0.05, 0.0)
            ],
            "2503.05641, skills inferred by embedding",
        ),
        Published(
            "logistic regression",
            "predictor",
            [PredictorSettings(kind="logistic", penalty=p) for p in (10.0, 1.0, 3.0, 30.0, 100.0)],
            "one for each expert, as in 2403.12031",
        ),
    )
}
