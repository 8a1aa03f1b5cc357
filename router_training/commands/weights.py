"""router-training weights."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from router_training.console import Json, Seed, bars, number, say, told_plainly, written


class Way(StrEnum):
    lorahub = "lorahub"
    soups = "soups"


def weights(
    way: Annotated[
        Way,
        typer.Argument(
            help="lorahub: a weight for each adapter, by search without gradients. soups: for each "
            "adapter in each layer, by gradients."
        ),
    ],
    adapter: Annotated[list[Path], typer.Option(help="A member's folder; repeat for each.")],
    base: Annotated[Path, typer.Option(help="The base model's folder.")],
    data: Annotated[
        Path,
        typer.Option(help="A few questions: columns prompt and answer, CSV, JSON lines, parquet."),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The recipe, YAML.")],
    evaluations: Annotated[
        int, typer.Option(min=2, help="Of lorahub: times the loss is taken.")
    ] = 100,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of soups; default: as many as make 100 steps."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of soups.")] = 0.02,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Learn how much of each adapter a composition takes; `composition:` in experts.yaml and
    `composer compose --recipe` read what it writes."""
    with told_plainly():
        from router_training.gates.loading import base_in, members_in
        from router_training.gates.questions import read_questions
        from router_training.weights import learn, write_recipe

        questions = read_questions(data).rows
        with bars(as_json) as progress:
            learnt = learn(
                way.value,
                base_in(base),
                members_in([str(folder) for folder in adapter]),
                questions,
                evaluations=evaluations,
                learning_rate=learning_rate,
                epochs=epochs,
                seed=seed,
                progress=progress,
            )
        write_recipe(out_file, adapter, learnt)
    if written({"recipe": str(out_file), **asdict(learnt)}, as_json):
        return
    say(
        f"loss {number(learnt.loss)}; equal shares {number(learnt.loss_even)}, the base alone "
        f"{number(learnt.loss_base)} (of {len(questions)} questions)"
    )
    shares = ", ".join(
        f"{number(w)} {folder.name}" for w, folder in zip(learnt.weights, adapter, strict=True)
    )
    say(f"{shares}{' on average over layers' if learnt.modules else ''} → {out_file}")
