"""What the commands share: their common options, how they read outcomes, show progress and say what
is wrong. Knows no command."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from composer.errors import ComposerError
from router_training.environment import process_settings
from router_training.progress import Progress

if TYPE_CHECKING:
    from composer.routing.outcomes import Outcomes
    from router_training.evaluate import Evaluation

out = Console(width=None if sys.stdout.isatty() else 160)  # a pipe is not 80 columns wide
err = Console(stderr=True)

Data = Annotated[
    str,
    typer.Option(
        "--data", help="Outcomes: CSV, JSON lines, parquet, or the URL of the service's database."
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(help="Only these experts, with commas between them; default: all."),
]
Pool = Annotated[
    str | None, typer.Option(help="Only the experts of this pool of pools.json beside the data.")
]
Prices = Annotated[
    Path | None,
    typer.Option(help="List prices; default: models.csv beside the data, if there is one."),
]
Skills = Annotated[
    Path | None,
    typer.Option(help="Which skills the questions ask for: a profile that `profile` wrote."),
]
Split = Annotated[str | None, typer.Option(help="Only rows whose column `split` says so.")]
WithoutTrained = Annotated[
    bool,
    typer.Option(
        "--without-trained",
        help="Leave out questions that were trained on, but for case and marks.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of folds, fits and intervals.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="The running service, or any OpenAI-compatible one; default: COMPOSER_HOST and "
        "COMPOSER_PORT.",
        show_default=False,
    ),
]
ApiKeyEnv = Annotated[
    str,
    typer.Option(
        "--api-key-env", help="Name of the variable that holds the service's key, if it wants one."
    ),
]
API_KEY_ENV = "COMPOSER_API_KEY"
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the result here as JSON; - prints it.")
]


def named_experts(data: str, experts: str | None, pool: str | None) -> list[str] | None:
    """Those asked for, None for all."""
    from router_training.errors import TrainingError
    from router_training.pools import pool_of

    if experts is not None and pool is not None:
        raise TrainingError("--experts and --pool both say which experts; give one of them")
    if pool is not None:
        return list(pool_of(Path(data), pool))
    if experts is None:
        return None
    return [name.strip() for name in experts.split(",") if name.strip()]


def service_at(url: str | None, api_key_env: str) -> tuple[str, str | None]:
    """The address of the service to ask, by default this machine's own, and its key."""
    return url or process_settings().url, os.environ.get(api_key_env)


def outcomes_of(
    source: str,
    experts: Sequence[str] | None,
    split: str | None,
    prices: Path | None,
    *,
    judging: bool = False,
    skills: Path | None = None,
    intents: Sequence[str] = (),
) -> Outcomes:
    """Notes go to standard error. What is contaminated is not judged on. `skills`: a profile to
    annotate the questions with. `intents`: those that may have no query in a table of intents."""
    from router_training.data import load
    from router_training.errors import DataError

    data = load(source, experts=experts, split=split, prices=prices, intents=intents)
    for note in data.notes:
        err.print(f"{source}: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if skills is not None:
        from router_training.profiles import annotated, read_profile

        data = replace(data, outcomes=annotated(data.outcomes, read_profile(skills).annotations))
    if not judging or not data.contaminated.any():
        return data.outcomes
    left = ~data.contaminated
    if not left.any():
        raise DataError.of(source, "all questions are contaminated", "Name other data.")
    err.print(f"{source}: {int((~left).sum())} contaminated questions are left out", style="dim")
    return data.rows(left).outcomes


def judged_by(
    artefacts: Sequence[Path], source: str, split: str | None, prices: Path | None
) -> Outcomes:
    """Outcomes to judge artefacts on; of a table of intents also those that only they know.
    Raises ArtefactError where one has no manifest."""
    from composer.routing.artefact import read_manifest

    known = [name for folder in artefacts for name in read_manifest(folder).known]
    return outcomes_of(source, None, split, prices, judging=True, intents=known)


def evaluated(
    artefacts: Sequence[Path],
    source: str,
    split: str | None,
    prices: Path | None,
    *,
    without_trained: bool,
    seed: int,
    as_json: Path | None = None,
) -> Evaluation:
    """Artefacts judged on outcomes with the embedder that the settings name; a bar shows how far
    it is. Raises ComposerError, ArtefactError."""
    from router_training.embedding import open_embedding
    from router_training.evaluate import evaluate

    outcomes = judged_by(artefacts, source, split, prices)
    with bars(as_json) as progress:
        embedding = open_embedding(progress)
        return evaluate(
            artefacts,
            outcomes,
            embedding.kept,
            encode_anew=embedding.encode_anew,
            without_trained=without_trained,
            seed=seed,
            progress=progress,
        )


@contextmanager
def told_plainly() -> Iterator[None]:
    """What is wrong with the data or the request is told in its own words; exit status 2. Anything
    else is a fault of this program, and shows where."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        process_settings()
        yield
    except ComposerError as error:
        refuse(str(error))
    except ValueError as error:
        from composer.routing.artefact import ArtefactError  # after the thread count is set

        if not isinstance(error, ArtefactError):
            raise
        refuse(str(error))
    except OSError as error:
        refuse(f"{error.filename or 'a file'}: {error.strerror or error}; see that it can be used")
    except KeyboardInterrupt:
        err.print("stopped; answers and vectors got so far are kept, and the same command goes on")
        raise typer.Exit(130) from None


def refuse(message: str) -> NoReturn:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def bars(as_json: Path | None) -> Iterator[Progress]:
    """One bar for each kind of work, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=err, transient=as_json is not None) as shown:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(escape(label), total=total)
            shown.update(tasks[label], completed=done, total=total)

        yield progress


def written(value: Any, as_json: Path | None) -> bool:
    """Writes it if asked to; True where it went to standard output, which is then its alone."""
    if as_json is None:
        return False
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(as_json) == "-":
        sys.stdout.write(text)
        return True
    try:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(text, encoding="utf-8")
    except OSError as error:
        refuse(f"{as_json} cannot be written: {error.strerror}; name another file")
    return False


def promised(title: str, promises: Sequence[Mapping[str, Any]]) -> Table:
    """What a knob promised and kept, as `kept_promises` tells it."""
    from router_training.promises import HEADS, promise_row

    table = Table(*HEADS, title=escape(title), title_justify="left")
    for promise in promises:
        table.add_row(*map(escape, promise_row(promise)))
    return table


def say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def percent(value: float | None, spread: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    around = "" if spread is None else f" ({100 * spread[0]:.1f} to {100 * spread[1]:.1f})"
    return f"{100 * value:.1f} %{around}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def card_line(card: dict[str, Any]) -> str:
    gain = card["gain_over_best_single"]
    parts = [
        f"accuracy {percent(card['avg_acc'], card['ci95'])}",
        f"over best single {'–' if gain is None else f'{100 * gain:+.1f}'}",
        f"Brier {number(card['brier'])} (base rate {number(card['brier_base_rate'])})",
        f"ECE {number(card['ece'])}",
    ]
    return ", ".join(parts)


def gain_line(card: Mapping[str, Any], single: str) -> str | None:
    """Where the decisions do not beat the best single expert, plainly so; None where they do, or
    where nothing is known of it."""
    gain, around = card["gain_over_best_single"], card["gain_ci95"]
    if gain is None or around[0] > 0:
        return None
    told = "is worse than" if around[1] < 0 else "does not beat"
    return (
        f"routing {told} the best single expert, {single}: {100 * gain:+.1f} points of quality "
        f"({100 * around[0]:+.1f} to {100 * around[1]:+.1f}, 95 %); where cost does not matter, "
        "ask that expert alone"
    )


def budget_line(card: Mapping[str, Any]) -> str | None:
    """None without prices."""
    within = card["budget_acc"]
    if within is None:
        return None
    shares = " / ".join(f"{100 * float(share):g}" for share in within)
    reached = " / ".join("–" if q is None else f"{100 * q:.1f}" for q in within.values())
    return f"accuracy {reached} % within {shares} % of the best single expert's mean cost"


def scope_line(scope: Mapping[str, Any]) -> str:
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
