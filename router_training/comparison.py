"""Comparisons of routers as Markdown. Knows no router and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router_training.compare import BAR, Comparison, Method, over_pools
from router_training.intervals import Interval, Verdict

NONE = "–"

BASELINES = {
    "random": "random",
    "best_single": "best single",
    "category_best": "best by category, label known",
    "oracle": "oracle",
}


def markdown(comparisons: Sequence[Comparison]) -> str:
    """All pools, then the verdicts over them."""
    return "\n\n".join([*(of_pool(c) for c in comparisons), verdicts(comparisons)]) + "\n"


def of_pool(c: Comparison) -> str:
    """Accuracy with its interval and what else each router reached on the pool's questions."""
    single = c.baselines["best_single"]["expert"]
    parts = [
        f"## {c.table}, {c.name}: {len(c.experts)} experts",
        f"{c.trained} questions fitted on, {len(c.group)} judged; best single expert {single}. "
        f"`--router best` chose {c.why}.",
        _table(_ACCURACY, [*_baseline_rows(c), *(_accuracy_row(c, m) for m in c.methods)]),
    ]
    if any(m.budgets is not None for m in c.methods):
        shares = list(c.mix or next(m.budgets for m in c.methods if m.budgets is not None))
        heads = [f"{100 * float(share):g} %" for share in shares]
        parts += [
            "Accuracy within shares of the best single expert's mean cost, in %, and the least "
            "share at which its accuracy is reached:",
            _table(
                ["router", *heads, "AIQ", "cost of the best single's accuracy"],
                [_mix_row(c, shares), *(_budget_row(m, shares) for m in c.methods)],
            ),
        ]
    if (kept := c.of(c.best).promises) is not None:
        parts += [
            f"The knob of {c.best}: quality asked as a share of the best single expert's on train.",
            _table(
                [
                    "asked",
                    "promised, % (95 %)",
                    "achieved",
                    "within",
                    "share here",
                    "cost, US dollars",
                ],
                [_promise_row(promise) for promise in kept],
            ),
        ]
    if any(m.pairs for m in c.methods):
        parts.append(_pairs(c))
    return "\n\n".join(parts)


_ACCURACY = [
    "router",
    "accuracy, % (95 %)",
    "over best single",
    f"over {BAR}",
    "uncalibrated",
    "cross-fitted",
    "Brier (base rate)",
    "ECE",
    "at 80 % coverage",
]


def _baseline_rows(c: Comparison) -> list[list[str]]:
    rows = []
    for key, name in BASELINES.items():
        card = c.baselines[key]
        around = "" if card["ci95"] is None else f" ({_range(*card['ci95'])})"
        over = _points(card["gain_over_best_single"], card["gain_ci95"])
        rows.append([name, _percent(card["avg_acc"]) + around, over, *[NONE] * 6])
    return rows


def _accuracy_row(c: Comparison, m: Method) -> list[str]:
    card = m.card
    name = f"**{m.name}**" if m.name == c.best else m.name
    ahead = c.ahead(m.name)
    return [
        name,
        f"{_percent(card['avg_acc'])} ({_range(*card['ci95'])})",
        _points(card["gain_over_best_single"], card["gain_ci95"]),
        NONE if m.name == BAR else _interval(ahead),
        _percent(m.raw),
        _percent(m.cv),
        f"{_decimal(card['brier'])} ({_decimal(card['brier_base_rate'])})",
        _decimal(card["ece"]),
        _percent(card["acc_at_80_coverage"]),
    ]


def _mix_row(c: Comparison, shares: Sequence[str]) -> list[str]:
    mix: Mapping[str, float | None] = c.mix or {}
    card = c.baselines["random_mix"]
    area = None if card is None else card["aiq"]
    cells = [_percent(mix.get(share)) for share in shares]
    return ["random mix of single experts", *cells, _decimal(area), NONE]


def _budget_row(m: Method, shares: Sequence[str]) -> list[str]:
    budgets: Mapping[str, float | None] = m.budgets or {}
    cost = NONE if m.cost_at_best is None else f"{100 * m.cost_at_best:.0f} %"
    cells = [_percent(budgets.get(share)) for share in shares]
    return [m.name, *cells, _decimal(m.card["aiq"]), cost]


def _promise_row(promise: Mapping[str, Any]) -> list[str]:
    return [
        f"{promise['asked']:g}",
        f"{_percent(promise['promised'])} ({_range(*promise['interval'])})",
        f"{_percent(promise['achieved'])} ({_range(*promise['achieved_ci95'])})",
        "yes" if promise["within_interval"] else "no",
        _decimal(promise["achieved_share"]),
        f"{promise['achieved_cost']:.3g}, {promise['promised_cost']:.3g} promised",
    ]


def _pairs(c: Comparison) -> str:
    benchmarks = list(dict.fromkeys(b for m in c.methods for b in m.pairs))
    rows = []
    for m in c.methods:
        cells = []
        for benchmark in benchmarks:
            two = m.pairs.get(benchmark, {})
            apgr = _decimal(two.get("apgr"))
            cells.append(f"{apgr}, {_percent(two.get('cpt50'))}, {_percent(two.get('cpt80'))}")
        rows.append([m.name, *cells])
    heads = [f"{benchmark}: APGR, CPT50, CPT80" for benchmark in benchmarks]
    return _table(["router", *heads], rows)


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """Every family against the tuned kNN, and what cross-validation chose against every family."""
    common = [m.name for m in comparisons[0].methods if m.name != BAR]
    common = [n for n in common if all(n in {m.name for m in c.methods} for c in comparisons)]
    rows = [_verdict_row(name, over_pools(comparisons, name)) for name in common]
    rows.append(_verdict_row("chosen by cross-validation", over_pools(comparisons, None)))
    against = [_verdict_row(n, over_pools(comparisons, None, n)) for n in (BAR, *common)]
    heads = ["mean difference (95 %)", "better", "significantly worse on"]
    return "\n\n".join(
        [
            f"## Over {len(comparisons)} pools",
            "Better: the interval of the mean over pools of the paired differences excludes zero, "
            "and no pool is significantly below (bootstrap over questions, pools of one table "
            "drawn together).",
            _table([f"against the {BAR}", *heads], rows),
            _table(["what cross-validation chose, against", *heads], against),
        ]
    )


def _verdict_row(name: str, v: Verdict) -> list[str]:
    below = [pool for pool, interval in v.pools.items() if interval.below_zero]
    return [name, _interval(v.overall), "yes" if v.better else "no", ", ".join(below) or NONE]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = ["|" + "---|" * len(heads)]
    return "\n".join(
        f"| {' | '.join(cells)} |" if not isinstance(cells, str) else cells
        for cells in [list(heads), *line, *rows]
    )


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _points(mean: float | None, bounds: Sequence[float] | None) -> str:
    if mean is None or bounds is None:
        return NONE
    return f"{100 * mean:+.1f} ({100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    return _points(interval.mean, (interval.low, interval.high))
