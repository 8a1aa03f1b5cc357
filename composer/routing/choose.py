"""The one place that turns scores and costs into a plan. Pure: no model, clock or network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.routing.aims import Aim
from composer.routing.base import Scores
from composer.types import BoolArray, Choice, FloatArray, Plan, Policy

SHOWN_SCORES = 8
"""How many experts' scores a plan carries: enough to explain, few enough to log."""


def all_of_them(experts: int) -> tuple[int, int]:
    """Of a strategy that asks every expert of a plan: the fewest and the most calls."""
    return experts, experts


def choose(
    scores: Scores,
    aim: Aim,
    policy: Policy,
    resident: BoolArray | None = None,
    session: BoolArray | None = None,
    calls: Callable[[int], tuple[int, int]] = all_of_them,
) -> Plan:
    """The policy's plan for these scores.

    Experts are ordered by `quality − weight · cost` (`aims.py`); ties go to the earlier expert. In
    this order the rules apply:

    - The best quality is below the policy's threshold: its default expert alone, where eligible.
    - The null expert (the base model, AdaMoE's word) is worse than the best by no more than its
      margin: it alone answers.
    - `min_quality`: experts below it are passed over; where all are, the best by quality answers.
    - `k` experts, or with `top_p` as few as make it that likely that one of them is right, were
      they right independently of each other: at most `k`.
    - The best chosen one's quality is below the policy's floor of confidence: more experts, or
      the best by quality, as the policy says. `Plan.confident` is False if what is chosen is still
      below.

    An aim that one expert meets best has that one first, whatever it is expected to do here. Under
    an aim at a spend (`Aim.room`) experts behind the first are dropped from where they cost more
    together than there is room for (`reasons.over_budget`), if `calls` says that the strategy asks
    them at all; and neither the null expert nor a stronger one takes the place of the first where
    it costs more than that by as much. What whoever took its place costs more is room no longer.
    The default expert does whatever it costs.

    Weights are the chosen experts' qualities, normalised.

    `resident` (E,) says whose weights are loaded; None: nobody is preferred for it. Residents that
    reach the threshold are chosen as if they were better by the policy's `tolerance`. So whoever
    takes the place of a better expert is worse by at most that, and no further resident could take
    one. The reasons then name those who gave way, and by how much the plan is worse (`gave_up`: of
    the ordering's value, the mean over its experts).

    `session` (E,) says who answered last in this conversation. Of those, who reach the threshold
    are chosen as if they were better by the policy's `stay`, what reading the conversation anew
    costs another expert; but for one that is not resident, whose prefix is as cold as the others'.
    A swap's price is the tolerance here too: a resident expert of the session is left only for one
    that is better by `stay`, and by `tolerance` more where that one would have to be loaded.
    """
    quality = scores.quality
    eligible = ~np.isnan(quality)
    best = float(np.nanmax(quality))
    utility = np.where(eligible, quality - aim.weight * aim.cost, -np.inf)
    order = np.argsort(-utility, kind="stable")
    order = order[eligible[order]]
    if (named := _column(aim.expert, scores)) is not None:
        order = np.concatenate([[named], order[order != named]])
    shown = order[:SHOWN_SCORES]

    def room_left(first: int) -> float:
        """For calls behind it, where it is not the one that the aim puts first."""
        return aim.room - max(0.0, float(aim.cost[first] - aim.cost[order[0]]))

    if best < policy.threshold and (default := _column(policy.default_expert, scores)) is not None:
        told = {
            "rule": "below_threshold",
            "best": best,
            "threshold": policy.threshold,
            **aim.reasons,
        }
        return _plan(policy, scores, np.array([default]), shown, told, explained=False)
    null = _column(policy.null_expert, scores)
    near = null is not None and quality[null] >= best - policy.null_margin
    if null is not None and near and room_left(null) >= 0:
        told = {"rule": "null_expert", "best": best, **aim.reasons}
        return _plan(policy, scores, np.array([null]), shown, told)

    good = quality[order] >= policy.min_quality
    if policy.min_quality > 0:
        order = order[good] if good.any() else order[[quality[order].argmax()]]
    reasons: dict[str, Any] = {"rule": aim.rule, **aim.reasons}
    chosen = order[: policy.k]
    plain = chosen
    trusted = order[quality[order] >= policy.threshold]
    if named is None:
        for rule, bonus in _bonuses(policy, resident, session, trusted, len(quality)):
            preferred = _preferred(utility, bonus, order, len(plain))
            if set(preferred) != set(chosen):
                reasons["rule"] = rule
            chosen = preferred
    if gone := [scores.experts[i] for i in plain if i not in chosen]:
        gave_up = float(utility[plain].mean() - utility[chosen].mean())
        reasons |= {"instead_of": gone, "gave_up": round(gave_up, 6)}
    if policy.top_p is not None:
        chosen = chosen[: _enough(quality[chosen], policy.top_p)]
    unsure = policy.unsure
    in_doubt = unsure is not None and float(quality[chosen].max()) < unsure.below
    if unsure is not None and in_doubt:
        reasons["unsure"] = unsure.do
        if unsure.do == "ask_more":
            chosen = order[: max(unsure.k, len(chosen))]
        elif unsure.do == "ask_stronger":
            stronger = order[np.argsort(-quality[order], kind="stable")][: len(chosen)]
            chosen = stronger if room_left(int(stronger[0])) >= 0 else chosen
    if calls(len(chosen))[1] > 1:
        within = chosen[: 1 + _affordable(aim.cost[chosen[1:]], room_left(int(chosen[0])))]
        if len(within) < len(chosen):
            reasons["over_budget"] = [scores.experts[i] for i in chosen[len(within) :]]
        chosen = within
    if in_doubt:
        reasons["best"] = round(float(quality[chosen].max()), 4)
    shown = np.concatenate([shown, chosen[:SHOWN_SCORES]])  # the chosen may stand further down
    return _plan(policy, scores, chosen, shown, reasons)


def most_experts(policy: Policy) -> int:
    """That a plan of the policy has. A stronger one that may take the place of the first counts,
    since it costs as if it came on top."""
    unsure = policy.unsure
    more = 0 if unsure is None else {"say": 0, "ask_more": unsure.k, "ask_stronger": 2}[unsure.do]
    return max(policy.k, more)


def _affordable(cost: FloatArray, room: float) -> int:
    """How many of the first of (k,) costs fit together."""
    total = np.cumsum(cost, dtype=np.float64)
    return int(np.searchsorted(total, room * (1 + 1e-9), side="right"))


def _plan(
    policy: Policy,
    scores: Scores,
    chosen: npt.NDArray[np.intp],
    shown: npt.NDArray[np.intp],
    reasons: dict[str, Any],
    *,
    explained: bool = True,
) -> Plan:
    quality = scores.quality[chosen].astype(np.float64)  # (k,)
    total = float(quality.sum())
    weights = quality / total if total > 0 else np.full(len(chosen), 1 / len(chosen))
    experts = tuple(scores.experts[i] for i in chosen)
    if explained:
        evidence = {e: dict(scores.reasons[e]) for e in experts if e in scores.reasons}
        reasons = {**reasons, "evidence": evidence}
    floor = policy.unsure
    reasons = {**reasons, **scores.told}
    return Plan(
        policy=policy.id,
        strategy=policy.strategy.name,
        choices=tuple(
            Choice(e, float(w), float(q)) for e, w, q in zip(experts, weights, quality, strict=True)
        ),
        calls=experts,
        scores={scores.experts[i]: round(float(scores.quality[i]), 4) for i in shown},
        reasons=reasons,
        confident=None if floor is None else bool(quality.max() >= floor.below),
    )


def _enough(quality: FloatArray, p: float) -> int:
    """How many of (k,) make it p likely that one of them at least is right."""
    reached = 1 - np.cumprod(1 - np.clip(quality.astype(np.float64), 0, 1))
    return int(np.searchsorted(reached, p - 1e-12)) + 1


def _bonuses(
    policy: Policy,
    resident: BoolArray | None,
    session: BoolArray | None,
    trusted: npt.NDArray[np.intp],
    n_experts: int,
) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """The rules that prefer somebody, in their order, each with what the experts then count for
    more (E,), the rules before it included; only those of the columns `trusted` do."""
    bonus = np.zeros(n_experts)
    if resident is not None and policy.tolerance > 0:
        bonus[trusted] = policy.tolerance * resident[trusted]
        yield "resident_within_tolerance", bonus
    if session is not None and policy.stay > 0:
        warm = session if resident is None else session & resident
        bonus = bonus.copy()
        bonus[trusted] += policy.stay * warm[trusted]
        yield "session_stay", bonus


def _preferred(
    utility: FloatArray, bonus: npt.NDArray[np.float64], order: npt.NDArray[np.intp], k: int
) -> npt.NDArray[np.intp]:
    """(k,) of those in `order` the best by utility (E,) and bonus (E,) together, ordered as there:
    by utility alone. Ties go to the larger bonus, then to the earlier in the order."""
    value = utility[order].astype(np.float64)
    places = np.lexsort((-bonus[order], -(value + bonus[order])))[:k]
    return order[np.sort(places)]


def _column(expert: str | None, scores: Scores) -> int | None:
    """Where an expert stands, None where it may not answer."""
    if expert is None or expert not in scores.experts:
        return None
    column = scores.experts.index(expert)
    return None if np.isnan(scores.quality[column]) else column
