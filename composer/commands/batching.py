"""`composer batch`: files of requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from composer.commands.console import ExpertsOption, err, fail, out, read_settings
from composer.errors import ComposerError


def batch(
    source: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, one a line.")],
    target: Annotated[Path, typer.Argument(help="The answers' file, in the requests' order.")],
    experts: ExpertsOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask everything anew; else only what has no answer.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests begun at once; 4096.")
    ] = None,
) -> None:
    """Answer a file of requests. What was interrupted, even killed, goes on where it stopped."""
    settings = read_settings(experts=experts)
    from api.batching import WireCodec
    from composer.batch.command import answer_file
    from composer.build import make_service
    from composer.telemetry import configure_logging

    try:
        configure_logging("warning")
        done = answer_file(
            # Loads nothing ahead: what the batch needs, and in which order, is known.
            lambda: make_service(settings.model_copy(update={"preload": False})),
            WireCodec(),
            source,
            target,
            fresh=fresh,
            concurrency=concurrency,
            console=err,
        )
    except ComposerError as error:
        fail(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    if done is None:
        out.print(f"{target} is complete; --fresh asks everything anew", soft_wrap=True)
        return
    counts = f"{done.requests} requests, {done.failed} of them failed; {done.now} answered now"
    out.print(
        f"{counts} → {target}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
