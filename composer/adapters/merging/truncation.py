"""The best factors of a lower rank (Eckart and Young 1936), without ever forming the layer. Knows
no members."""

from __future__ import annotations

import torch
from torch import Tensor

from composer.adapters.factors import Factors, Modules


def spectrum(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), σ (k,) falling, Vᵀ (k, d_in) of ΔW in float64, k = min(rank, d_out, d_in):
    QR of both factors, then a singular value decomposition of a k × k matrix."""
    left, right = torch.linalg.qr(factors.b.double()), torch.linalg.qr(factors.a.double().T)
    u, sigma, vt = torch.linalg.svd(left.R @ right.R.T * factors.scale, full_matrices=False)
    return left.Q @ u, sigma, vt @ right.Q.T


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The factors of rank at most `rank` nearest to ΔW, and the share of its squared norm that they
    keep: 1 where nothing was cut."""
    if factors.rank <= rank:
        return factors, 1.0
    u, sigma, vt = spectrum(factors)
    energy = sigma.square()
    total = float(energy.sum())
    kept = float(energy[:rank].sum()) / total if total > 0 else 1.0
    root = sigma[:rank].sqrt()
    dtype = torch.promote_types(factors.a.dtype, factors.b.dtype)
    b, a = (u[:, :rank] * root).to(dtype), (root[:, None] * vt[:rank]).to(dtype)
    return Factors(a.contiguous(), b.contiguous()), kept


def fitted(modules: Modules, rank: int) -> tuple[Modules, float]:
    """Every module at rank at most `rank`, and the smallest share of squared norm kept by one."""
    cut = {module: truncated(factors, rank) for module, factors in modules.items()}
    return {m: factors for m, (factors, _) in cut.items()}, min(kept for _, kept in cut.values())
