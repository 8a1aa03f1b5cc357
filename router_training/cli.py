"""The command line: train · evaluate · compare, and what `commands/` holds. Decides nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from router_training.commands import collect, join, profile, report, select, votes
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
    judged_by,
    named_experts,
    number,
    out,
    outcomes_of,
    percent,
    refuse,
    say,
    told_plainly,
    written,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _whole() -> None:
    """Train routers on labelled outcomes, and judge them."""


@app.command()
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
        from router_training.embedding import open_embedding
        from router_training.train import train as fit

        if dev is None and dev_split is not None:
            refuse("--dev-split needs --dev; name the file to judge on")
        names = named_experts(data, experts, pool)
        outcomes = outcomes_of(data, names, split, prices, skills=skills)
        judged = None
        if dev is not None:
            judged = outcomes_of(dev, names or outcomes.experts, dev_split, prices, judging=True)
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            model = fit(
                outcomes,
                router,
                embedding.kept.encode,
                embedding.stamp,
                dev=judged,
                source=Path(data).name if "://" not in data else "database",
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
        say(f"chosen: {metrics['choice']['why']}")
    say(f"settings: {json.dumps(manifest.settings)}")
    if "note" in metrics:
        say(f"note: {metrics['note']}")
    for title, key in (("cross-fitted on train", "cross_fitted"), ("dev", "dev")):
        if (card := metrics.get(key)) is not None:
            say(f"{title}: {_card_line(card)}")
            if card["scope"] is not None:
                say(f"{title}: {_scope_line(card['scope'])}")
    say(f"{len(manifest.experts)} experts, {manifest.data.questions} questions → {out_folder}")


@app.command()
def evaluate(
    artefact: Annotated[list[Path], typer.Option(help="An artefact's folder; repeat for several.")],
    data: Data,
    prices: Prices = None,
    split: Split = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Judge artefacts on outcomes that they were not fitted on, beside the baselines."""
    with told_plainly():
        from router_training.embedding import open_embedding
        from router_training.evaluate import evaluate as judge

        outcomes = judged_by(artefact, data, split, prices)
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            result = judge(
                artefact,
                outcomes,
                embedding.kept,
                encode_anew=embedding.encode_anew,
                seed=seed,
                progress=progress,
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
            say(f"{j.name}: {_scope_line(scope)}")


@app.command()
def compare(
    data: Data,
    dev: Annotated[str, typer.Option(help="Outcomes to judge on, once.")],
    experts: Experts = None,
    pool: Pool = None,
    prices: Prices = None,
    skills: Skills = None,
    split: Split = None,
    dev_split: Annotated[
        str | None, typer.Option(help="As --split, for --dev; default: the whole file.")
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help="Only this family beside the tuned kNN; repeat for several."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Compare all families and the published methods on one table: settings by cross-validation,
    judged on dev. Markdown."""
    with told_plainly():
        from composer.routing.families import FAMILIES
        from router_training.compare import compare as judge
        from router_training.comparison import markdown
        from router_training.embedding import open_embedding
        from router_training.published import BAR, PUBLISHED
        from router_training.tables import name_of

        names = named_experts(data, experts, pool)
        outcomes = outcomes_of(data, names, split, prices, skills=skills)
        judged = outcomes_of(dev, outcomes.experts, dev_split, prices, judging=True)
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            result = judge(
                name_of(Path(data)),
                pool or "all",
                outcomes,
                judged,
                embedding.kept.encode,
                embedding.stamp,
                families=router or tuple(FAMILIES),
                published=(BAR,) if router else tuple(PUBLISHED),
                seed=seed,
                progress=progress,
            )
    cards = {
        m.name: {"settings": m.settings, "cross_fitted": m.cv, **m.card} for m in result.methods
    }
    plain = {
        "table": result.table,
        "pool": result.name,
        "experts": result.experts,
        "best": result.best,
        "why": result.why,
        "routers": cards,
        "baselines": result.baselines,
    }
    if not written(plain, as_json):
        print(markdown([result]), end="")


def _card_line(card: dict[str, Any]) -> str:
    gain = card["gain_over_best_single"]
    parts = [
        f"accuracy {percent(card['avg_acc'], card['ci95'])}",
        f"over best single {'–' if gain is None else f'{100 * gain:+.1f}'}",
        f"Brier {number(card['brier'])} (base rate {number(card['brier_base_rate'])})",
        f"ECE {number(card['ece'])}",
    ]
    return ", ".join(parts)


def _scope_line(scope: Mapping[str, Any]) -> str:
    parts = [
        f"in scope {percent(scope['in_scope_acc'], scope['in_scope_ci95'])}",
        f"AUROC of confidence {scope['auroc']:.4f}",
    ]
    if scope["threshold"] is not None:
        parts.append(
            f"turned away below {scope['threshold']:.3f}: "
            f"{percent(scope['overall_acc'], scope['overall_ci95'])} of all end well, "
            f"{percent(scope['out_of_scope_found'], None)} of what is nobody's is found"
        )
    return ", ".join(parts)


app.command()(collect.collect)
app.command()(profile.profile)
app.command()(join.join)
app.command()(votes.votes)
app.command()(report.report)
app.command()(select.select)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
