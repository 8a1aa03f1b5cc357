"""What an adapter must know of its base model: names, module shapes, window. Loads no weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer.adapters.tensors import TensorFileError, read_shapes
from composer.errors import CatalogError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

GATE_BLOCK = "gated_adapter"
"""The entry of config.json that holds the manifest of a gate that is inside the model itself, as
`composer compose --gate` makes one for vLLM."""


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """A base model as its files describe it.

    `names` are what it may be called; `shapes` maps each module with a matrix to its weight's
    (out, in), embeddings to (vocabulary, width). `packed` means quantised: the stored shapes
    are then not the layers' own. `context_window` is in tokens, None where the config has none.
    `gate` is the manifest of a gate that the model has inside, unread; None: it is a plain model.
    """

    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    context_window: int | None
    packed: bool
    stamp: str
    gate: object = None

    def is_named(self, name: str) -> bool:
        """Whether `name` means this model: equal to one of its names, or to the last part of
        one, ignoring case and the marks `-`, `_` and `.`.

        The last part alone, since people train from local copies (`/models/Llama-3.1-8B`) and
        mirrors. It is never the only evidence: the shapes of every target must fit as well.
        """
        return last_part(name) in {last_part(own) for own in self.names}


def read_base_model(folder: Path, names: Iterable[str] = ()) -> BaseModelInfo:
    """Reads `config.json` and the headers of the safetensors files (sharded ones by their
    index) in `folder`. `names` are further names it goes by.

    Raises CatalogError, naming the file and the remedy.
    """
    config = read_config(folder)
    try:
        shapes = _read_all_shapes(folder)
        stamp = ";".join(
            f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}"
            for file in sorted(folder.glob("*.safetensors"))
        )
    except (TensorFileError, OSError, ValueError, KeyError) as error:
        raise CatalogError(
            [
                Problem(
                    file=str(folder),
                    path="",
                    message=f"the base model's weights cannot be read: {error}",
                    remedy="Copy or download the model again, as safetensors.",
                )
            ]
        ) from error
    return describe_base_model(
        config, shapes, names=(*names, folder.name), stamp=f"{folder.resolve()};{stamp}"
    )


def describe_base_model(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    names: Iterable[str],
    stamp: str,
) -> BaseModelInfo:
    """The same from what was already read: `config` is config.json, `shapes` those of all
    tensors by name."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config  # multimodal models nest the decoder's
    matrices = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    if "lm_head" not in matrices and text.get("tie_word_embeddings", True):
        for name, shape in list(matrices.items()):
            if name.endswith("embed_tokens"):
                matrices["lm_head"] = shape
    own = config.get("_name_or_path")
    window = text.get("max_position_embeddings")
    return BaseModelInfo(
        names=tuple(dict.fromkeys((*names, own) if isinstance(own, str) and own else names)),
        shapes=MappingProxyType(matrices),
        context_window=window if isinstance(window, int) else None,
        packed="quantization_config" in config,
        stamp=stamp,
        gate=config.get(GATE_BLOCK),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises CatalogError, naming the folder and the remedy."""
    file = folder / "config.json"
    if not os.path.isdir(folder):  # False, too, for a name that no file system takes
        reason, remedy = "there is no such folder", "Name the base model's folder."
    elif not file.is_file():
        reason, remedy = "config.json is missing", "Name a model saved with `save_pretrained`."
    else:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason, remedy = f"config.json cannot be read: {error}", "Save the model again."
        else:
            if isinstance(config, dict):
                return config
            reason, remedy = "config.json is not a JSON object", "Save the model again."
    raise CatalogError([Problem(file=str(folder), path="", message=reason, remedy=remedy)])


def _read_all_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        files = [SINGLE]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(read_shapes(folder / Path(file).name))
    return shapes


def last_part(name: str) -> str:
    """What of a base model's name is compared (`BaseModelInfo.is_named`)."""
    return re.sub(
        r"[-_.]+", "-", name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    ).casefold()
