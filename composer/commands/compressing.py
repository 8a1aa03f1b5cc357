"""`composer compress` and `composer expand`: adapters for storage, and back, without a registry."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from composer.commands.console import fail, read_settings
from composer.errors import ComposerError, SettingsError


def compress(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The compressed adapter's folder, not there yet.")],
    density: Annotated[float, typer.Option(help="Share of each factor's numbers kept.")] = 0.5,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Their size, in standard deviations of the factor; default: the nearest."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compress an adapter for storage (ComPEFT): signs of its largest numbers and one size a
    factor. In experts.yaml its folder is an adapter's, expanded when the registry is loaded."""
    read_settings()
    from composer.adapters.compression import compress_folder

    try:
        if alpha is not None and not alpha > 0:
            raise SettingsError(f"--alpha is {alpha}; give a number above 0")
        made = compress_folder(adapter, out, density=density, alpha=alpha)
    except ComposerError as error:
        fail(error)
    except (OSError, ValueError) as error:
        fail(SettingsError(str(error)))
    if as_json:
        print(json.dumps(asdict(made) | {"folder": str(out), "ratio": round(made.ratio, 2)}))
        return
    print(
        f"{out}: {made.bytes_after:,} of {made.bytes_before:,} bytes, {made.ratio:.1f} times "
        f"smaller; {made.error:.0%} away from the original by its norm. Served, its digest is "
        f"{made.adapter}"
    )


def expand(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a compressed adapter.", show_default=False)
    ],
    into: Annotated[
        Path, typer.Option("--out", help="The ordinary adapter becomes a folder below this one.")
    ],
) -> None:
    """Make an ordinary PEFT adapter of a compressed one, for whoever serves without a registry."""
    read_settings()
    from composer.adapters.compression import expand as build
    from composer.adapters.files import TERNARY, is_compressed

    try:
        if not is_compressed(adapter):
            raise SettingsError(
                f"{adapter} holds no {TERNARY}; name the folder that `composer compress` made"
            )
        print(build(adapter, into))
    except ComposerError as error:
        fail(error)
    except OSError as error:
        fail(SettingsError(f"nothing was made below {into}: {error}"))
