"""Decides whether a gated adapter's folder fits a base model. Loads nothing into a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from composer.adapters.base_model import BaseModelInfo
from composer.adapters.files import outside
from composer.adapters.gates.files import MANIFEST, TENSORS, Gate, Manifest, read_gate
from composer.adapters.gates.prior import ROWS, prior
from composer.adapters.gates.xlora import width
from composer.adapters.lora_config import AdapterFeature
from composer.errors import AdapterError, Problem
from composer.types import Adapter, Gated

_SHOWN = 3
"""Modules that do not fit which are told; the rest are counted."""

_ELSEWHERE = (
    "Serve it on an engine that can, such as `embedded`; for vLLM, `composer compose --gate` makes "
    "a model of a gate that reads its layers' input alone."
)
_RETRAIN = "Make the gate again, with this server's base model."


def gate_files_problem(folder: Path, roots: Sequence[Path]) -> Problem | None:
    """Why this folder cannot hold a gated adapter, judged by its files' names and places."""
    if (refusal := outside(folder, roots)) is not None:
        return refusal
    if not folder.is_dir():
        what = "this is not a folder" if folder.exists() else "there is no such folder"
        return Problem(str(folder), "", what, f"Name the folder that holds {MANIFEST}.")
    for name in (MANIFEST, TENSORS):
        if not (folder / name).is_file():
            message = f"{name} is missing"
            return Problem(
                str(folder), "", message, "Name a folder that `router-training gates` made."
            )
        if (refusal := outside(folder / name, roots)) is not None:
            return refusal
    return None


def verify_gate(
    folder: Path,
    base: BaseModelInfo | None,
    *,
    features: Collection[AdapterFeature],
    digest: str | None = None,
) -> Adapter:
    """The gated adapter in `folder`, once nothing speaks against serving it on `base`. `features`
    are the engine's; `digest` is the one the registry pins. Where it lies has been judged already.

    Raises AdapterError holding every problem found.
    """
    gate = read_gate(folder)
    manifest = gate.manifest
    problems = _feature_problems(folder, gate, features)
    if base is not None:
        problems += _base_problems(folder, gate, base)
    problems += _own_problems(folder, gate)
    if digest is not None and digest != manifest.digest:
        message = f"its digest is {manifest.digest}, not the pinned {digest}"
        remedy = "Restore the pinned files; if the change is meant, pin the new digest."
        problems.append(Problem(str(folder), "", message, remedy))
    if problems:
        raise AdapterError(problems)
    rank = max(sum(module.ranks) for module in manifest.modules.values())
    return Adapter(
        path=folder.resolve(),
        digest=manifest.digest,
        rank=rank,
        alpha=float(rank),  # scales are folded into the factors
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in gate.layers})),
        gate=gated_of(manifest),
    )


def gated_of(manifest: Manifest) -> Gated:
    settings = manifest.settings
    return Gated(
        kind=manifest.kind,
        members=tuple(member.name for member in manifest.members),
        digests=tuple(member.digest for member in manifest.members),
        digest=manifest.digest,
        passes=manifest.passes,
        per_request=manifest.per_request,
        embedder=str(settings.get("embedder") or ""),
        embedder_digest=str(settings.get("embedder_digest") or ""),
        subtracted=str(settings.get("general") or ""),
    )


def _feature_problems(
    folder: Path, gate: Gate, features: Collection[AdapterFeature]
) -> list[Problem]:
    manifest = gate.manifest
    needs: list[tuple[AdapterFeature, bool, str]] = [
        ("gate", True, "this server's engine cannot mix adapters inside the model"),
        (
            "two_pass_gate",
            manifest.passes == 2,
            f"{manifest.kind} reads a first pass of the whole model, and this server's engine "
            "makes one pass",
        ),
        (
            "per_request_gate",
            manifest.per_request,
            f"{manifest.kind} reads the request's text, which this server's engine cannot hand to "
            "a forward pass",
        ),
    ]
    for feature, needed, message in needs:
        if needed and feature not in features:
            return [Problem(str(folder / MANIFEST), "", message, _ELSEWHERE)]
    return []


def _base_problems(folder: Path, gate: Gate, base: BaseModelInfo) -> list[Problem]:
    own = gate.manifest.base
    if own is not None and not base.is_named(own):
        names = " or ".join(repr(name) for name in base.names)
        message = f"its members were trained on {own!r}, the server's model is {names}"
        remedy = "Name the server of its own base; if only the name differs, correct it here."
        return [Problem(str(folder / MANIFEST), "base", message, remedy)]
    problems = []
    file = str(folder / TENSORS)
    for module, layer in gate.layers.items():
        found = (layer.stacked.b.shape[0], layer.stacked.a.shape[1])
        shape = base.shapes.get(module)
        if base.packed:  # quantised: the stored shapes are not the layers' own
            continue
        if shape is None:
            message = f"the base model has no module {module}"
            problems.append(Problem(file, module, message, _RETRAIN))
        elif shape != found or module.endswith("embed_tokens"):
            message = f"it is made for a linear layer of {found}, the base's is {shape}"
            problems.append(Problem(file, module, message, _RETRAIN))
    problems += _width_problems(file, gate, base)
    if len(problems) > _SHOWN:
        more = f"and {len(problems) - _SHOWN} more like these"
        problems = [*problems[:_SHOWN], Problem(file, "", more, _RETRAIN)]
    return problems


def _width_problems(file: str, gate: Gate, base: BaseModelInfo) -> list[Problem]:
    """Of a gate that reads the model's last hidden state, which is as wide as its embeddings."""
    widths = {shape[1] for name, shape in base.shapes.items() if name.endswith("embed_tokens")}
    if gate.manifest.passes == 1 or base.packed or len(widths) != 1:
        return []
    first = gate.tensors.get("features.0.weight")
    if first is None:
        first = next(iter(gate.layers.values())).projection.rows
    if first.shape[-1] in widths:
        return []
    message = f"it reads a hidden state of {first.shape[-1]} numbers, the base's has {widths.pop()}"
    return [Problem(file, "", message, _RETRAIN)]


def _own_problems(folder: Path, gate: Gate) -> list[Problem]:
    """Whether the tensors of the gate as a whole are those that its kind reads."""
    file = str(folder / TENSORS)
    try:
        if gate.manifest.passes == 2:
            _check_features(gate)
        if gate.manifest.per_request:
            _check_prior(gate)
    except ValueError as error:
        return [Problem(file, "", str(error), "Make the gate again.")]
    return []


def _check_features(gate: Gate) -> None:
    wide = {layer.projection.rows.shape[1] for layer in gate.layers.values()}
    if len(wide) > 1:
        raise ValueError(f"its layers read features of {' and '.join(map(str, sorted(wide)))}")
    first = gate.tensors.get("features.0.weight")
    made = next(iter(wide)) if first is None else width(gate, first.shape[1])
    if made not in wide:
        raise ValueError(f"its classifier gives {made} features, and the layers read {wide.pop()}")


def _check_prior(gate: Gate) -> None:
    rows = gate.tensors.get(ROWS)
    if rows is None or rows.ndim != 2 or rows.shape[0] != len(gate.members):
        raise ValueError(f"the tensor {ROWS} must hold one row for each member")
    prior(gate, [0.0] * rows.shape[1])
