"""Published routers rebuilt on our families: which form, which settings were searched, which paper.
Knows families by name alone, and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


PUBLISHED: Mapping[str, Published] = {
    method.name: method
    for method in (
        Published(
            BAR,
            "neighbours",
            [
                NeighboursSettings(k=k, temperature=t)
                for t in (0.1, None)
                for k in (10, 20, 40, 80, 160)
            ],
            "2505.12601",
        ),
        Published(
            "Avengers (k-means)",
            "clusters",
            [ClustersSettings(k=k, prior=0.0) for k in (64, 16, 32, 128)],
            "2505.19797",
        ),
        Published(
            "RouteLLM (matrix factorisation)",
            "predictor",
            [PredictorSettings(kind="mf", penalty=p) for p in (10.0, 3.0)],
            "2406.18665, fitted to outcomes",
        ),
        Published(
            "RouterBench (MLP)",
            "predictor",
            [PredictorSettings(kind="mlp", penalty=p) for p in (10.0, 3.0, 30.0)],
            "2403.12031",
        ),
        Published(
            "IRT-Router",
            "predictor",
            [PredictorSettings(kind="irt", penalty=p) for p in (10.0, 3.0)],
            "2506.01048",
        ),
        Published(
            "Composition of Experts",
            "category",
            [CategorySettings(prior=0.0)],
            "2412.01868",
        ),
        Published(
            "Symbolic-MoE",
            "skills",
            [
                SkillsSettings(sharpness=None, prior=0.0, overall=True, nearest=nearest)
                for nearest in (3, 1)
            ],
            "2503.05641, skills inferred by embedding",
        ),
        Published(
            "logistic regression",
            "predictor",
            [PredictorSettings(kind="logistic", penalty=p) for p in (10.0, 3.0, 30.0)],
            "one for each expert, as in 2403.12031",
        ),
    )
}
