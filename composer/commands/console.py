"""What the commands share: settings, the registry's option, how they print and fail. Knows none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError as BadSetting
from rich.console import Console

from composer.errors import CatalogError, ComposerError, SettingsError
from composer.settings import Settings

out = Console(width=None if sys.stdout.isatty() else 160)  # a pipe is not 80 columns wide
err = Console(stderr=True)

ExpertsFile = Annotated[
    Path | None,
    typer.Argument(help="The registry file; default: experts.yaml.", show_default=False),
]
ExpertsOption = Annotated[
    Path | None,
    typer.Option("--experts", help="The registry file; default: experts.yaml.", show_default=False),
]


def read_settings(**given: Any) -> Settings:
    """Call it before importing anything numeric: the libraries read their thread count once, and
    two threads beside a busy neighbour have been twenty times slower than one."""
    try:
        settings = Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        fail(SettingsError(_in_words(error)))
    except BadSetting as error:
        remedy = """write COMPOSER_ADAPTER_ROOTS as a JSON list, such as '["./adapters"]'"""
        fail(SettingsError(f"{error}; {remedy}"))
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    return settings


def _in_words(error: ValidationError) -> str:
    return "\n".join(
        f"COMPOSER_{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()
    )


def fail(error: ComposerError) -> NoReturn:
    """Exit 2 for a wrong registry, whose problems are counted; 1 for anything else."""
    problems = error.problems if isinstance(error, CatalogError) else (error,)
    for problem in problems:
        say(str(problem), "red")
    if isinstance(error, CatalogError):
        err.print(f"{len(problems)} problem(s); nothing was changed.")
    raise typer.Exit(2 if isinstance(error, CatalogError) else 1)


def say(text: str, style: str) -> None:
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
