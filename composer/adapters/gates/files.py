"""A gated adapter as a folder: its members stacked, their gate, and what both were made of. Read by
every engine that mixes adapters inside the model. Knows no model and no way of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from composer.adapters.files import GATE
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.adapters.tensors import RawTensor, TensorFileError, read_tensors
from composer.errors import AdapterError, Problem
from composer.types import empty

MANIFEST = GATE
TENSORS = "gate.safetensors"
FORMAT: Literal[1] = 1

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LAYER_PARTS = ("a", "b", "rows", "bias")
_AGAIN = "Make the gate again."


class GateMember(BaseModel):
    """A column of every gate. `digest` is that of the adapter (`composer.adapters.verify`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    digest: str


class GatedModule(BaseModel):
    """One linear layer. `ranks` (E,) is each member's; one of rank 0 is not asked there.
    `selection` None: the gate's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: tuple[Annotated[int, Field(ge=0)], ...]
    selection: Selection | None = None


class Manifest(BaseModel):
    """gate.json. `kind` names the setting of a paper that this is; `passes` 2 where the weights of
    a token need a first pass of the whole model (X-LoRA); `per_request` where they need something
    of the request beside its tokens (GLIDER's instruction). `settings` are the kind's own, and
    `report` what its training told; neither is read where x and the layer's gate are enough."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    kind: str
    paper: str = ""
    base: str | None
    members: tuple[GateMember, ...] = Field(min_length=1)
    normalise: Normalise
    selection: Selection
    modules: Mapping[str, GatedModule]
    passes: Literal[1, 2] = 1
    per_request: bool = False
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)
    report: Mapping[str, JsonValue] = Field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """A gated adapter in memory. `layers`: module → its stacked members and gate; `tensors` are
    those of the gate as a whole, named by its kind."""

    manifest: Manifest
    layers: Mapping[str, GatedLayer]
    tensors: Mapping[str, Tensor] = field(default_factory=empty)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.manifest.members)

    def to(self, device: torch.device, dtype: torch.dtype) -> Gate:
        """The stacked factors in `dtype`; gates stay in float32."""
        moved = {module: layer.to(device, dtype) for module, layer in self.layers.items()}
        own = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Gate(self.manifest, moved, own)


def write_gate(folder: Path, gate: Gate) -> str:
    """Writes manifest and tensors into `folder`, which must exist, and returns the digest of what
    they compute: kind, members, selection and tensors, but not names or reports."""
    tensors = {name: tensor.contiguous() for name, tensor in gate.tensors.items()}
    for module, layer in gate.layers.items():
        bias = layer.projection.bias
        if bias is not None:  # who is absent stands in the ranks
            bias = bias.masked_fill(bias.isinf(), 0.0)
        parts = (layer.stacked.a, layer.stacked.b, layer.projection.rows, bias)
        for part, tensor in zip(_LAYER_PARTS, parts, strict=True):
            if tensor is not None:
                tensors[f"{module}.gate.{part}"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    digest = _digest(gate.manifest, read_tensors(folder / TENSORS))
    manifest = gate.manifest.model_copy(update={"digest": digest})
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return digest


def read_manifest(folder: Path) -> Manifest:
    """What the gate is, without its tensors. Raises AdapterError."""
    file = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(file, "", f"it cannot be read: {error}", "Name a gate's folder.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _refused(file, where, first["msg"], _AGAIN) from error
    for module, told in manifest.modules.items():
        if len(told.ranks) != len(manifest.members) or not any(told.ranks):
            message = f"{len(told.ranks)} ranks for {len(manifest.members)} members, or all 0"
            raise _refused(file, f"modules.{module}.ranks", message, _AGAIN)
    return manifest


def read_gate(folder: Path) -> Gate:
    """The gate in `folder`. Raises AdapterError for one that is damaged, or is not what its
    manifest says."""
    manifest = read_manifest(folder)
    file = folder / TENSORS
    try:
        raw = read_tensors(file)
    except (TensorFileError, OSError) as error:
        raise _refused(file, "", f"it cannot be read: {error}", "Copy it again.") from error
    for name, tensor in raw.items():
        if tensor.dtype not in _DTYPES:
            raise _refused(file, name, f"it is of type {tensor.dtype}", _AGAIN)
        if not tensor.is_finite():
            raise _refused(file, name, "it holds NaN or infinite numbers", _AGAIN)
    found = _digest(manifest, raw)
    if found != manifest.digest:
        message = f"its digest is {found}; {MANIFEST} says {manifest.digest}"
        raise _refused(file, "", message, "Copy the folder again, whole.")
    tensors = {name: _to_torch(tensor) for name, tensor in raw.items()}
    layers = {
        module: _layer(file, module, told, manifest, tensors)
        for module, told in manifest.modules.items()
    }
    return Gate(manifest, layers, tensors)


def gated_layer(
    stacked: Stacked,
    rows: Tensor,
    bias: Tensor | None,
    normalise: Normalise,
    selection: Selection,
    width: int | None = None,
) -> GatedLayer:
    """The layer as it is served. `width`: of what the gate reads, where that is not the layer's own
    input. A member without factors here is not asked here, whatever its row says: its logit is −∞.
    Raises ValueError where the shapes do not fit."""
    outs = len(stacked.ranks) + selection.null
    width = stacked.a.shape[1] if width is None else width
    if rows.shape != (outs, width):
        raise ValueError(f"the gate's rows are {tuple(rows.shape)}, not {outs, width}")
    if bias is not None and bias.shape != (outs,):
        raise ValueError(f"the gate's bias is {tuple(bias.shape)}, not {(outs,)}")
    absent = torch.tensor([rank == 0 for rank in stacked.ranks] + [False] * selection.null)
    if bool(absent.any()):
        bias = torch.zeros(outs) if bias is None else bias.float()
        bias = bias.masked_fill(absent, -torch.inf)
    return GatedLayer(stacked, Projection(rows.float(), normalise, bias), selection)


def _layer(
    file: Path, module: str, told: GatedModule, manifest: Manifest, tensors: dict[str, Tensor]
) -> GatedLayer:
    """Takes the layer's tensors out of `tensors`."""
    a, b, rows, bias = (tensors.pop(f"{module}.gate.{part}", None) for part in _LAYER_PARTS)
    if a is None or b is None or rows is None:
        raise _refused(file, module, "factors or gate are missing", "Copy the folder again, whole.")
    total = sum(told.ranks)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != total or b.shape[1] != total:
        message = f"A is {tuple(a.shape)} and B {tuple(b.shape)}; the ranks add up to {total}"
        raise _refused(file, module, message, _AGAIN)
    selection = told.selection or manifest.selection
    # Of two passes, the gate reads the first one's features: all layers' are equally wide.
    width = rows.shape[-1] if manifest.passes == 2 else None
    try:
        stacked = Stacked(a, b, told.ranks)
        return gated_layer(stacked, rows, bias, manifest.normalise, selection, width)
    except ValueError as error:
        raise _refused(file, module, str(error), _AGAIN) from error


def _digest(manifest: Manifest, tensors: Mapping[str, RawTensor]) -> str:
    told = manifest.model_dump(mode="json", exclude={"digest", "report", "paper", "base"})
    told["members"] = [member.digest for member in manifest.members]
    seen = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        seen.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        seen.update(tensor.data)
    return f"sha256:{seen.hexdigest()}"


def members_of(names: Sequence[str], digests: Sequence[str]) -> tuple[GateMember, ...]:
    return tuple(GateMember(name=n, digest=d) for n, d in zip(names, digests, strict=True))


def _to_torch(raw: RawTensor) -> Tensor:
    return torch.frombuffer(bytearray(raw.data), dtype=_DTYPES[raw.dtype]).reshape(raw.shape)


def _refused(file: Path, path: str, message: str, remedy: str) -> AdapterError:
    return AdapterError([Problem(file=str(file), path=path, message=message, remedy=remedy)])
