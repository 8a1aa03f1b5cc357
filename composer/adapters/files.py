"""An adapter's files: which there must be, and where they may lie. Does not open them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from composer.errors import Problem

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
GATE = "gate.json"
"""Of a gated adapter, which has this in place of `CONFIG`."""
TERNARY = "adapter_ternary.safetensors"
"""In place of the weights, where they are compressed for storage."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Formats that run code when they are loaded."""


def outside(path: Path, roots: Sequence[Path]) -> Problem | None:
    """A problem where `path` lies outside every root, else None.

    The path is resolved first, so neither `..` nor a symlink gets out; the roots must be
    resolved already.
    """
    real = path.resolve()
    if any(real.is_relative_to(root) for root in roots):
        return None
    where = f"it leads to {real}, outside" if real != path.absolute() else "it lies outside"
    return Problem(
        file=str(path),
        path="",
        message=f"{where} the allowed folders ({', '.join(map(str, roots)) or 'none'})",
        remedy="Move it into an allowed folder, or add its folder to COMPOSER_ADAPTER_ROOTS.",
    )


def is_compressed(folder: Path) -> bool:
    return (folder / TERNARY).is_file() and not (folder / WEIGHTS).exists()


def file_problems(folder: Path, roots: Sequence[Path]) -> list[Problem]:
    """Why this folder cannot hold a usable adapter, judged by its file names alone."""
    if (refusal := outside(folder, roots)) is not None:
        return [refusal]
    if not folder.is_dir():
        return [
            Problem(
                file=str(folder),
                path="",
                message="there is no such folder"
                if not folder.exists()
                else "this is not a folder",
                remedy=f"Name the folder that holds {CONFIG} and {WEIGHTS}.",
            )
        ]
    links = (folder / name for name in (CONFIG, WEIGHTS) if (folder / name).is_symlink())
    checked = (outside(link, roots) for link in links)
    problems = [refusal for refusal in checked if refusal is not None]
    if problems:
        return problems
    if is_gate(folder):
        message = "it holds a gate, which mixes adapters, and is none itself"
        remedy = "An expert names it by `gate`; a composition, its members in place of it."
        return [*problems, Problem(str(folder), "", message, remedy)]
    if not (folder / CONFIG).is_file():
        problems.append(
            Problem(
                file=str(folder),
                path="",
                message=f"{CONFIG} is missing",
                remedy="Save the adapter with peft's `save_pretrained`, which writes it.",
            )
        )
    if not (folder / WEIGHTS).is_file():
        problems.append(_no_weights(folder))
    return problems


def is_gate(folder: Path) -> bool:
    """Whether it holds a gated adapter, judged by its file names alone."""
    return (folder / GATE).is_file() and not (folder / CONFIG).exists()


def _no_weights(folder: Path) -> Problem:
    if is_compressed(folder):
        return Problem(
            file=str(folder / TERNARY),
            path="",
            message="the weights are compressed for storage",
            remedy="Make an ordinary adapter of it by `composer expand`, and name that.",
        )
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickled:
        return Problem(
            file=str(folder / pickled[0]),
            path="",
            message="the weights are pickled, and loading a pickle runs the code in it",
            remedy=f"Convert it where you trust it, by safetensors.torch.save_file, to {WEIGHTS}.",
        )
    return Problem(
        file=str(folder),
        path="",
        message=f"{WEIGHTS} is missing",
        remedy="Save the adapter with peft's `save_pretrained(..., safe_serialization=True)`.",
    )
