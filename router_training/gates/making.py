"""A gate's folder, made, extended or cut: what `router-training gates` does. Knows no screen."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composer.adapters.gates.build import without
from composer.adapters.gates.files import MANIFEST, Gate, read_gate, read_manifest, write_gate
from composer.adapters.gates.untrained import ARROW
from router_training.errors import TrainingError
from router_training.gates.base import Bench, GateKind, GateSettings
from router_training.gates.kinds import KINDS


def make(kind: str, bench: Bench, settings: Mapping[str, Any]) -> Gate:
    """Raises TrainingError."""
    chosen = kind_of(kind)
    _check_general(kind, bench)
    checked = _checked(kind, chosen.settings, settings)
    kept, members = settings.get("top_k"), len(bench.members)
    if isinstance(kept, int) and kept > members + bool(settings.get("null")):
        raise TrainingError(f"top_k {kept}, and there are {members} members; set it to fewer")
    try:
        gate = chosen.make(bench, checked)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    assert gate.manifest.per_request == checked.embeds
    return gate


def embeds_to_make(kind: str, settings: Mapping[str, Any]) -> bool:
    """Whether the project's embedder is needed for such a gate. Raises TrainingError."""
    return _checked(kind, kind_of(kind).settings, settings).embeds


def embeds_to_join(folder: Path) -> bool:
    """Whether it is for members to join the gate in `folder`: where it was to make that (`make`
    sees to it that the manifest says so). Raises AdapterError."""
    return read_manifest(folder).per_request


def add(folder: Path, bench: Bench) -> Gate:
    """The gate in `folder` with the bench's members as further ones. Raises TrainingError,
    AdapterError."""
    gate = read_gate(folder)
    kind = kind_of(gate.manifest.kind)
    _check_general(kind.name, bench)
    for name in bench.members:
        try:
            gate = kind.join(gate, name, bench)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    return gate


def remove(folder: Path, names: list[str]) -> Gate:
    """The gate in `folder` without these members. Raises TrainingError, AdapterError."""
    gate = read_gate(folder)
    for name in names:
        try:
            gate = without(gate, name)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    return gate


def publish(gate: Gate, folder: Path) -> str:
    """Writes the gate, whole or not at all, and returns its digest. One that stands there is moved
    aside first (a folder cannot replace one that is not empty), and back where that fails: a kill
    between the two leaves it beside, under a name with a dot. Raises TrainingError where `folder`
    holds something that is no gate."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise TrainingError(f"{folder} holds other files; name a new folder, or that of a gate")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        digest = write_gate(part, gate)
        part.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, old)
            try:
                os.replace(part, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return digest


def _check_general(kind: str, bench: Bench) -> None:
    """Raises TrainingError where it would be left aside."""
    if bench.general is not None and kind != ARROW:
        raise TrainingError(
            f"a gate of kind {kind!r} subtracts nothing; take the general adapter out of each "
            "member first (`composer compose --subtract`), and name what that makes"
        )


def kind_of(name: str) -> type[GateKind]:
    """Raises TrainingError."""
    if name not in KINDS:
        raise TrainingError(f"there is no gate of kind {name!r}; one of {', '.join(KINDS)}")
    return KINDS[name]


def _checked(kind: str, model: type[GateSettings], settings: Mapping[str, Any]) -> GateSettings:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()
        )
        if any(e["type"] in ("tuple_type", "list_type") for e in error.errors()):
            wrong += ", which is written as JSON, such as 'weights=[0.7, 0.3]'"
        known = ", ".join(model.model_fields) or "none"
        raise TrainingError(f"{wrong}; settings of {kind}: {known}") from error
