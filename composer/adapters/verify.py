"""Decides whether an adapter folder is a sound LoRA adapter for a base model. Loads nothing into
a model and runs nothing: it reads bytes and shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.adapters.base_model import BaseModelInfo
from composer.adapters.files import CONFIG, WEIGHTS, file_problems
from composer.adapters.lora_config import AdapterFeature, LoraConfig, read_lora_config
from composer.adapters.tensors import DTYPES, RawTensor, TensorFileError, read_tensors
from composer.errors import AdapterError, Problem
from composer.types import Adapter

_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<plain>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_SHOWN = 3
"""Problems of one kind that are told apart; the rest are counted."""


@dataclass(frozen=True, slots=True)
class _Factor:
    """One low-rank factor. `embedding` ones are stored as peft's embedding layer has them:
    A (rank, vocabulary), B (width, rank)."""

    tensor: str
    module: str
    side: str
    embedding: bool
    shape: tuple[int, ...]


def verify_adapter(
    folder: Path,
    base: BaseModelInfo | None,
    *,
    roots: Sequence[Path],
    max_rank: int | None = None,
    features: Collection[AdapterFeature] = (),
    digest: str | None = None,
) -> Adapter:
    """The adapter in `folder`, once nothing speaks against serving it on `base`.

    `base` None: somebody else's server, so name and shapes cannot be compared. `roots` are the
    folders, resolved, that it and its files may lie in, symlinks followed. `max_rank` and
    `features` are the engine's limits. `digest` is the one the registry pins. The returned
    adapter's `alpha / rank` is the scaling applied, also for rank-stabilised LoRA.

    Raises AdapterError holding every problem found.
    """
    problems = file_problems(folder, roots)
    if problems:
        raise AdapterError(problems)
    config, unsupported = read_lora_config(folder, features)
    problems = list(unsupported)
    try:
        tensors = read_tensors(folder / WEIGHTS)
    except (TensorFileError, OSError) as error:
        problems.append(
            _at(
                folder / WEIGHTS,
                "",
                f"the file is damaged: {error}",
                "Copy it again from its source.",
            )
        )
        raise AdapterError(problems) from error
    problems += _number_problems(folder / WEIGHTS, tensors)
    if config is None:
        raise AdapterError(problems)

    if max_rank is not None and max(config.rank, *config.rank_pattern.values(), 0) > max_rank:
        remedy = "Raise the server's `max_lora_rank`, or train the adapter at a lower rank."
        problems.append(
            _at(folder / CONFIG, "r", f"rank {config.rank} exceeds the server's {max_rank}", remedy)
        )
    factors, strangers = _factors(tensors)
    if not unsupported:  # what is not supported has tensors of its own, and is told once
        remedy = "Save the adapter with peft's `save_pretrained`, without other modules."
        message = "this tensor is not a LoRA factor"
        problems += _shorten([_at(folder / WEIGHTS, name, message, remedy) for name in strangers])
    if base is not None:
        problems += _name_problems(folder / CONFIG, config, base)
    problems += _shorten(_shape_problems(folder / WEIGHTS, config, factors, base))

    found = adapter_digest(config, tensors)
    if digest is not None and digest != found:
        problems.append(
            _at(
                folder,
                "",
                f"its digest is {found}, not the pinned {digest}",
                "Restore the pinned files; if the change is meant, pin the new digest.",
            )
        )
    if problems:
        raise AdapterError(problems)
    return Adapter(
        path=folder.resolve(),
        digest=found,
        rank=config.rank,
        alpha=config.effective_alpha,
        target_modules=tuple(sorted({factor.module.rsplit(".", 1)[-1] for factor in factors})),
    )


def adapter_digest(config: LoraConfig, tensors: Mapping[str, RawTensor]) -> str:
    """`sha256:…` over the settings that change what is computed and every tensor by name.

    Not over the files' bytes: key order, list order and metadata vary between equal adapters.
    """
    total = hashlib.sha256(config.canonical())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        total.update(tensor.data)
    return f"sha256:{total.hexdigest()}"


def _at(file: Path, path: str, message: str, remedy: str) -> Problem:
    return Problem(file=str(file), path=path, message=message, remedy=remedy)


def _number_problems(file: Path, tensors: Mapping[str, RawTensor]) -> list[Problem]:
    problems = []
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(sorted(DTYPES))
            remedy = "Save the adapter again as float32, float16 or bfloat16."
            problems.append(_at(file, name, f"type {tensor.dtype} is none of {allowed}", remedy))
        elif not tensor.is_finite():
            remedy = "Its training diverged; use an earlier checkpoint."
            problems.append(_at(file, name, "it holds NaN or infinity", remedy))
    return _shorten(problems)


def _factors(tensors: Mapping[str, RawTensor]) -> tuple[list[_Factor], list[str]]:
    """The LoRA factors, and the names of tensors that are none."""
    factors, strangers = [], []
    for name, tensor in sorted(tensors.items()):
        match = _FACTOR.fullmatch(name)
        if match is None:
            strangers.append(name)
            continue
        side = match["plain"] or match["embedding"]
        factors.append(_Factor(name, match["module"], side, match["plain"] is None, tensor.shape))
    return factors, strangers


def _name_problems(file: Path, config: LoraConfig, base: BaseModelInfo) -> list[Problem]:
    path = "base_model_name_or_path"
    if config.base is None:
        remedy = f"Write the name of its base there; the server's is {base.names[0]!r}."
        return [_at(file, path, "it does not say which base model it was trained on", remedy)]
    if base.is_named(config.base):
        return []
    names = " or ".join(repr(name) for name in base.names)
    return [
        _at(
            file,
            path,
            f"it was trained on {config.base!r}, the server's model is {names}",
            "Name the server of its own base; if only the name differs, correct it here.",
        )
    ]


def _shape_problems(
    file: Path, config: LoraConfig, factors: Sequence[_Factor], base: BaseModelInfo | None
) -> list[Problem]:
    """Pairs that are not complete, ranks and sizes that do not fit, targets without factors."""
    problems = []
    resave = "Save the adapter again from its training checkpoint."
    sides: dict[str, set[str]] = {}
    for factor in factors:
        sides.setdefault(factor.module, set()).add(factor.side)
        problems += _factor_problems(file, config, factor, base)
    for module, present in sides.items():
        if len(present) == 1:
            absent = "B" if "A" in present else "A"
            problems.append(_at(file, module, f"its lora_{absent} tensor is missing", resave))
        if config.covers(module) is False:
            remedy = "Correct `target_modules`: peft would leave these tensors out."
            problems.append(_at(file, module, f"{CONFIG} does not target it", remedy))
    if base is not None:
        problems += [
            _at(file, module, f"{CONFIG} targets it, but its tensors are missing", resave)
            for module in base.shapes
            if module not in sides and config.covers(module)
        ]
    if not factors:
        problems.append(_at(file, "", "it holds no LoRA factor", resave))
    return problems


def _factor_problems(
    file: Path, config: LoraConfig, factor: _Factor, base: BaseModelInfo | None
) -> list[Problem]:
    if len(factor.shape) != 2:
        remedy = "Only LoRA on matrices is served; train it on the linear layers."
        return [_at(file, factor.tensor, f"its shape {factor.shape} is no matrix", remedy)]
    rank, size = factor.shape if factor.side == "A" else reversed(factor.shape)
    problems = []
    if rank != config.rank_of(factor.module):
        expected = config.rank_of(factor.module)
        remedy = f"Set `r` in {CONFIG} to the rank it was trained at, or save it again."
        message = f"its rank is {rank}, {CONFIG} says {expected}"
        problems.append(_at(file, factor.tensor, message, remedy))
    if base is None:
        return problems
    if factor.module not in base.shapes:
        if not base.packed:
            remedy = "It belongs to another base model: name that one's server."
            message = f"the base model has no module {factor.module}"
            problems.append(_at(file, factor.tensor, message, remedy))
        return problems
    d_out, d_in = base.shapes[factor.module]
    if factor.embedding:  # stored (vocabulary, width); A reads tokens, B writes the width
        d_out, d_in = d_in, d_out
    expected = d_in if factor.side == "A" else d_out
    if size != expected and not base.packed:
        remedy = "It belongs to another base model: name that one's server."
        message = f"it fits a layer of width {size}, the base's is {expected} wide"
        problems.append(_at(file, factor.tensor, message, remedy))
    return problems


def _shorten(problems: list[Problem]) -> list[Problem]:
    """The first few of each kind (same remedy), then how many more there are."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.remedy, []).append(problem)
    shown = []
    for kind in by_kind.values():
        shown += kind[:_SHOWN]
        if len(kind) > _SHOWN:
            first = kind[0]
            message = f"and {len(kind) - _SHOWN} more like these"
            shown.append(_at(Path(first.file), "", message, first.remedy))
    return shown
