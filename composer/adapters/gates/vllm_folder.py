"""A base model and a gate as one model folder, which vLLM serves where composer's plugin is in its
environment. Knows vLLM's names for files and architectures, and imports none of it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composer.adapters.base_model import GATE_BLOCK, read_base_model, read_config
from composer.adapters.files import PICKLES
from composer.adapters.gates.files import MANIFEST, TENSORS, Gate, Manifest, read_gate
from composer.adapters.gates.verify import gated_of, verify_gate
from composer.adapters.lora_config import AdapterFeature
from composer.durable import sync_contents, sync_folder
from composer.errors import AdapterError, Problem
from composer.types import Gated

FOLDER = "gate"
"""Below the model's folder. Beside the weights, their index would have vLLM pass over it."""

CONFIG = "config.json"

PREFIX = "Gated"
"""GatedLlamaForCausalLM is LlamaForCausalLM with a gate."""

SUFFIXES = ("ForCausalLM", "LMHeadModel")
"""Of the architectures that the plugin has gated ones of."""

_FEATURES: frozenset[AdapterFeature] = frozenset({"gate"})
"""What of a gate vLLM can give: neither a second pass nor the request."""

_LEFT = ("consolidated", "params.json", "README.md")
"""Of a base's folder: the same weights in Mistral's own format, which vLLM would prefer."""


@dataclass(frozen=True, slots=True)
class VllmFolder:
    """`architecture` is the plugin's class; `copied` are bytes that could not be linked; `built`
    False: the folder was there already, of the same gate and base."""

    folder: Path
    architecture: str
    members: tuple[str, ...]
    digest: str
    copied: int
    built: bool


def write_vllm_folder(
    gate: Path, base: Path, folder: Path, *, base_name: str | None = None
) -> VllmFolder:
    """Writes `folder`, whole or not at all. Weights are hard links to the base's where the file
    system can, else copies. `base_name`: another name of the base, which the gate's members may
    have been trained under. Blocks. Raises AdapterError for what vLLM cannot serve, CatalogError
    for a base that cannot be read."""
    loaded = read_gate(gate)
    _servable(gate, loaded)
    config = read_config(base)
    architecture = _architecture(base, config)
    _fits(gate, loaded, base, base_name)
    told = loaded.manifest.model_dump(mode="json", exclude={"report", "settings"})
    told["settings"] = _kept(loaded.manifest.settings)
    # In config.json, since vLLM's compile cache is keyed by it and sees no tensor file: another set
    # of members is another graph.
    made = config | {"architectures": [architecture], GATE_BLOCK: told}
    digest = loaded.manifest.digest
    if folder.exists():
        if not _is_the_same(folder, made, base):
            raise _refused(
                folder, "", "it is there, and holds something else", "Remove it, or name another."
            )
        return VllmFolder(folder, architecture, loaded.members, digest, 0, built=False)
    copied = _published(folder, made, gate, base)
    return VllmFolder(folder, architecture, loaded.members, digest, copied, built=True)


def _kept(settings: Mapping[str, object]) -> dict[str, object]:
    """Of what the gate was made with: which adapter was taken out of its members, so that who
    excludes that one excludes the gate."""
    return {"general": settings["general"]} if settings.get("general") else {}


def gate_inside(block: object) -> Gated:
    """What the `GATE_BLOCK` of a config.json says. Raises ValueError, "what is wrong; the
    remedy", also for one of a time when it did not tell what its members were freed of."""
    if isinstance(block, Mapping) and "settings" not in block:
        raise ValueError(
            f"config.json, {GATE_BLOCK}: it does not say how the gate was made; compose the folder "
            "again, with this composer"
        )
    try:
        return gated_of(Manifest.model_validate(block))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(
            f"config.json, {'.'.join(filter(None, (GATE_BLOCK, where)))}: "
            f"{error.errors()[0]['msg']}; compose the folder again, with this composer"
        ) from error


def _servable(folder: Path, gate: Gate) -> None:
    manifest = gate.manifest
    elsewhere = (
        "Serve it on the embedded engine, or compose one adapter with the weights that it gives on "
        "average (`composer compose`)."
    )
    if manifest.passes > 1:
        message = f"{manifest.kind} needs two passes of the model for each token; vLLM makes one"
        raise _refused(folder / MANIFEST, "passes", message, elsewhere)
    if manifest.per_request:
        message = (
            f"{manifest.kind} needs something of the request beside its tokens, which vLLM hands "
            "to no layer"
        )
        raise _refused(
            folder / MANIFEST,
            "per_request",
            message,
            f"Train it without that term (phatgoose is glider without it). {elsewhere}",
        )


def _architecture(base: Path, config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    if len(named) != 1 or not str(named[0]).endswith(SUFFIXES):
        raise _refused(
            base / CONFIG,
            "architectures",
            f"{named} is no decoder-only language model",
            "Name the folder of one, such as a LlamaForCausalLM.",
        )
    if str(named[0]).startswith(PREFIX) and GATE_BLOCK in config:
        raise _refused(
            base / CONFIG,
            GATE_BLOCK,
            "this model has a gate already",
            "Name the plain model's folder.",
        )
    return f"{PREFIX}{named[0]}"


def _fits(folder: Path, gate: Gate, base: Path, base_name: str | None) -> None:
    info = read_base_model(base, () if base_name is None else (base_name,))
    if info.packed:
        raise _refused(
            base / CONFIG,
            "quantization_config",
            "gates on a quantised model were never tested",
            "Name the model that it was quantised from.",
        )
    own = gate.manifest.base
    if own is not None and not info.is_named(own):
        raise _refused(
            folder / MANIFEST,
            "base",
            f"the gate is for {own!r}, and this model is {' or '.join(info.names)}",
            "Name that model; if it is the same under another name, say so with --model-name.",
        )
    verify_gate(folder, info, features=_FEATURES)


def _is_the_same(folder: Path, config: Mapping[str, Any], base: Path) -> bool:
    """Whether the folder is what would be made, byte by byte but for weights that are links."""
    try:
        if json.loads((folder / CONFIG).read_text(encoding="utf-8")) != config:
            return False
        read_gate(folder / FOLDER)  # checks its digest, which the config has, too
        return all(
            os.path.samefile(file, folder / file.name)
            or filecmp.cmp(file, folder / file.name, shallow=False)
            for file in _wanted(base)
        )
    except (OSError, ValueError, AdapterError):
        return False


def _wanted(base: Path) -> list[Path]:
    """The base's files that are taken over, symlinks (the hub's cache) not resolved."""
    return [
        file
        for file in sorted(base.iterdir())
        if file.is_file()
        and file.name != CONFIG
        and not file.name.startswith((".", *_LEFT))
        and not file.name.endswith(PICKLES)
    ]


def _published(folder: Path, config: Mapping[str, Any], gate: Path, base: Path) -> int:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    copied = 0
    try:
        for file in _wanted(base):
            copied += _placed(file.resolve(), part / file.name)
        (part / CONFIG).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (part / FOLDER).mkdir()
        for name in (MANIFEST, TENSORS):
            shutil.copyfile(gate / name, part / FOLDER / name)
        read_gate(part / FOLDER)  # what was read above may have been written over since
        part.chmod(0o755)
        for made in (part / FOLDER, part):
            sync_contents(made)
        os.rename(part, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise _refused(
            folder, "", f"it cannot be written: {error}", "Make room, or name another --out."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return copied


def _placed(file: Path, target: Path) -> int:
    """Bytes that were copied. Small files are, so that an editor changes no base by mistake."""
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
            return 0
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(file, target)
    return file.stat().st_size


def _refused(file: Path, path: str, message: str, remedy: str) -> AdapterError:
    return AdapterError([Problem(file=str(file), path=path, message=message, remedy=remedy)])
