"""ComPEFT: adapters on disk as signs and one number a tensor. Restores what can be served; knows no
registry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from composer.adapters.factors import Factors, Lora
from composer.adapters.files import TERNARY
from composer.errors import AdapterError, Problem

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}


def compress(lora: Lora, *, density: float = 0.5, alpha: float | None = None) -> dict[str, Tensor]:
    """Of every factor the share `density` of largest numbers by size, as signs times α·σ, σ the
    standard deviation of the whole factor (Yadav et al., ComPEFT, arXiv 2311.13171, section 2.1;
    the paper tunes density and α on a validation set). None: the α nearest to what is kept, by
    least squares. Two bits a number: one of each mask, packed. Raises ValueError for a density
    outside (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; give a share above 0 and at most 1")
    out = {}
    for module, factors in lora.modules.items():
        for side, tensor in (("A", factors.a), ("B", factors.b)):
            values = tensor.float()
            kept = max(1, round(density * values.numel()))
            least = values.abs().flatten().topk(kept).values[-1]
            chosen = values.abs() >= least
            masks = torch.stack([chosen & (values > 0), chosen & (values < 0)])
            name = f"{module}.{side}"
            out[f"{name}.signs"] = torch.from_numpy(np.packbits(masks.numpy().reshape(2, -1), -1))
            out[f"{name}.shape"] = torch.tensor(values.shape)
            size = values.abs()[chosen].mean()  # least squares
            if alpha is not None:
                size = alpha * values.std(correction=0)
            out[f"{name}.size"] = size.reshape(1)
        out[f"{module}.scale"] = torch.tensor([factors.scale])
    return out


def restored(tensors: dict[str, Tensor], base: str | None) -> Lora:
    """The inverse of `compress`, up to what it dropped; float32."""
    modules = {}
    for key in tensors:
        if not key.endswith(".scale"):
            continue
        module = key.removesuffix(".scale")
        a, b = (_restored(tensors, f"{module}.{side}") for side in "AB")
        modules[module] = Factors(a, b, float(tensors[key]))
    return Lora(modules, base)


def _restored(tensors: dict[str, Tensor], name: str) -> Tensor:
    rows, columns = tensors[f"{name}.shape"].tolist()
    signs = tensors[f"{name}.signs"]
    if rows < 1 or columns < 1 or tuple(signs.shape) != (2, -(-rows * columns // 8)):
        raise ValueError(f"{name}: its signs are not those of {rows} x {columns} numbers")
    bits = np.unpackbits(signs.numpy(), axis=-1, count=rows * columns)
    plus, minus = torch.from_numpy(bits.reshape(2, rows, columns)).float()
    signed: Tensor = plus - minus
    return signed * tensors[f"{name}.size"]


def save_ternary(folder: Path, tensors: dict[str, Tensor], lora: Lora) -> None:
    """`lora` is what was compressed: its base and dtype stand beside the tensors."""
    told = {"base": json.dumps(lora.base), "dtype": str(lora.dtype).removeprefix("torch.")}
    save_file(tensors, folder / TERNARY, metadata=told)


def load_ternary(folder: Path) -> tuple[Lora, torch.dtype]:
    """What is to be served, and the dtype that it had. Raises AdapterError."""
    file = folder / TERNARY
    try:
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        lora = restored(tensors, json.loads(told["base"]))
        if not lora.modules:
            raise ValueError("it holds no LoRA factor")
        return lora, DTYPES[told["dtype"]]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        problem = Problem(
            file=str(file),
            path="",
            message=f"it cannot be read: {error!r}",
            remedy="Copy it again, or compress the adapter anew.",
        )
        raise AdapterError([problem]) from error
