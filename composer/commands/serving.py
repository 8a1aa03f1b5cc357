"""`composer serve`: the service behind its HTTP edge."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from composer.commands.console import ExpertsFile, err, fail, read_settings
from composer.errors import ComposerError, SettingsError
from composer.settings import Settings


def serve(
    experts: ExpertsFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the experts of experts.yaml behind one OpenAI-compatible endpoint."""
    settings = read_settings(experts=experts, host=host, port=port)
    from api.server import Server
    from composer.build import make_service
    from composer.telemetry import configure_logging

    try:
        configure_logging(log_level)
        server = Server(make_service(settings))
        server.run_on(_bind(settings))  # a taken port is told now, not after the models' load
    except ComposerError as error:
        fail(error)
    except KeyboardInterrupt:
        err.print("stopped before it was ready")
        raise typer.Exit(130) from None
    if not server.started:
        raise typer.Exit(3)


def _bind(settings: Settings) -> socket.socket:
    """Bound but not listening: connections are refused until the service is ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(
            f"cannot listen on {where}: {error.strerror}; give another --port"
        ) from error
    return bound
