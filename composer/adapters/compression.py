"""Adapters compressed for storage, as folders: made of ordinary ones, and expanded to such again,
which any engine serves. Knows no registry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from composer.adapters.compose import FORMAT, published, told_of
from composer.adapters.factors import Factors, Lora, read_lora
from composer.adapters.files import CARD, CONFIG, TERNARY, WEIGHTS
from composer.adapters.ternary import compress, load_ternary, save_ternary
from composer.errors import AdapterError, Problem

PROVENANCE = "compression.json"
PAPER = "ComPEFT, arXiv 2311.13171, section 2.1"


@dataclass(frozen=True, slots=True)
class Compressed:
    """`original` and `adapter` are the digests of what was compressed and of what is served, once
    expanded; sizes are of the weights' files, in bytes. `error` is the distance of the two by
    Frobenius' norm over all modules' ΔW, as a share of the original's."""

    original: str
    adapter: str
    density: float
    alpha: float | None
    bytes_before: int
    bytes_after: int
    error: float

    @property
    def ratio(self) -> float:
        return self.bytes_before / self.bytes_after


def compress_folder(
    folder: Path, out: Path, *, density: float = 0.5, alpha: float | None = None
) -> Compressed:
    """Makes `out`, which must not be there yet: the signs, the adapter's config and card, and what
    was done. Raises AdapterError; ValueError as `compress`; OSError."""
    if out.exists():
        message = "there is something of this name already"
        raise AdapterError([Problem(str(out), "", message, "Name a folder that is not there yet.")])
    lora = read_lora(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_ternary(part, compress(lora, density=density, alpha=alpha), lora)
        for name in (CONFIG, CARD):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".expanded.") as expanded:
            served = read_lora(expand(part, Path(expanded)))
            made = Compressed(
                original=lora.digest,
                adapter=served.digest,
                density=density,
                alpha=alpha,
                bytes_before=(folder / WEIGHTS).stat().st_size,
                bytes_after=(part / TERNARY).stat().st_size,
                error=_error(lora, served),
            )
        told = {"paper": PAPER, "folder": str(folder), **asdict(made)}
        (part / PROVENANCE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        part.chmod(0o755)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return made


def expand(folder: Path, into: Path) -> Path:
    """The ordinary adapter of a compressed one: a folder below `into`, named by what it was made
    of, so that it is made once. Blocks. Raises AdapterError, OSError."""
    file = folder / TERNARY
    digest = hashlib.sha256(f"{FORMAT}\n".encode() + file.read_bytes()).hexdigest()
    out = into / digest[:32]
    if told_of(out) is None:
        lora, dtype = load_ternary(folder)
        told = {
            "format": FORMAT,
            "digest": f"sha256:{digest}",
            "method": "compeft",
            "paper": PAPER,
            "members": [{"name": folder.name, "folder": str(folder), "digest": f"sha256:{digest}"}],
            "base": lora.base,
            "rank": lora.rank,
        }
        published(out, lora, lora.rank, dtype, told)
    return out


def _error(one: Lora, other: Lora) -> float:
    away = total = 0.0
    for module, factors in one.modules.items():
        back = other.modules[module]
        a = torch.cat([factors.a.float(), back.a.float()])
        b = torch.cat([factors.b.float() * factors.scale, -back.b.float() * back.scale], dim=1)
        away += _squared(Factors(a, b))
        total += _squared(Factors(factors.a.float(), factors.b.float() * factors.scale))
    return float((max(away, 0.0) / total) ** 0.5) if total > 0 else 0.0


def _squared(factors: Factors) -> float:
    """‖B A‖² = ⟨BᵀB, A Aᵀ⟩, without forming the layer."""
    a, b = factors.a.double(), factors.b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())
