"""The command line: what `commands/` holds, under its names. Decides nothing."""

from __future__ import annotations

import atexit
import gc
import sys

import typer

from router_training.commands import (
    collect,
    compare,
    evaluate,
    gates,
    join,
    profile,
    report,
    select,
    train,
    votes,
    weights,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _whole() -> None:
    """Train routers on labelled outcomes, and judge them."""


app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(collect.collect)
app.command()(profile.profile)
app.command()(join.join)
app.command()(votes.votes)
app.command()(report.report)
app.command()(select.select)
app.add_typer(gates.app, name="gates")
app.command()(weights.weights)


def main() -> None:
    # Else the interpreter's last collection goes through all of the libraries, which takes seconds.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    sys.exit(app())
