"""`router-training evaluate`: artefacts judged on outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from router_training.console import (
    Data,
    Json,
    Prices,
    Seed,
    Split,
    WithoutTrained,
    evaluated,
    number,
    out,
    percent,
    promised,
    say,
    scope_line,
    told_plainly,
    written,
)


def evaluate(
    artefact: Annotated[list[Path], typer.Option(help="An artefact's folder; repeat for several.")],
    data: Data,
    prices: Prices = None,
    split: Split = None,
    without_trained: WithoutTrained = False,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Judge artefacts on outcomes that they were not fitted on, beside the baselines."""
    with told_plainly():
        result = evaluated(
            artefact,
            data,
            split,
            prices,
            without_trained=without_trained,
            seed=seed,
            as_json=as_json,
        )
    if written(result.as_json(), as_json):
        return
    table = Table("name", "router", "accuracy (95 %)", "Brier", "ECE", "mean cost", "decision, ms")
    for name, card in result.baselines.items():
        if card is not None:
            spread = card.get("ci95")
            table.add_row(
                name,
                "",
                percent(card["avg_acc"], spread),
                "–",
                "–",
                number(card.get("mean_cost")),
                "–",
            )
    for j in result.artefacts:
        table.add_row(
            escape(j.name),
            j.router,
            percent(j.card["avg_acc"], j.card["ci95"]),
            f"{number(j.card['brier'])} (base rate {number(j.card['brier_base_rate'])})",
            number(j.card["ece"]),
            number(j.card["mean_cost"]),
            f"{j.latency.decision_ms:.1f}, without embedding {j.latency.without_embedding_ms:.1f}",
        )
    out.print(table)
    for j in result.artefacts:
        if (scope := j.card["scope"]) is not None:
            say(f"{j.name}: {scope_line(scope)}")
        if (told := j.overlap.sentence) is not None:
            say(f"{j.name}: {told}")
        if j.knob is not None:
            out.print(promised(f"the knob of {j.name}", j.knob))
