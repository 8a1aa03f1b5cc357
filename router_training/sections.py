"""The sections of a report: what is told and drawn of an evaluation. Measures nothing: numbers come
from `evaluate.py` and `portrait.py`, pictures from `plots.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_training.cells import counted
from router_training.evaluate import Evaluation, Judged
from router_training.intervals import Interval
from router_training.page import (
    NOTHING,
    PageTable,
    Row,
    Section,
    dollars,
    gain_of,
    interval,
    number,
    percent,
)
from router_training.plots import BarChart, Bars, Chart, Dot, Line, Words
from router_training.portrait import Backdrop, Level, Portrait
from router_training.promises import HEADS, promise_row

SHARES = (0.05, 0.10, 0.25, 0.50, 1.00)
"""Of the best single expert's mean cost: what the table of budgets shows."""

MOST_PLACES = 16
"""Bars in a picture; the table has them all."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One artefact with what is drawn of it."""

    judged: Judged
    portrait: Portrait

    @property
    def name(self) -> str:
        return self.judged.name


def summary(evaluation: Evaluation) -> Section:
    """The table that `evaluate` prints, and what each router gains."""
    names = {
        "random": "random expert",
        "best_single": "best single",
        "category_best": "best by known category",
        "random_mix": "random mix at best single's cost",
        "oracle": "oracle",
    }
    rows = []
    for judged in evaluation.artefacts:
        card = judged.card
        rows.append(
            Row(
                f"{judged.name} ({judged.router})",
                (
                    percent(card["avg_acc"], card["ci95"]),
                    gain_of(card),
                    f"{number(card['brier'])} ({number(card['brier_base_rate'])})",
                    number(card["ece"]),
                    dollars(card["mean_cost"]),
                    f"{judged.latency.decision_ms:.1f} ({judged.latency.without_embedding_ms:.1f})",
                ),
            )
        )
    for key, card in evaluation.baselines.items():
        if card is not None:
            name = names[key] + (f": {card['expert']}" if "expert" in card else "")
            cells = (
                percent(card["avg_acc"], card.get("ci95")),
                NOTHING if key == "best_single" else gain_of(card),
                NOTHING,
                NOTHING,
                dollars(card.get("mean_cost")),
                NOTHING,
            )
            rows.append(Row(name, cells, quiet=True))
    heads = (
        "",
        "Quality (95 %)",
        "Over best single (95 %)",
        "Brier (base rates)",
        "ECE",
        "US $ per 1,000 questions",
        "Decision, ms (without embedding)",
    )
    return Section(
        "summary",
        "Summary",
        "Quality is the mean score over all questions when the expert with the highest predicted "
        "quality answers. The best single expert is the one of the training data.",
        tables=(PageTable("Routers and baselines", heads, tuple(rows)),),
    )


def costs(drawn: Sequence[Drawn], backdrop: Backdrop) -> Section:
    id, title = "costs", "Quality and cost"
    if backdrop.no_costs:
        return Section(id, title, absent=backdrop.no_costs)
    curves = {d.name: d.portrait.curve for d in drawn if d.portrait.curve is not None}
    if not curves:
        return Section(id, title, absent="no artefact was trained with costs")
    lines = [_line(name, curve) for name, curve in curves.items()]
    if backdrop.mix is not None:
        lines.append(_line("random mix of single experts", backdrop.mix, quiet=True))
    spots = [(s, False) for s in backdrop.experts if s != backdrop.best_single]
    spots += [(backdrop.oracle, True)]
    if backdrop.best_single is not None:
        spots.append((backdrop.best_single, True))
    dots = [
        Dot(
            "best single" if s is backdrop.best_single else s.name, 1000 * s.cost, s.quality.mean, n
        )
        for s, n in spots
        if s.cost is not None
    ]
    spends = [x for line in lines for x in line.x] + [dot.x for dot in dots]
    wide = min(spends) > 0 and max(spends) > 20 * min(spends)
    words = Words(
        "Quality against cost",
        _told_curves(curves, backdrop),
        "US dollars per 1,000 questions" + (", log scale" if wide else ""),
        "mean quality",
    )
    chart = Chart(words, lines, dots, scale="log" if wide else "linear")
    lacking = [d.name for d in drawn if d.name not in curves]
    note = f" Without a curve, for want of prices in training: {', '.join(lacking)}." * bool(
        lacking
    )
    return Section(
        id,
        title,
        "What each router reaches when it spends more or less: it then chooses by predicted "
        "quality minus a price on expected cost. The dashed line draws single experts at random "
        "within the same spend; a router is worth having where it is above." + note,
        chart.svg(),
        "Bands: 95 % intervals. Small dots: single experts.",
        (_budgets(curves, backdrop), *_knobs(drawn), _single_experts(backdrop)),
    )


def _budgets(curves: Mapping[str, Sequence[Level]], backdrop: Backdrop) -> PageTable:
    best = backdrop.best_single
    assert best is None or best.cost is not None  # costs are complete
    whole = None if best is None else best.cost
    rows = []
    every = {**curves, **({} if backdrop.mix is None else {"random mix": backdrop.mix})}
    for name, curve in every.items():
        cells = [NOTHING if whole is None else _within(curve, s * whole) for s in SHARES]
        rows.append(Row(name, tuple(cells), quiet=name not in curves))
    heads = ("", *(f"{100 * share:.0f} %" for share in SHARES))
    return PageTable(
        "quality (95 %) within shares of the best single expert's cost", heads, tuple(rows)
    )


def _knobs(drawn: Sequence[Drawn]) -> list[PageTable]:
    tables = []
    for judged in (d.judged for d in drawn if d.judged.knob is not None):
        rows = [promise_row(promise) for promise in judged.knob or ()]
        told = tuple(Row(asked, tuple(cells)) for asked, *cells in rows)
        title = f"the knob of {judged.name}: shares of the best single expert's quality"
        tables.append(PageTable(title, HEADS, told))
    return tables


def _within(curve: Sequence[Level], budget: float) -> str:
    """At the dearest of the curve's levels that keeps to the budget."""
    inside = [level for level in curve if level.cost <= budget * (1 + 1e-9)]
    return NOTHING if not inside else interval(inside[-1].quality)


def _single_experts(backdrop: Backdrop) -> PageTable:
    ordered = sorted(backdrop.experts, key=lambda s: -s.quality.mean)
    rows = [Row(s.name, (interval(s.quality), dollars(s.cost))) for s in ordered]
    rows.append(
        Row("oracle", (interval(backdrop.oracle.quality), dollars(backdrop.oracle.cost)), True)
    )
    heads = ("", "Quality (95 %)", "US $ per 1,000 questions")
    return PageTable("single experts", heads, tuple(rows))


def parts(drawn: Sequence[Drawn], backdrop: Backdrop) -> Section:
    kind = backdrop.parts_are
    plural = {"benchmark": "benchmarks", "category": "categories"}[kind]
    columns: dict[str, Mapping[str, Interval]] = {d.name: d.portrait.parts for d in drawn}
    columns |= backdrop.parts
    places = sorted(
        {place for parts in columns.values() for place in parts}, key=lambda p: (p == "", p)
    )
    shown = places[:MOST_PLACES]
    bars = [
        Bars(
            name,
            [parts[p].mean if p in parts else None for p in shown],
            [(parts[p].low, parts[p].high) if p in parts else None for p in shown],
            quiet=name in backdrop.parts,
        )
        for name, parts in columns.items()
        if name != "oracle"
    ]
    words = Words(
        f"Quality by {kind}",
        f"Mean quality of {_listed([d.name for d in drawn])} and of the best single expert on each "
        f"of {counted(len(shown), *((kind, plural)))}. The numbers are in the table below.",
        "mean quality",
    )
    rows = tuple(
        Row(
            place or "(none named)",
            tuple(
                interval(parts[place]) if place in parts else NOTHING for parts in columns.values()
            ),
        )
        for place in places
    )
    left = f" The picture shows the first {MOST_PLACES}." if len(places) > len(shown) else ""
    return Section(
        "parts",
        f"By {kind}",
        f"Where a router gains over the best single expert, and where it loses.{left}",
        BarChart(words, [place or "(none named)" for place in shown], bars).svg(),
        "Thin lines: 95 % intervals.",
        (PageTable(f"quality (95 %) by {kind}", ("", *columns), rows),),
    )


def choices(drawn: Sequence[Drawn], backdrop: Backdrop) -> Section:
    columns = {d.name: d.portrait.shares for d in drawn}
    most = {e: max(shares[e] for shares in columns.values()) for e in backdrop.shares}
    experts = sorted(backdrop.shares, key=lambda e: (-most[e], e))
    shown = [e for e in experts if most[e] > 0][:MOST_PLACES]
    bars = [Bars(name, [shares[e] for e in shown]) for name, shares in columns.items()]
    words = Words(
        "Experts chosen",
        "Share of questions that go to each expert. "
        + " ".join(
            f"{name} sends most, {100 * max(shares.values()):.0f} %, to "
            f"{max(shares, key=lambda e: shares[e])}."
            for name, shares in columns.items()
        ),
        "share of questions",
    )
    every = {**columns, "oracle": backdrop.shares}
    rows = tuple(
        Row(e, tuple(f"{100 * shares[e]:.1f} %" for shares in every.values())) for e in experts
    )
    left = len(experts) - len(shown)
    return Section(
        "choices",
        "Experts chosen",
        "Who answers when quality alone counts. The oracle takes the best answer, of equals the "
        "cheapest; equals at one cost, or without costs, share the question.",
        BarChart(words, shown, bars).svg(),
        f"{counted(left, 'expert')} chosen least or never: only in the table." if left else "",
        (PageTable("share of questions by expert", ("", *every), rows),),
    )


def calibration(drawn: Sequence[Drawn]) -> Section:
    id, title = "calibration", "Calibration"
    bins = {d.name: d.portrait.calibration for d in drawn if d.portrait.calibration is not None}
    if not bins:
        return Section(id, title, absent="predictions are missing")
    lines = [Line(name, b.predicted.tolist(), b.quality.tolist()) for name, b in bins.items()]
    sizes = {name: (60 * (b.pairs / b.pairs.sum()) ** 0.5).tolist() for name, b in bins.items()}
    cards = {d.name: d.judged.card for d in drawn}
    told = "; ".join(
        f"{name}: ECE {number(cards[name]['ece'])}, Brier {number(cards[name]['brier'])}"
        for name in bins
    )
    words = Words(
        "Calibration",
        f"Mean outcome against predicted quality; on the diagonal they agree. {told}.",
        "predicted quality",
        "mean outcome",
    )
    chart = Chart(words, lines, percent_x=True, diagonal=True, sizes=sizes)
    rows = tuple(
        Row(name, (percent(p), percent(q), f"{int(n):,}"))
        for name, b in bins.items()
        for p, q, n in zip(b.predicted, b.quality, b.pairs, strict=True)
    )
    return Section(
        id,
        title,
        "Whether a predicted 70 % is right seven times in ten, over all pairs of question and "
        f"expert. {told}.",
        chart.svg(),
        "Larger marks: more pairs.",
        (PageTable("bins", ("", "Predicted", "Outcome", "Pairs"), rows),),
    )


def _line(name: str, levels: Sequence[Level], *, quiet: bool = False) -> Line:
    return Line(
        name,
        [1000 * level.cost for level in levels],
        [level.quality.mean for level in levels],
        [level.quality.low for level in levels],
        [level.quality.high for level in levels],
        quiet,
    )


def _told_curves(curves: Mapping[str, Sequence[Level]], backdrop: Backdrop) -> str:
    parts = [
        f"{name} goes from {percent(c[0].quality.mean)} at {dollars(c[0].cost)} dollars to "
        f"{percent(c[-1].quality.mean)} at {dollars(c[-1].cost)} dollars per 1,000 questions."
        for name, c in curves.items()
    ]
    best = backdrop.best_single
    if best is not None:
        parts.append(
            f"The best single expert, {best.name}, has {percent(best.quality.mean)} at "
            f"{dollars(best.cost)}."
        )
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
