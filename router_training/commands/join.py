"""`router-training join`: another expert for an artefact, without training it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router_training.console import (
    Json,
    Prices,
    Split,
    bars,
    outcomes_of,
    percent,
    say,
    told_plainly,
    written,
)

SHOWN = 0.01
"""A resemblance below that, as with no outcome and general texts, is none."""


def join(
    artefact: Annotated[Path, typer.Option(help="The artefact's folder; it stays as it is.")],
    expert: Annotated[str, typer.Option(help="Its name in the artefact: as a rule, its id.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The new artefact's folder.")],
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    example: Annotated[
        list[str] | None, typer.Option(help="A query that it is for; repeat for several.")
    ] = None,
    registry: Annotated[
        Path | None,
        typer.Option(help="An experts.yaml: what it says of the expert under this id."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Outcomes, its own among them; a few are enough.")
    ] = None,
    prices: Prices = None,
    split: Split = None,
    as_json: Json = None,
) -> None:
    """Add an expert to an artefact by what is said of it and by a few outcomes."""
    with told_plainly():
        from composer.routing.artefact import Artefact
        from router_training.embedding import open_embedding
        from router_training.joining import join as add
        from router_training.loading import load_router
        from router_training.registered import claims_in

        claims = list(example or ()) + ([description] if description else [])
        if registry is not None:
            claims += claims_in(registry, expert)
        outcomes = None if data is None else outcomes_of(data, [expert], split, prices)
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            model = load_router(artefact, embedding.kept).model
            claims = list(dict.fromkeys(text for text in claims if text.strip()))
            model = add(model, expert, embedding.kept.encode, claims=claims, outcomes=outcomes)
        whole: Artefact = model.artefact()
        manifest = whole.save(out_folder)
    stamp = next(one for one in manifest.joined if one.id == expert)
    result = {"artefact": str(out_folder), **stamp.model_dump(mode="json")}
    if written(result, as_json):
        return
    say(
        f"{expert} joined {len(manifest.experts)} experts by {stamp.outcomes} outcomes and "
        f"{stamp.claims} texts; expected quality {percent(stamp.quality, None)} on average"
    )
    shares = {name: share for name, share in stamp.like.items() if share >= SHOWN}
    if shares:
        like = ", ".join(f"{name} ({share:.2f})" for name, share in shares.items())
        say(f"it is taken to share the strengths of {like}")
    if manifest.curve is not None:
        say(
            "the quality-cost curve is that of the others: policies with this expert cannot aim at "
            "`quality` or `max_cost`"
        )
    say(f"→ {out_folder}")
