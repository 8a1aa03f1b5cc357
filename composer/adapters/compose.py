"""A composition as written (members, weights, method) → a peft adapter folder that says what it was
made of. Knows no engine and no registry."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from composer.adapters.base_model import last_part
from composer.adapters.factors import (
    Lora,
    is_as_written,
    note_written,
    read_lora,
    verified_lora,
    write_lora,
    written_digest,
)
from composer.adapters.files import WEIGHTS
from composer.adapters.merging import method_named, settings_of
from composer.adapters.merging.base import MergeSettings, Method, Weights
from composer.adapters.merging.subtraction import less
from composer.adapters.merging.truncation import fitted
from composer.adapters.provenance import PROVENANCE
from composer.adapters.recipe import Member, Recipe
from composer.durable import sync_contents, sync_folder
from composer.errors import AdapterError, Problem
from composer.types import Composed, MemberShare

FORMAT = 2
"""Goes up when the same recipe gives another adapter than before. 2: its config names layers."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank` (its LoRAConfig); a composed adapter has one of these."""


@dataclass(frozen=True, slots=True)
class Composition:
    """What was made. `rank` is that of the folder's adapter, `needed` what the method gave before
    it was fitted to the server; `energy` the smallest share of a module's squared norm that
    the method's own cut and the fitting kept, 1 where nothing was cut (of both, their product:
    no module kept less). `adapter` is the adapter's digest, and `composed` what it was made of.
    `built` False: it was there already."""

    folder: Path
    adapter: str
    composed: Composed
    rank: int
    needed: int
    energy: float
    report: Mapping[str, Any]
    built: bool
    seconds: float


def compose(recipe: Recipe, into: Path) -> Composition:
    """The composition's folder below `into`, named by what it is made of, so that the same recipe
    over the same weights is built once, and a name never means other weights. Blocks. Raises
    AdapterError; nothing is left half-written."""
    began = time.monotonic()
    method, settings = _checked(recipe, into)
    for name, weight in _weights(recipe):
        if not math.isfinite(weight):
            raise _refused(into, name, f"its weight is {weight}", "Give a finite number.")
    if not recipe.members:
        raise _refused(into, "members", "there is none", "Name at least one adapter.")
    sources = (*recipe.members, *filter(None, [recipe.subtract]))
    loras: list[Lora] = []
    if any(source.digest is None for source in sources):
        loras = [_read(source) for source in sources]
    digests = [lora.digest for lora in loras] or [str(source.digest) for source in sources]
    digest = _digest(recipe, settings, digests)
    folder = into / digest.removeprefix("sha256:")[:32]
    if (told := told_of(folder)) is None:
        loras = loras or [_read(source) for source in sources]
        _one_base(sources, loras)
        told = _built(recipe, method, settings, loras, folder, digest)
        built = True
    else:
        built = False
    shares = [
        MemberShare(source.name, own, source.weight)
        for source, own in zip(sources, digests, strict=True)
    ]
    general = shares.pop() if recipe.subtract is not None else None
    return Composition(
        folder,
        adapter=told["adapter"],
        composed=Composed(
            recipe.method,
            tuple(shares),
            told["energy"],
            general,
        ),
        **{key: told[key] for key in ("rank", "needed", "energy", "report")},
        built=built,
        seconds=time.monotonic() - began,
    )


def _weights(recipe: Recipe) -> list[tuple[str, float]]:
    """All of them, by member or module."""
    own = [(module, w) for module, weights in recipe.modules.items() for w in weights]
    return [(member.name, member.weight) for member in recipe.members] + own


def told_of(folder: Path) -> Mapping[str, Any] | None:
    """The provenance of what lies in the folder; None where it is not there as it was written,
    damaged on the disk or by hand: then it is made anew."""
    try:
        told: Mapping[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        whole = told["format"] == FORMAT and (folder / WEIGHTS).stat().st_size == told["bytes"]
        if whole and is_as_written(folder, told["adapter"]):
            return told
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _built(
    recipe: Recipe,
    method: type[Method],
    settings: MergeSettings,
    loras: Sequence[Lora],
    folder: Path,
    digest: str,
) -> Mapping[str, Any]:
    """Merged, fitted to the server and published; what its provenance says."""
    made, needed, energy, report = _merged(recipe, method, settings, loras, folder.parent)
    rank = servable_rank(made.rank, recipe.max_rank)
    told = {
        "format": FORMAT,
        "digest": digest,
        "method": recipe.method,
        "paper": method.paper,
        "settings": settings.model_dump(mode="json"),
        "members": [
            {**asdict(member), "folder": str(member.folder), "digest": lora.digest}
            for member, lora in zip(recipe.members, loras, strict=False)
        ],
        "subtract": None
        if (general := recipe.subtract) is None
        else {"name": general.name, "folder": str(general.folder), "digest": loras[-1].digest},
        "modules": {module: list(own) for module, own in recipe.modules.items()},
        "base": made.base,
        "rank": rank,
        "needed": needed,
        "energy": energy,
        "report": dict(report),
    }
    dtype = reduce(torch.promote_types, (lora.dtype for lora in loras))
    return published(folder, made, rank, dtype, told)


def _checked(recipe: Recipe, into: Path) -> tuple[type[Method], MergeSettings]:
    path = "method"
    try:
        method = method_named(recipe.method)
        path = "settings"
        return method, settings_of(method, recipe.settings)
    except ValueError as error:
        message, _, remedy = str(error).rpartition("; ")
        raise _refused(into, path, message, f"{remedy[:1].upper()}{remedy[1:]}.") from error


def _digest(recipe: Recipe, settings: MergeSettings, digests: Sequence[str]) -> str:
    """`sha256:…` of all that decides the tensors: names and folders of members do not."""
    told = {
        "format": FORMAT,
        "method": recipe.method,
        "settings": settings.model_dump(mode="json"),
        "members": [
            [digest, member.weight] for digest, member in zip(digests, recipe.members, strict=False)
        ],
        "subtract": digests[-1] if recipe.subtract is not None else None,
        "modules": {module: list(own) for module, own in sorted(recipe.modules.items())},
        "max_rank": recipe.max_rank,
    }
    return f"sha256:{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}"


def servable_rank(rank: int, limit: int | None) -> int:
    """The least rank that vLLM can be started for and that holds `rank`, but no more than `limit`;
    `rank` itself above the largest. `rank` is within `limit`."""
    fits = next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)
    return fits if limit is None else min(fits, limit)


def _merged(
    recipe: Recipe,
    method: type[Method],
    settings: MergeSettings,
    loras: Sequence[Lora],
    into: Path,
) -> tuple[Lora, int, float, Mapping[str, Any]]:
    weights = Weights(tuple(member.weight for member in recipe.members), recipe.modules)
    members = loras[: len(recipe.members)]
    try:
        if recipe.subtract is not None:
            members = [less(member, loras[-1]) for member in members]
        merged = method.merge([member.modules for member in members], weights, settings)
    except ValueError as error:
        message, _, remedy = str(error).partition("; ")
        raise _refused(
            into, recipe.method, message, f"{remedy[:1].upper()}{remedy[1:]}."
        ) from error
    made = Lora(merged.modules, loras[0].base)
    needed, energy = made.rank, merged.energy
    if recipe.max_rank is not None and needed > recipe.max_rank:
        modules, kept = fitted(merged.modules, recipe.max_rank)
        made, energy = Lora(modules, made.base), energy * kept
    return made, needed, energy, merged.report


def published(
    folder: Path, made: Lora, rank: int, dtype: torch.dtype, told: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Whole or not at all: made beside its place and moved there. Two processes that build the same
    composition write the same bytes, and whoever comes second throws its own away and tells what
    stands there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        try:
            write_lora(part, made, rank=rank, dtype=dtype)
        except ValueError as error:
            message, _, remedy = str(error).partition("; ")
            raise _refused(folder, "", message, f"{remedy.capitalize()}.") from error
        told = {**told, "adapter": written_digest(part), "bytes": (part / WEIGHTS).stat().st_size}
        text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        (part / PROVENANCE).write_text(text, encoding="utf-8")
        part.chmod(0o755)
        sync_contents(part)
        standing = None
        try:
            os.rename(part, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            standing = told_of(folder)
            if standing is not None:  # the same sum; its names and folders may be others
                told = standing
            else:  # what is there is damaged, or not ours
                os.rename(folder, part / "damaged")
                os.rename(part, folder)
                shutil.rmtree(folder / "damaged", ignore_errors=True)
        sync_folder(folder.parent)
        if standing is None:
            note_written(folder, told["adapter"])
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return told


def _read(member: Member) -> Lora:
    """One with a digest was verified by whoever gave it."""
    if member.digest is None:
        return verified_lora(member.folder, member.name)
    lora = read_lora(member.folder)
    if lora.digest != member.digest:
        raise _refused(
            member.folder,
            "",
            f"{member.name!r} has the digest {lora.digest}, not {member.digest}",
            "Restore the files that were checked, or reload the registry, which checks them again.",
        )
    return lora


def _one_base(members: Sequence[Member], loras: Sequence[Lora]) -> None:
    for member, lora in zip(members, loras, strict=True):
        if not _same_name(lora.base, loras[0].base):
            raise _refused(
                member.folder,
                "base_model_name_or_path",
                f"{member.name!r} was trained on {lora.base!r}, {members[0].name!r} "
                f"({members[0].folder}) on {loras[0].base!r}",
                "Compose adapters of one base model.",
            )


def _same_name(one: str | None, other: str | None) -> bool:
    return one == other or (
        one is not None and other is not None and last_part(one) == last_part(other)
    )


def _refused(file: Path, path: str, message: str, remedy: str) -> AdapterError:
    return AdapterError([Problem(file=str(file), path=path, message=message, remedy=remedy)])
