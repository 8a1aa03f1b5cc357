"""Each expert's chance of success as a parametric function of the query's vectors. One training
loop, four forms of the function (`kind`). Knows no neighbour and no category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from composer.routing.calibrate import sigmoid
from composer.routing.families.common import FamilySettings, dense, expert_means, teaching
from composer.routing.outcomes import Outcomes
from composer.routing.state import State
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier

Kind = Literal["logistic", "mlp", "mf", "irt"]
Weights = Mapping[str, Any]
"""Name → tensor while it is fitted, array afterwards: the forms below take either."""

Shapes = Mapping[str, tuple[int, ...]]

LARGEST = 0.98
"""Means are cut here before their logit is taken, so that an expert never wrong is not certain."""

VIEWS: tuple[View, ...] = ("embedding", "stem", "format")


class PredictorSettings(FamilySettings):
    """`kind`: the form. `penalty` · ‖weights‖² / 2 is added to the log loss summed over outcomes;
    the experts' own intercepts are free, so much of it leaves each expert at its mean (the forms
    with factors, `mf` and `irt`, at once: both factors are penalised). `rank` is
    the width of the hidden layer or of the factors; `steps` bounds the iterations of L-BFGS."""

    kind: Kind = "logistic"
    penalty: float = Field(10.0, gt=0)
    rank: int = Field(32, ge=1)
    steps: int = Field(60, ge=1)


def _logistic(x: Any, w: Weights) -> Any:
    return x @ w["weight"]


def _mlp(x: Any, w: Weights) -> Any:
    """One hidden layer of rectified units."""
    return (x @ w["hidden"] + w["offset"]).clip(min=0) @ w["weight"]


def _mf(x: Any, w: Weights) -> Any:
    """RouteLLM's bilinear score δ(m, q) = w · (v_m ⊙ (W e_q + b)), section 4.2."""
    return ((x @ w["query"] + w["offset"]) * w["scale"]) @ w["model"]


def _irt(x: Any, w: Weights) -> Any:
    """Item response: discrimination a(q)·θ_m minus difficulty b(q), both linear in the query."""
    discrimination = x @ w["discrimination"] + w["offset"]
    return discrimination @ w["ability"] - x @ w["difficulty"]


FORMS: Mapping[Kind, tuple[Callable[[Any, Weights], Any], Callable[[int, int, int], Shapes]]] = {
    "logistic": (_logistic, lambda d, e, r: {"weight": (d, e)}),
    "mlp": (_mlp, lambda d, e, r: {"hidden": (d, r), "offset": (r,), "weight": (r, e)}),
    "mf": (
        _mf,
        lambda d, e, r: {"query": (d, r), "offset": (r,), "scale": (r,), "model": (r, e)},
    ),
    "irt": (
        _irt,
        lambda d, e, r: {
            "discrimination": (d, r),
            "offset": (r,),
            "ability": (r, e),
            "difficulty": (d, 1),
        },
    ),
}
"""Kind → logits (n, E) without the experts' intercepts, and the shapes of its weights for d
features, E experts and rank r."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """`weights` as the form names them, `intercept` (E,), `centre` (D,) of the features."""

    name: ClassVar[str] = "predictor"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "logistic and mlp: RouterBench, arXiv 2403.12031; mf: RouteLLM, arXiv 2406.18665, section "
        "4; irt: IRT-Router, arXiv 2506.01048. All fitted to outcomes by log loss, mf too, which "
        "RouteLLM fits to preferences"
    )
    settings: ClassVar[type[BaseModel]] = PredictorSettings

    weights: Mapping[str, FloatArray]
    intercept: FloatArray
    centre: FloatArray
    chosen: PredictorSettings

    @classmethod
    def grid(cls) -> Sequence[PredictorSettings]:
        kinds: tuple[Kind, ...] = ("logistic", "mlp", "mf", "irt")
        tried = [PredictorSettings(kind=k, penalty=p) for k in kinds for p in (10.0, 3.0)]
        return [*tried, *(PredictorSettings(kind=k, penalty=30.0) for k in kinds[:2])]

    @classmethod
    def views(cls, settings: PredictorSettings) -> frozenset[View]:
        return frozenset(VIEWS)

    @classmethod
    def fit(
        cls, features: Features, outcomes: Outcomes, settings: PredictorSettings, seed: int
    ) -> Predictor:
        features, outcomes = teaching(features, outcomes)
        x = dense(features, VIEWS)
        centre = np.asarray(x.mean(axis=0), np.float32)
        quality = np.asarray(outcomes.quality, np.float32)
        weights, intercept = _minimised(x - centre, quality, settings, seed)
        return cls(weights, intercept, centre, settings)

    def predict(self, features: Features) -> FloatArray:
        form, _ = FORMS[self.chosen.kind]
        logits = form(dense(features, VIEWS) - self.centre, self.weights) + self.intercept
        return np.asarray(sigmoid(logits), np.float32)

    def state(self) -> State:
        arrays = {f"weights.{name}": array for name, array in self.weights.items()}
        return State(arrays | {"intercept": self.intercept, "centre": self.centre}, {})

    @classmethod
    def restore(cls, state: State, settings: Any) -> Predictor:
        start = "weights."
        arrays = state.arrays
        weights = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        return cls(weights, arrays["intercept"], arrays["centre"], settings)


def _minimised(
    x: FloatArray, quality: FloatArray, settings: PredictorSettings, seed: int
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Log loss over the known outcomes (which may be fractions) by full-batch L-BFGS from a seeded
    start: deterministic, and no learning rate to choose."""
    import torch  # costs seconds; serving a fitted predictor needs none of it

    form, shapes = FORMS[settings.kind]
    rng = np.random.default_rng(seed)
    start = {
        name: rng.standard_normal(shape) / np.sqrt(shape[0]) * (settings.kind != "logistic")
        for name, shape in shapes(x.shape[1], quality.shape[1], settings.rank).items()
    }
    mean = np.clip(expert_means(quality), 1 - LARGEST, LARGEST)

    def parameter(array: npt.NDArray[Any]) -> Any:
        return torch.tensor(np.asarray(array, np.float32), requires_grad=True)

    weights = {name: parameter(array) for name, array in start.items()}
    intercept = parameter(np.log(mean / (1 - mean)))
    known = torch.tensor(~np.isnan(quality))
    target = torch.tensor(np.nan_to_num(quality))
    rows = torch.tensor(x)
    optimizer = torch.optim.LBFGS(
        [*weights.values(), intercept],
        max_iter=settings.steps,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Any:
        optimizer.zero_grad()
        logits = form(rows, weights) + intercept
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        )
        size = sum((w**2).sum() for w in weights.values())
        value = (each * known).sum() + settings.penalty / 2 * size
        value.backward()
        return value

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    finally:
        torch.set_num_threads(threads)
    fitted = {name: w.detach().numpy().copy() for name, w in weights.items()}
    return fitted, intercept.detach().numpy().copy()
