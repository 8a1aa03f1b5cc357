"""router-training report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router_training.cells import counted
from router_training.console import (
    Data,
    Prices,
    Seed,
    Split,
    WithoutTrained,
    bars,
    evaluated,
    refuse,
    say,
    told_plainly,
)


def report(
    artefact: Annotated[list[Path], typer.Option(help="An artefact's folder; repeat for several.")],
    data: Data,
    out_file: Annotated[Path, typer.Option("--out", help="The page to write, .html.")],
    prices: Prices = None,
    split: Split = None,
    without_trained: WithoutTrained = False,
    seed: Seed = 0,
) -> None:
    """Judge artefacts as `evaluate` does, and write one page that opens from disk anywhere."""
    with told_plainly():
        from composer.durable import replace_file
        from router_training.report import report as page_of

        if out_file.suffix.lower() not in (".html", ".htm"):
            refuse(f"--out {out_file} is no page; name a file that ends in .html")
        result = evaluated(
            artefact, data, split, prices, without_trained=without_trained, seed=seed
        )
        with bars(None) as progress:
            progress("drawing", 0, 1)
            name = Path(data).name if "://" not in data else "the service's database"
            page = page_of(result, name if split is None else f"{name}, {split}", seed=seed)
            progress("drawing", 1, 1)
        out_file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out_file, [page.encode("utf-8")])
    for judged in result.artefacts:
        if (told := judged.overlap.sentence) is not None:
            say(f"{judged.name}: {told}")
    say(
        f"{counted(len(result.artefacts), 'artefact')} on "
        f"{counted(len(result.outcomes), 'question')} → {out_file}"
    )
