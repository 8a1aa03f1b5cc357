"""router-training votes."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from router_training.console import (
    Data,
    Json,
    Seed,
    Skills,
    Split,
    bars,
    err,
    out,
    percent,
    refuse,
    say,
    told_plainly,
    written,
)


class ExtractorName(StrEnum):
    exact = "exact"
    number = "number"
    choice = "choice"
    literal = "literal"
    regex = "regex"


def votes(
    artefact: Annotated[Path, typer.Option(help="The router whose scores the vote will read.")],
    data: Data,
    out_file: Annotated[Path, typer.Option("--out", help="The head, a JSON file.")],
    extractor: Annotated[
        ExtractorName,
        typer.Option(help="How answers are compared, as the policy's strategy will."),
    ] = ExtractorName.exact,
    pattern: Annotated[str | None, typer.Option(help="Of the regex extractor.")] = None,
    most: Annotated[int, typer.Option(min=2, max=12, help="Experts asked at most.")] = 5,
    skills: Skills = None,
    split: Split = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Learn from recorded answers how far a vote is to be believed, and when to ask no more."""
    with told_plainly():
        from composer.durable import replace_file
        from composer.routing.artefact import read_manifest
        from composer.routing.model import check_embedder
        from composer.strategies.extract import make_extractor
        from router_training.data import load
        from router_training.embedding import open_embedding
        from router_training.profiles import annotated, read_profile
        from router_training.votes import votes as fit

        try:
            make_extractor(extractor.value, pattern)
        except ValueError as error:
            refuse(str(error))
        manifest = read_manifest(artefact)
        loaded = load(data, split=split)
        for note in loaded.notes:
            err.print(f"{data}: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
        if skills is not None:
            annotations = read_profile(skills).annotations
            loaded = replace(loaded, outcomes=annotated(loaded.outcomes, annotations))
        with bars(as_json) as progress:
            embedding = open_embedding(progress)
            check_embedder(manifest, embedding.stamp, artefact)
            head = fit(
                loaded,
                manifest,
                embedding.kept.encode,
                extractor=extractor.value,
                pattern=pattern,
                most=most,
                seed=seed,
                progress=progress,
            )
        replace_file(out_file, [head.text().encode()])
    told = {"head": str(out_file), **head.model_dump(mode="json")}
    if written(told, as_json):
        return
    table = Table("mean calls", *(f"first {first}" for first in head.curves))
    for calls in sorted({round(s.calls * 2) / 2 for stops in head.curves.values() for s in stops}):
        near = [
            min(stops, key=lambda stop, calls=calls: abs(stop.calls - calls))  # type: ignore[misc]
            for stops in head.curves.values()
        ]
        cells = [percent(s.accuracy, None) if abs(s.calls - calls) < 0.2 else "–" for s in near]
        table.add_row(f"{calls:g}", *cells)
    out.print(table)
    by_calls = ", ".join(f"{100 * value:.1f}" for value in head.metrics["by_calls"])
    say(f"right by the number of experts asked, 1 to {most}, cross-fitted: {by_calls} %")
    say(f"{len(head.experts)} experts, {head.metrics['questions']} questions → {out_file}")
