"""`router-training train`: a router from outcomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from router_training.console import (
    Data,
    Experts,
    Json,
    Pool,
    Prices,
    Seed,
    Skills,
    Split,
    bars,
    budget_line,
    card_line,
    gain_line,
    named_experts,
    out,
    outcomes_of,
    promised,
    refuse,
    say,
    scope_line,
    told_plainly,
    written,
)


def train(
    router: Annotated[
        str, typer.Option(help="A family by name; best: the one that cross-validation finds best.")
    ],
    data: Data,
    out_folder: Annotated[Path, typer.Option("--out", help="The artefact's folder.")],
    dev: Annotated[
        str | None, typer.Option(help="Outcomes to judge the result on, once; they decide nothing.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            help="A share of the best single expert's mean cost; repeat for several. Settings are "
            "then chosen by the quality within these budgets, not by the highest.",
        ),
    ] = None,
    experts: Experts = None,
    pool: Pool = None,
    prices: Prices = None,
    skills: Skills = None,
    split: Split = None,
    dev_split: Annotated[
        str | None, typer.Option(help="As --split, for --dev; default: the whole file.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Fit a router on outcomes and write the artefact that a policy in experts.yaml loads."""
    with told_plainly():
        from router_training.criterion import need_prices
        from router_training.embedding import open_embedding
        from router_training.train import train as fit

        if dev is None and dev_split is not None:
            refuse("--dev-split needs --dev; name the file to judge on")
        names = named_experts(data, experts, pool)
        outcomes = outcomes_of(data, names, split, prices, skills=skills)
        judged = None
        if dev is not None:
            judged = outcomes_of(dev, names or outcomes.experts, dev_split, prices, judging=True)
        source = Path(data).name if "://" not in data else "database"
        if budget:
            need_prices(outcomes, source)
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            model = fit(
                outcomes,
                router,
                embedding.kept.encode,
                embedding.stamp,
                dev=judged,
                source=source,
                budgets=tuple(budget or ()),
                seed=seed,
                progress=progress,
            )
        manifest = model.artefact().save(out_folder)
    metrics = manifest.metrics
    if written(
        {
            "artefact": str(out_folder),
            "router": manifest.family,
            "settings": manifest.settings,
            **metrics,
        },
        as_json,
    ):
        return
    if "choice" in metrics:
        table = Table("family", "cross-fitted", "behind the highest (95 %)", "Brier")
        for name, row in metrics["choice"]["families"].items():
            low, high = row["ci95"]
            behind = f"{100 * row['behind']:.2f} ({100 * low:.2f} to {100 * high:.2f})"
            table.add_row(name, f"{100 * row['value']:.2f}", behind, f"{row['brier']:.4f}")
        out.print(table)
        for name, reason in metrics["choice"]["left_out"].items():
            say(f"left out: {name}, since {reason}")
        say(f"chosen: {metrics['choice']['why']}")
    say(f"settings: {json.dumps(manifest.settings)}")
    if "note" in metrics:
        say(f"note: {metrics['note']}")
    for title, key in (("cross-fitted on train", "cross_fitted"), ("dev", "dev")):
        if (card := metrics.get(key)) is not None:
            say(f"{title}: {card_line(card)}")
            if (plainly := gain_line(card, metrics["yardstick"]["best"])) is not None:
                say(f"{title}: {plainly}")
            if (within := budget_line(card)) is not None:
                say(f"{title}: {within}")
            if card["scope"] is not None:
                say(f"{title}: {scope_line(card['scope'])}")
    if (promises := metrics.get("dev_promises")) is not None:
        out.print(promised("the knob on dev", promises))
    say(f"{len(manifest.experts)} experts, {manifest.data.questions} questions → {out_folder}")
