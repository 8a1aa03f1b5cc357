"""The folder that training writes and serving loads: arrays as safetensors, all else as JSON.

    DIR/manifest.json        what it is, what it was made from, what it reached
    DIR/arrays.safetensors   named `part/array`

Never pickle: loading runs no code of the artefact's. Knows no family.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from composer.durable import replace_file, sync_folder
from composer.routing.curve import Curve
from composer.routing.family import State

FORMAT = 1
MANIFEST, ARRAYS = "manifest.json", "arrays.safetensors"

Part = Literal["views", "family", "calibration", "costs", "joining", "joined", "trained"]


class ArtefactError(ValueError):
    """The folder cannot be used: "what is wrong; the remedy"."""


class EmbedderStamp(BaseModel):
    """The model whose vectors an artefact was fitted on; no other will do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    digest: str
    dim: int


class ExpertStamp(BaseModel):
    """An expert as it was in the outcomes: its mean quality there, and its mean cost in US
    dollars a call, None where no price was known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    quality: float
    cost: float | None = None


class JoinedStamp(BaseModel):
    """An expert that joined after training, which then was not repeated. `quality` is its expected
    mean quality on such questions; `outcomes` are those seen of it, `claims` the texts that say
    what it is for; `cost` is its mean cost in those outcomes; `like` are the known experts that it
    resembles most, and how far (1: wholly)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    quality: float
    cost: float | None = None
    outcomes: int = 0
    claims: int = 0
    like: dict[str, float] = {}


class DataStamp(BaseModel):
    """What it was fitted on. `digest` is the sha256 of texts and outcomes in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    digest: str
    questions: int


class Manifest(BaseModel):
    """Everything of an artefact that is not an array. `experts` are those of the outcomes, whose
    `curve` and `metrics` these are; `joined` came later."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    family: str
    settings: dict[str, Any]
    embedder: EmbedderStamp
    experts: tuple[ExpertStamp, ...] = Field(min_length=1)
    joined: tuple[JoinedStamp, ...] = ()
    data: DataStamp
    curve: Curve | None = None
    metrics: dict[str, Any] = {}
    values: dict[Part, Any] = {}
    arrays_sha256: str = ""

    @property
    def known(self) -> tuple[str, ...]:
        """All experts by their names, in the order of the scores: those that joined come last."""
        return (*(stamp.id for stamp in self.experts), *(stamp.id for stamp in self.joined))


class Artefact:
    """A manifest and its arrays, by part."""

    def __init__(self, manifest: Manifest, states: Mapping[Part, State]) -> None:
        self.manifest = manifest
        self.states = dict(states)

    @property
    def experts(self) -> tuple[str, ...]:
        return self.manifest.known

    def save(self, folder: Path) -> Manifest:
        """Writes it as a whole or not at all; takes the place of an artefact that is there.
        Returns the manifest as written. Raises ArtefactError for a folder that holds anything else,
        OSError."""
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise ArtefactError(f"{folder} is there and is no artefact; name another folder")
        arrays = {
            f"{part}/{name}": np.ascontiguousarray(array)
            for part, state in self.states.items()
            for name, array in state.arrays.items()
        }
        packed = save_arrays(arrays)
        manifest = self.manifest.model_copy(
            update={
                "values": {part: dict(state.values) for part, state in self.states.items()},
                "arrays_sha256": hashlib.sha256(packed).hexdigest(),
            }
        )
        text = json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, indent=1)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            draft.chmod(0o755)  # mkdtemp keeps others out; whoever serves may be another user
            replace_file(draft / ARRAYS, [packed])
            replace_file(draft / MANIFEST, [text.encode()])
            _put_in_place(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return manifest

    @classmethod
    def load(cls, folder: Path) -> Artefact:
        """Raises ArtefactError where the folder is missing, torn, altered or of another format."""
        manifest = read_manifest(folder)
        packed = packed_arrays(folder, manifest)
        try:
            arrays = load_arrays(packed)
        except SafetensorError as error:
            raise ArtefactError(
                f"{folder / ARRAYS} cannot be read ({error}); copy the whole folder"
            ) from error
        parts: dict[Part, dict[str, npt.NDArray[Any]]] = {part: {} for part in manifest.values}
        for name, array in arrays.items():
            part, _, rest = name.partition("/")
            if part not in parts:
                raise ArtefactError(
                    f"{folder / ARRAYS} has an array {name!r} of no known part; train it again"
                )
            parts[part][rest] = array
        states = {part: State(parts[part], manifest.values[part]) for part in parts}
        return cls(manifest, states)


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone: quick. Raises ArtefactError."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtefactError(
            f"there is no artefact in {folder}; make one with `router-training train --out …`"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); copy the whole folder") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise ArtefactError(
            f"{path} is of format {found!r} and this program reads {FORMAT}; train it again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ArtefactError(f"{path}: {where}: {first['msg']}; train it again") from error


def packed_arrays(folder: Path, manifest: Manifest) -> bytes:
    """The arrays' file, which is the one that the manifest names; not parsed. Raises
    ArtefactError."""
    path = folder / ARRAYS
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error}); copy the whole folder") from error
    if hashlib.sha256(packed).hexdigest() != manifest.arrays_sha256:
        raise ArtefactError(
            f"{path} is not the file that its manifest names; copy the whole folder, or train it "
            "again"
        )
    return packed


def _put_in_place(draft: Path, folder: Path) -> None:
    """A reader finds the old artefact, for a moment none, or the new one: never half of it."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
        folder.rename(old / "artefact")
    draft.rename(folder)
    sync_folder(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
