"""The program `composer`: its commands, which stand in `composer/commands/`. Decides nothing."""

from __future__ import annotations

import atexit
import gc
import sys

import typer

from composer.commands.batching import batch
from composer.commands.composing import compose
from composer.commands.compressing import compress, expand
from composer.commands.embedder import embedder
from composer.commands.gates import gates
from composer.commands.promoting import promote
from composer.commands.registry import check, list_experts, schema
from composer.commands.routing import route
from composer.commands.serving import serve

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

app.command()(serve)
app.command()(check)
app.command()(route)
app.command()(batch)
app.command()(promote)
app.command(name="experts")(list_experts)
app.command()(compose)
app.command()(compress)
app.command()(expand)
app.command()(gates)
app.command()(embedder)
app.command()(schema)


def main() -> None:
    # Else the interpreter's last collection goes through all of the libraries, which takes seconds.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    sys.exit(app())
