"""Concatenation: the exact weighted sum of what the members do, at the sum of their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from composer.adapters.factors import Factors, Modules
from composer.adapters.merging.base import Merged, MergeSettings, Weights, aligned
from composer.types import Tier


class CatSettings(MergeSettings):
    """There is nothing to set."""


class Cat:
    """A = [A_1; …; A_M], B = [w_1 s_1 B_1, …, w_M s_M B_M], so that B A = Σ w_i s_i B_i A_i. A
    negative weight subtracts the product itself, which is not peft's difference of the factors
    (General Knowledge Subtraction, arXiv 2505.10939, section 3.2, subtracts A and B apart)."""

    name: ClassVar[str] = "cat"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "LoRA Soups, arXiv 2410.13025, section 3"
    settings: ClassVar[type[MergeSettings]] = CatSettings
    whole: ClassVar[bool] = False

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: CatSettings) -> Merged:
        stacked = {
            module: stack([factors.times(weight) for weight, factors in present])
            for module, present in aligned(members, weights).items()
        }
        return Merged(stacked)


def stack(parts: Sequence[Factors]) -> Factors:
    """Factors of the sum of the parts' ΔW, exact up to rounding; scales are folded into b."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].a.dtype
    for part in parts:
        for tensor in (part.a, part.b):
            dtype = torch.promote_types(dtype, tensor.dtype)
    a = torch.cat([part.a.to(dtype) for part in parts])
    b = torch.empty(parts[0].b.shape[0], len(a), dtype=dtype)
    start = 0
    for part in parts:  # rounded once: torch multiplies halves by a number in float32
        torch.mul(part.b.to(dtype), part.scale, out=b[:, start : start + part.rank])
        start += part.rank
    return Factors(a, b)
