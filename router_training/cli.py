"""The command line: train · evaluate · compare. Decides nothing."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
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
Split = Annotated[str | None, typer.Option(help="Only rows whose column `split` says so.")]
Seed = Annotated[int, typer.Option(help="Of folds, fits and intervals.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the result here as JSON; - prints it.")
]


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
    split: Split = None,
    dev_split: Annotated[
        str | None, typer.Option(help="As --split, for --dev; default: dev.", show_default=False)
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Fit a router on outcomes and write the artefact that a policy in experts.yaml loads."""
    with _told_plainly():
        from router_training.embedding import open_embedding
        from router_training.train import train as fit

        if dev is None and dev_split is not None:
            _refuse("--dev-split needs --dev; name the file to judge on")
        names = _experts(data, experts, pool)
        outcomes = _read(data, names, split, prices)
        judged = None
        if dev is not None:
            judged = _read(dev, names or outcomes.experts, dev_split, prices, judging=True)
        with _bars(as_json) as progress:
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
    if _written(
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
        _say(f"chosen: {metrics['choice']['why']}")
    _say(f"settings: {json.dumps(manifest.settings)}")
    for title, key in (("cross-fitted on train", "cross_fitted"), ("dev", "dev")):
        if (card := metrics.get(key)) is not None:
            _say(f"{title}: {_card_line(card)}")
    _say(f"{len(manifest.experts)} experts, {manifest.data.questions} questions → {out_folder}")


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
    with _told_plainly():
        from router_training.embedding import open_embedding
        from router_training.evaluate import evaluate as judge

        outcomes = _read(data, None, split, prices, judging=True)
        with _bars(as_json) as progress:
            embedding = open_embedding(progress)
            result = judge(
                artefact,
                outcomes,
                embedding.kept,
                encode_anew=embedding.encode_anew,
                seed=seed,
                progress=progress,
            )
    if _written(result.as_json(), as_json):
        return
    table = Table("name", "router", "accuracy (95 %)", "Brier", "ECE", "mean cost", "decision, ms")
    for name, card in result.baselines.items():
        if card is not None:
            spread = card.get("ci95")
            table.add_row(
                name,
                "",
                _percent(card["avg_acc"], spread),
                "–",
                "–",
                _number(card.get("mean_cost")),
                "–",
            )
    for j in result.artefacts:
        table.add_row(
            escape(j.name),
            j.router,
            _percent(j.card["avg_acc"], j.card["ci95"]),
            f"{_number(j.card['brier'])} (base rate {_number(j.card['brier_base_rate'])})",
            _number(j.card["ece"]),
            _number(j.card["mean_cost"]),
            f"{j.latency.decision_ms:.1f}, without embedding {j.latency.without_embedding_ms:.1f}",
        )
    out.print(table)


@app.command()
def compare(
    data: Data,
    dev: Annotated[str, typer.Option(help="Outcomes to judge on, once.")],
    experts: Experts = None,
    pool: Pool = None,
    prices: Prices = None,
    split: Split = None,
    dev_split: Annotated[str | None, typer.Option(help="As --split, for --dev.")] = None,
    router: Annotated[
        list[str] | None, typer.Option(help="Only this family; repeat for several.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Compare all families on one table: settings by cross-validation, judged on dev. Markdown."""
    with _told_plainly():
        from composer.routing.families import FAMILIES
        from router_training.compare import compare as judge
        from router_training.comparison import markdown
        from router_training.embedding import open_embedding
        from router_training.tables import name_of

        names = _experts(data, experts, pool)
        outcomes = _read(data, names, split, prices)
        judged = _read(dev, outcomes.experts, dev_split, prices, judging=True)
        with _bars(as_json) as progress:
            embedding = open_embedding(progress)
            result = judge(
                name_of(Path(data)),
                pool or "all",
                outcomes,
                judged,
                embedding.kept.encode,
                embedding.stamp,
                families=router or tuple(FAMILIES),
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
    if not _written(plain, as_json):
        print(markdown([result]), end="")


def _experts(data: str, experts: str | None, pool: str | None) -> list[str] | None:
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


def _read(
    source: str,
    experts: Sequence[str] | None,
    split: str | None,
    prices: Path | None,
    *,
    judging: bool = False,
) -> Outcomes:
    """Notes go to standard error. What is contaminated is not judged on."""
    from router_training.data import load
    from router_training.errors import DataError

    data = load(source, experts=experts, split=split, prices=prices)
    for note in data.notes:
        err.print(f"{source}: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if not judging or not data.contaminated.any():
        return data.outcomes
    left = ~data.contaminated
    if not left.any():
        raise DataError.of(source, "all questions are contaminated", "Name other data.")
    err.print(f"{source}: {int((~left).sum())} contaminated questions are left out", style="dim")
    return data.rows(left).outcomes


@contextmanager
def _told_plainly() -> Iterator[None]:
    """What is wrong with the data or the request is told in its own words; exit status 2. Anything
    else is a fault of this program, and shows where."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        process_settings()
        yield
    except ComposerError as error:
        _refuse(str(error))
    except ValueError as error:
        from composer.routing.artefact import ArtefactError  # after the thread count is set

        if not isinstance(error, ArtefactError):
            raise
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename or 'a file'}: {error.strerror or error}; see that it can be used")
    except KeyboardInterrupt:
        err.print("stopped; vectors made so far are kept")
        raise typer.Exit(130) from None


def _refuse(message: str) -> NoReturn:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def _bars(as_json: Path | None) -> Iterator[Progress]:
    """One bar for each kind of work, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=err, transient=as_json is not None) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(escape(label), total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress


def _written(value: Any, as_json: Path | None) -> bool:
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
        _refuse(f"{as_json} cannot be written: {error.strerror}; name another file")
    return False


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _card_line(card: dict[str, Any]) -> str:
    parts = [
        f"accuracy {_percent(card['avg_acc'], card['ci95'])}",
        f"over best single {100 * (card['gain_over_best_single'] or 0):+.1f}",
        f"Brier {_number(card['brier'])} (base rate {_number(card['brier_base_rate'])})",
        f"ECE {_number(card['ece'])}",
    ]
    return ", ".join(parts)


def _percent(value: float | None, spread: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    around = "" if spread is None else f" ({100 * spread[0]:.1f} to {100 * spread[1]:.1f})"
    return f"{100 * value:.1f} %{around}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
