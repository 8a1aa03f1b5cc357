"""LoRA adapters as torch tensors: the factors of each module, read from a peft folder and written
to one. Knows no base model and no way of merging."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from composer.adapters.cache import FileCache
from composer.adapters.files import CONFIG, WEIGHTS
from composer.adapters.lora_config import AdapterFeature, LoraConfig, read_lora_config
from composer.adapters.module_names import place_of
from composer.adapters.tensors import RawTensor
from composer.adapters.verify import adapter_digest, verify_adapter
from composer.errors import AdapterError, Problem

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DIGESTS = FileCache(4096)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """ΔW = scale · b @ a of one linear layer, a (r, d_in) and b (d_out, r) of one dtype."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the layer."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """ΔW (d_out, d_in) in float32. As large as the layer: for small ones and for tests."""
        return self.scale * (self.b.float() @ self.a.float())

    def times(self, weight: float) -> Factors:
        return Factors(self.a, self.b, self.scale * weight)


Modules = Mapping[str, Factors]
"""Module name, as the base model has it → its factors."""


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter in memory. `base` is the name of the model it was trained on, as its config has
    it; `digest` is that of `verify.py`, "" for one that has no folder yet."""

    modules: Modules
    base: str | None
    digest: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its tensors'."""
        widest = torch.bfloat16
        kinds = {t.dtype for f in self.modules.values() for t in (f.a, f.b)}
        for kind in kinds:
            widest = kind if len(kinds) == 1 else torch.promote_types(widest, kind)
        return widest

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max(f.rank for f in self.modules.values())


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`, each module with the scaling that peft would apply. Its tensors are
    mapped: memory takes what is used of them, and a file that is cut short meanwhile kills the
    process, so adapters are replaced by new files (as peft and safetensors do) and never rewritten
    in place. Its digest is read from the file once, until that changes. Raises AdapterError for
    what is not plain LoRA on linear layers."""
    config, problems = read_lora_config(folder, ("rank_pattern", "alpha_pattern"))
    if problems or config is None:
        raise AdapterError(problems)
    weights = folder / WEIGHTS

    try:
        tensors = _mapped(weights)
        found = _DIGESTS.get([folder / CONFIG, weights], "digest", lambda: _digest(config, tensors))
    except (SafetensorError, OSError) as error:
        raise _refused(folder, "", f"it cannot be read: {error}", "Copy it again.") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.dtype not in _DTYPES or tensor.ndim != 2:
            raise _refused(
                folder,
                name,
                "only LoRA factors of linear layers can be composed",
                "Leave this adapter out, or train it on linear layers alone.",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    modules = {}
    for module, pair in sorted(sides.items()):
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise _refused(
                folder, module, "its two factors do not fit together", "Save the adapter again."
            )
        modules[module] = Factors(pair["A"], pair["B"], config.scaling_of(module))
    if not modules:
        raise _refused(folder, "", "it holds no LoRA factor", "Save the adapter again.")
    return Lora(modules, config.base, found)


def verified_lora(folder: Path, name: str) -> Lora:
    """As `read_lora`, of a folder that nobody has verified yet: whatever the registry refuses in an
    adapter of an unknown base is refused here, in its words and with the member's name. Where it
    lies is the caller's own choice, so there are no roots. Raises AdapterError."""
    try:
        adapter = verify_adapter(
            folder, None, roots=[Path(folder.absolute().anchor)], features=get_args(AdapterFeature)
        )
        lora = read_lora(folder)
    except AdapterError as error:
        told = [replace(one, message=f"{name!r}: {one.message}") for one in error.problems]
        raise AdapterError(told) from error
    if lora.digest != adapter.digest:
        raise _refused(folder, "", f"{name!r}: it changed while it was read", "Try again.")
    return lora


def written_digest(folder: Path) -> str:
    """That of the adapter that `write_lora` wrote there. Raises AdapterError, OSError and
    SafetensorError for what is not as it was written."""
    config, problems = read_lora_config(folder, ())
    if config is None:
        raise AdapterError(problems)
    return _digest(config, _mapped(folder / WEIGHTS))


def is_as_written(folder: Path, digest: str) -> bool:
    """Whether the adapter that `write_lora` wrote there still has its digest. It is read once,
    until its files change."""
    files = [folder / CONFIG, folder / WEIGHTS]
    try:
        return _DIGESTS.get(files, "digest", lambda: written_digest(folder)) == digest
    except (AdapterError, OSError, SafetensorError):
        return False


def note_written(folder: Path, digest: str) -> None:
    """Who has just written it need not read it to know its digest."""
    with suppress(FileNotFoundError):  # another process has taken it away since
        _DIGESTS.keep([folder / CONFIG, folder / WEIGHTS], "digest", digest)


def _digest(config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
    raw = {
        name: RawTensor(
            _DTYPES.get(tensor.dtype, str(tensor.dtype)),
            tuple(tensor.shape),
            tensor.contiguous().view(torch.uint8).numpy().data,
        )
        for name, tensor in tensors.items()
    }
    return adapter_digest(config, raw)


def _mapped(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def write_lora(
    folder: Path, lora: Lora, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """As peft saves one: any engine that serves peft's adapters serves it. Each module's scale is
    folded into its b, and all are filled up with zeros to one rank (`rank`, or their largest),
    since vLLM knows one rank and one alpha. `dtype`: the widest of its tensors', unless another is
    given. `folder` must exist. Raises ValueError where `rank`
    is smaller than a module's, or a number is not finite in `dtype`, and OSError."""
    largest = lora.rank
    rank = largest if rank is None else rank
    if rank < largest:
        raise ValueError(f"rank {rank} is below that of a module, {largest}; truncate it first")
    dtype = lora.dtype if dtype is None else dtype
    tensors = {}
    for module, factors in lora.modules.items():
        b = factors.b.to(dtype)
        if factors.scale != 1:
            b = (factors.b.float() * factors.scale).to(dtype)
        grow = rank - factors.rank
        name = f"{_PREFIX}{module}.lora"
        tensors[f"{name}_A.weight"] = _padded(factors.a.to(dtype), (0, 0, 0, grow))
        tensors[f"{name}_B.weight"] = _padded(b, (0, grow))
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} has numbers that {dtype} does not hold; lower the weights, or look for "
                "an adapter whose training diverged"
            )
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # its word for a full disk, too
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    config = lora_json(lora, rank)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lora_json(lora: Lora, rank: int) -> dict[str, Any]:
    """adapter_config.json of an adapter of scaling 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **_targets(lora.modules),
    }


def _targets(modules: Modules) -> dict[str, Any]:
    """Last names (vLLM checks them against its packed modules) of the layers named beside them,
    where these say the same; else whole names, so that a module without factors is not taken for
    one that lost them."""
    places: dict[str, dict[str, set[int]]] = {}
    for module in modules:
        place = place_of(module)
        if place is None:
            return {"target_modules": sorted(modules)}
        places.setdefault(place.last, {}).setdefault(place.inner, set()).add(place.layer)
    layers = next(iter(places[next(iter(places))].values()))
    if any(len(inner) > 1 or layers not in inner.values() for inner in places.values()):
        return {"target_modules": sorted(modules)}
    return {"target_modules": sorted(places), "layers_to_transform": sorted(layers)}


def _padded(tensor: Tensor, sides: tuple[int, ...]) -> Tensor:
    if not any(sides):
        return tensor.contiguous()
    return torch.nn.functional.pad(tensor, sides).contiguous()


def _refused(folder: Path, path: str, message: str, remedy: str) -> AdapterError:
    file = str(folder / WEIGHTS)
    return AdapterError([Problem(file=file, path=path, message=message, remedy=remedy)])
