"""ComPEFT: adapters on disk as signs and one number a tensor. Restores what can be served; knows no
merging."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from composer.adapters.factors import Factors, Lora

TERNARY = "adapter_ternary.safetensors"


def compress(lora: Lora, *, density: float = 0.2, alpha: float = 1.0) -> dict[str, Tensor]:
    """Of every factor the share `density` of largest numbers by size, as signs times α·σ, σ the
    standard deviation of the whole factor (Yadav et al., ComPEFT, arXiv 2311.13171, section 2.1;
    the paper tunes α on a validation set). Two bits a number: one of each mask, packed. Raises
    ValueError for a density outside (0, 1]."""
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
            out[f"{name}.size"] = alpha * values.std(correction=0).reshape(1)
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
    bits = np.unpackbits(tensors[f"{name}.signs"].numpy(), axis=-1, count=rows * columns)
    plus, minus = torch.from_numpy(bits.reshape(2, rows, columns)).float()
    signs: Tensor = plus - minus
    return signs * tensors[f"{name}.size"]


def save_ternary(folder: Path, tensors: dict[str, Tensor], base: str | None) -> None:
    save_file(tensors, folder / TERNARY, metadata={"base": json.dumps(base)})


def load_ternary(folder: Path) -> Lora:
    with safe_open(folder / TERNARY, framework="pt") as file:
        base = json.loads((file.metadata() or {}).get("base", "null"))
        return restored({name: file.get_tensor(name) for name in file.keys()}, base)  # noqa: SIM118
