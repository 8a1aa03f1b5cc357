"""Comparisons of routers as Markdown. Knows no router and measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from router_training.cells import counted
from router_training.compared import (
    Comparison,
    Method,
    Within,
    over_budgets,
    over_pools,
    over_training,
)
from router_training.intervals import Interval, Verdict
from router_training.promises import HEADS, promise_row
from router_training.published import BAR, PUBLISHED

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
        f"{len(c.trained)} questions fitted on, {len(c.group)} judged; best single expert "
        f"{single}. `--router best` chose {c.why}.{_overlap(c)}",
        _table(_ACCURACY, [*_baseline_rows(c), *(_accuracy_row(c, m) for m in c.methods)]),
    ]
    if any(m.card["scope"] is not None for m in c.methods):
        parts += [
            "Intents, and turning away what is nobody's below the threshold found on train:",
            _table(_SCOPE, [_scope_row(m) for m in c.methods]),
        ]
    if c.within is not None:
        parts += _within(c, c.within)
    if any(m.pairs for m in c.methods):
        parts.append(_pairs(c))
    if any(m.latency is not None for m in c.methods):
        parts += [
            "One decision on one core, medians in milliseconds, all routers in turn on each query:",
            _latency(c),
        ]
    return "\n\n".join(parts)


def _overlap(c: Comparison) -> str:
    told = c.overlap.sentence
    return "" if told is None else f" {told[0].upper()}{told[1:]}."


_ACCURACY = [
    "router",
    "accuracy, % (95 %)",
    "over best single",
    f"over {BAR}",
    "uncalibrated",
    "cross-fitted",
    "Brier (base rate)",
    "ECE",
    "Brier, ECE cross-fitted",
    "at 80 % coverage",
]


_SCOPE = ["router", "in scope, % (95 %)", "AUROC (95 %)", "overall (95 %)", "nobody's found"]


def _scope_row(m: Method) -> list[str]:
    s = m.card["scope"]
    overall = s["overall_acc"]
    return [
        m.name,
        f"{_percent(s['in_scope_acc'])} ({_range(*s['in_scope_ci95'])})",
        f"{_decimal(s['auroc'])} ({', '.join(map(_decimal, s['auroc_ci95']))})",
        NONE if overall is None else f"{_percent(overall)} ({_range(*s['overall_ci95'])})",
        _percent(s["out_of_scope_found"]),
    ]


def _baseline_rows(c: Comparison) -> list[list[str]]:
    rows = []
    for key, name in BASELINES.items():
        card = c.baselines[key]
        around = "" if card["ci95"] is None else f" ({_range(*card['ci95'])})"
        over = _points(card["gain_over_best_single"], card["gain_ci95"])
        rows.append([name, _percent(card["avg_acc"]) + around, over, *[NONE] * 7])
    return rows


def _accuracy_row(c: Comparison, m: Method) -> list[str]:
    card = m.card
    ahead = c.ahead(m.name)
    return [
        _named(m.name, c.best),
        f"{_percent(card['avg_acc'])} ({_range(*card['ci95'])})",
        _points(card["gain_over_best_single"], card["gain_ci95"]),
        NONE if m.name == BAR else _interval(ahead),
        NONE if m.name in PUBLISHED else _percent(m.raw),
        _percent(m.cv),
        f"{_decimal(card['brier'])} ({_decimal(card['brier_base_rate'])})",
        _decimal(card["ece"]),
        NONE
        if (own := m.cross_fitted) is None
        else f"{_decimal(own['brier'])} ({_decimal(own['brier_base_rate'])}), "
        f"{_decimal(own['ece'])}",
        _percent(card["acc_at_80_coverage"]),
    ]


def _within(c: Comparison, within: Within) -> list[str]:
    """Of a priced pool: what is reached within budgets, and the knob."""
    shares = list(within.methods[0].budgets)
    heads = [f"{100 * float(share):g} %" for share in shares]
    card = c.baselines["random_mix"]
    mixed = [_percent((within.mix or {}).get(share)) for share in shares]
    area = _decimal(None if card is None else card["aiq"])
    rows = [["random mix of single experts", *mixed, NONE, area, NONE, NONE]]
    for m in within.methods:
        at_best = [NONE, NONE]
        if m.at_best is not None:
            at_best = [_share(m.at_best.share), _interval(m.at_best.over)]
        cells = [_percent(m.budgets[share]) for share in shares]
        mean = _percent(float(m.values.mean()))
        rows.append([_named(m.name, within.best), *cells, mean, _decimal(m.aiq), *at_best])
    parts = [
        "Accuracy within shares of the best single expert's mean cost, in %, settings chosen for "
        f"the mean over them. `--router best --budget …` chose {within.why}.",
        "The last two columns say what the best single expert's accuracy costs. The weight on cost "
        "is fixed beforehand: the greatest with which the router's cross-fitted decisions on train "
        "are as accurate as that expert. Told is what decisions with this weight cost on the "
        "judged questions, in % of what that expert costs there, and by how many points they are "
        "more accurate than it. (– where no weight reaches that on train.)",
        _table(
            [
                "router",
                *heads,
                "mean",
                "AIQ",
                "cost at the best single's accuracy, % (95 %)",
                "accuracy there, over it",
            ],
            rows,
        ),
    ]
    if within.promises is not None:
        parts += [
            f"The knob of {within.best}: shares of the best single expert's quality, promised on "
            "train and achieved on dev.",
            _table(list(HEADS), [promise_row(p) for p in within.promises]),
        ]
    return parts


def _named(name: str, best: str) -> str:
    return f"**{name}**" if name == best else name


def _pairs(c: Comparison) -> str:
    benchmarks = {b: two.questions for m in c.methods for b, two in m.pairs.items()}
    rows = []
    for m in c.methods:
        cells = []
        for benchmark in benchmarks:
            two = m.pairs.get(benchmark)
            if two is None:
                cells += [NONE] * 3
                continue
            cells.append(f"{two.apgr.mean:.3f} ({two.apgr.low:.3f} to {two.apgr.high:.3f})")
            cells += [_share(two.cpt50), _share(two.cpt80)]
        rows.append([_named(m.name, c.best), *cells])
    heads = []
    for benchmark, questions in benchmarks.items():
        heads += [f"{benchmark} ({questions}): APGR (95 %)", "CPT50, %", "CPT80, %"]
    return _table(["router", *heads], rows)


def _latency(c: Comparison) -> str:
    rows = [
        [m.name, f"{m.latency.decision_ms:.1f}", f"{m.latency.without_embedding_ms:.1f}"]
        for m in c.methods
        if m.latency is not None
    ]
    return _table(["router", "with embedding", "without"], rows)


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """What cross-validation chose, and every family, against the published methods."""
    common = [m.name for m in comparisons[0].methods]
    common = [n for n in common if all(n in {m.name for m in c.methods} for c in comparisons)]
    families = [n for n in common if n not in PUBLISHED]
    heads = ["mean difference (95 %)", "better", "significantly worse on"]
    against = [_verdict_row(n, over_pools(comparisons, None, n)) for n in common]
    rows = [_verdict_row(name, over_pools(comparisons, name)) for name in families]
    parts = [
        f"## Over {counted(len(comparisons), 'pool')}",
        "Better: the interval of the mean over pools of the paired differences excludes zero, "
        "and no pool is significantly below (bootstrap over questions, pools of one table "
        "drawn together). Where there are two experts without prices, what is compared is the "
        "mean over all shares of calls to the stronger one.",
        _table(["what cross-validation chose, against", *heads], against),
        _table([f"against the {BAR}", *heads], rows),
        f"The same on the {sum(len(c.trained) for c in comparisons)} questions fitted on (judged "
        f"above: {sum(len(c.group) for c in comparisons)}): each fold is predicted from the "
        "others, where the family is chosen, too. (Settings are chosen on all folds, so every "
        "method's figures are a little too good, those of large grids most.)",
        _table(
            ["what cross-validation chose, against", *heads],
            [_verdict_row(n, over_training(comparisons, n)) for n in common],
        ),
    ]
    priced = [c for c in comparisons if c.within is not None]
    if priced:
        within = [_verdict_row(n, over_budgets(priced, None, n)) for n in common]
        parts += [
            f"Within budgets, the mean over them, on the {len(priced)} priced pools:",
            _table(["what cross-validation chose for budgets, against", *heads], within),
        ]
    return "\n\n".join(parts)


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


def _share(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    return f"{100 * interval.mean:.1f} ({_range(interval.low, interval.high)})"


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
