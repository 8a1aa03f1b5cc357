"""Logging as the service uses it. Knows nothing of what is logged."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def configure_logging(level: str) -> None:
    """One handler on the root, to standard error. Raises ValueError for an unknown level."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}: debug, info, warning or error")
    handler = RichHandler(
        show_path=False, rich_tracebacks=False, markup=False, console=Console(stderr=True)
    )
    logging.basicConfig(
        level=number, format="%(name)s: %(message)s", handlers=[handler], force=True
    )
    for chatty in ("watchfiles", "httpx", "sentence_transformers", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))
