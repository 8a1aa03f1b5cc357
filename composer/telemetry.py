"""Logging as the service uses it. Knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from composer.errors import SettingsError

CHATTY = ("watchfiles", "httpx", "sentence_transformers", "onnxscript", "onnx_ir", "alembic")


def configure_logging(level: str) -> None:
    """One handler on the root, to standard error: coloured for a person, one line a message for
    a file. Raises SettingsError for an unknown level."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise SettingsError(f"there is no log level {level!r}; use debug, info, warning or error")
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(show_path=False, console=Console(stderr=True))
        form = "%(name)s: %(message)s"
    else:
        handler = logging.StreamHandler()
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=number, format=form, handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
