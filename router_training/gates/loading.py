"""What a gate is made of, read from disk: adapters and their base model. Knows no kind of gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from composer.adapters.factors import verified_lora
from composer.adapters.gates.build import Members
from router_training.errors import TrainingError
from router_training.gates.base import Base


def members_in(adapters: Sequence[str]) -> Members:
    """`NAME=FOLDER` or `FOLDER`, whose last name is then the member's. Raises TrainingError,
    AdapterError."""
    members = {}
    for written in adapters:
        name, _, folder = written.rpartition("=")
        name = name or Path(folder).resolve().name
        if name in members:
            raise TrainingError(f"two adapters are named {name!r}; write NAME=FOLDER for one")
        members[name] = verified_lora(Path(folder), name)
    return members


def base_in(folder: Path) -> Base:
    """The model, frozen, in float32. Raises TrainingError with the remedy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not (folder / "config.json").is_file():
        raise TrainingError(f"{folder} holds no model; name the folder with its config.json")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # a file system, a parser and many model classes may fail
        raise TrainingError(
            f"the model in {folder} cannot be loaded ({error}); name one with safetensors weights "
            "and a tokenizer"
        ) from error
    model.eval().requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    return Base(model, tokenizer, getattr(config, "max_position_embeddings", None))
