"""`router-training gates`: gates over adapters, made, extended and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from composer.assignments import assigned
from router_training.console import (
    Json,
    bars,
    number,
    out,
    refuse,
    say,
    told_plainly,
    written,
)

if TYPE_CHECKING:
    from composer.adapters.gates.files import Gate

app = typer.Typer(no_args_is_help=True, help="Mix adapters per token: make, extend and cut gates.")

Adapter = Annotated[
    list[str],
    typer.Option(help="NAME=FOLDER, or the folder alone; repeat for each member."),
]
Base = Annotated[Path | None, typer.Option(help="The base model's folder, where one is trained.")]
Questions = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Columns prompt, answer and, whose it is, expert: CSV, JSON lines, parquet."
    ),
]
General = Annotated[
    Path | None,
    typer.Option(help="Of arrow: an adapter whose knowledge is subtracted from every member."),
]
Existing = Annotated[
    Path, typer.Argument(help="The gate's folder; it stays as it is, unless it is --out.")
]
Seed = Annotated[int, typer.Option(help="Of what is drawn in training.")]
Out = Annotated[
    Path, typer.Option("--out", help="The gate's folder; a gate that stands there is replaced.")
]


@app.command()
def make(
    kind: Annotated[str, typer.Argument(help="arrow, fixed, phatgoose, glider, softmax or xlora.")],
    adapter: Adapter,
    out_folder: Out,
    base: Base = None,
    data: Questions = None,
    general: General = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the kind, such as top_k=2; repeat for several."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Make a gate over adapters of one base; what is learnt is learnt from --data."""
    with told_plainly():
        from router_training.gates.making import embeds_to_make
        from router_training.gates.making import make as build

        assigned = _assigned(setting or [])
        embedded = embeds_to_make(kind, assigned)
        with bars(as_json) as progress:
            bench = _bench(adapter, base, data, general, seed, progress, embedded)
            gate = build(kind, bench, assigned)
    _finish(gate, out_folder, as_json)


@app.command()
def add(
    gate: Existing,
    adapter: Adapter,
    out_folder: Out,
    base: Base = None,
    data: Questions = None,
    general: General = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TEXT, what a member is for, where the gate reads it (glider)."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Add members by their own training alone; what the others have stays bit for bit."""
    with told_plainly():
        from router_training.gates.making import add as extend
        from router_training.gates.making import embeds_to_join

        embedded = embeds_to_join(gate)
        with bars(as_json) as progress:
            bench = _bench(adapter, base, data, general, seed, progress, embedded)
            bench = replace(bench, instructions=_texts(instruction or []))
            grown = extend(gate, bench)
    _finish(grown, out_folder, as_json)


@app.command()
def remove(
    gate: Existing,
    member: Annotated[list[str], typer.Option(help="Who leaves; repeat for several.")],
    out_folder: Out,
    as_json: Json = None,
) -> None:
    """Take members out; what is left stays bit for bit."""
    with told_plainly():
        from router_training.gates.making import remove as cut

        left = cut(gate, member)
    _finish(left, out_folder, as_json)


def _bench(
    adapter: list[str],
    base: Path | None,
    data: Path | None,
    general: Path | None,
    seed: int,
    progress: Any,
    embedded: bool,
) -> Any:
    from composer.adapters.factors import verified_lora
    from router_training.embedding import open_embedding
    from router_training.gates.base import Bench
    from router_training.gates.loading import base_in, members_in
    from router_training.gates.questions import read_questions

    questions = None if data is None else read_questions(data)
    members = members_in(adapter)
    embedding = open_embedding(progress) if embedded else None
    return Bench(
        members,
        None if base is None else base_in(base),
        questions,
        None if general is None else verified_lora(general, general.name),
        None if embedding is None else embedding.kept.encode,
        "" if embedding is None else embedding.kept.id,
        "" if embedding is None else embedding.kept.digest,
        seed,
        progress,
    )


def _finish(gate: Gate, folder: Path, as_json: Path | None) -> None:
    with told_plainly():
        from composer.adapters.gates.files import MANIFEST
        from router_training.gates.making import publish

        replaced = (folder / MANIFEST).is_file()
        digest = publish(gate, folder)
    told = gate.manifest.model_dump(mode="json", exclude={"modules"})
    if written({"gate": str(folder), **told, "digest": digest}, as_json):
        return
    manifest = gate.manifest
    losses = manifest.report.get("members")
    if isinstance(losses, dict):
        table = Table("member", "questions", "loss at first", "loss at last")
        for name in manifest.members:
            row = losses.get(name.name)
            if isinstance(row, dict):
                cells = (row.get("questions"), row.get("first_loss"), row.get("last_loss"))
                table.add_row(name.name, *(number(c) for c in cells))  # type: ignore[arg-type]
        out.print(table)
    elif "last_loss" in manifest.report:
        first, last = manifest.report["first_loss"], manifest.report["last_loss"]
        say(f"loss {number(first)} at first, {number(last)} at last")  # type: ignore[arg-type]
    if "gamma" in manifest.settings:
        say(f"gamma: {manifest.settings['gamma']}, of least loss on questions kept apart")
    there = ", in place of the gate there" if replaced else ""
    say(
        f"{manifest.kind} over {len(manifest.members)} members in {len(manifest.modules)} modules, "
        f"{_selected(manifest.selection)} → {folder}{there}"
    )
    if len(manifest.members) == 1 and not manifest.selection.null:
        say("one member has all of the weight at every token, so there is nothing to choose")


def _selected(selection: Any) -> str:
    told = selection.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in told.items()) or "all of them take part"


def _texts(written: list[str]) -> dict[str, str]:
    """NAME=TEXT."""
    for one in written:
        if not one.partition("=")[2]:
            refuse(f"--instruction {one}: no text; write NAME=TEXT")
    return {name: text for name, _, text in (one.partition("=") for one in written)}


def _assigned(settings: list[str]) -> dict[str, Any]:
    try:
        return assigned(settings)
    except ValueError as error:
        refuse(f"--set {error}")
