"""`router-training compare`: all families and published methods on one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router_training.console import (
    Data,
    Experts,
    Json,
    Pool,
    Prices,
    Seed,
    Skills,
    Split,
    WithoutTrained,
    bars,
    named_experts,
    outcomes_of,
    told_plainly,
    written,
)


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
    without_trained: WithoutTrained = False,
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
                without_trained=without_trained,
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
        "trained_on": result.overlap.as_json(),
        "routers": cards,
        "baselines": result.baselines,
    }
    if not written(plain, as_json):
        print(markdown([result]), end="")
