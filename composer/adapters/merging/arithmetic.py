"""Task arithmetic on parameters: linear, and the ways to thin out what interferes. One family,
whose members are named settings; peft's own functions do the arithmetic where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from peft.utils.merge_utils import (
    dare_linear,
    dare_ties,
    magnitude_prune,
    task_arithmetic,
    ties,
)
from pydantic import Field, model_validator
from torch import Tensor

from composer.adapters.factors import Factors, Modules
from composer.adapters.merging.base import Merged, MergeSettings, Weights, aligned
from composer.adapters.merging.truncation import truncated
from composer.types import Tier

Kind = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "breadcrumbs"]


class ArithmeticSettings(MergeSettings):
    """`of`: what the arithmetic is done on. "factors" is peft's way: A and B apart, each with the
    root of the weight, which brings in the cross terms B_i A_j of any two members and needs equal
    ranks. "product": ΔW itself, then cut to `rank`; it forms whole layers, one at a time."""

    kind: Kind = "linear"
    of: Literal["factors", "product"] = "factors"
    density: float = Field(0.5, gt=0, le=1, description="Share of numbers kept; all but linear.")
    sign: Literal["total", "frequency"] = Field("total", description="Of ties: whose sign wins.")
    outliers: float = Field(
        0.01, ge=0, lt=1, description="Share of the largest numbers dropped; breadcrumbs only."
    )
    rank: int | None = Field(None, ge=1, description="With `of: product`; default: the largest.")
    seed: int = Field(0, description="Of dare's random dropping.")

    @model_validator(mode="after")
    def _sound(self) -> ArithmeticSettings:
        if self.rank is not None and self.of == "factors":
            raise ValueError("`rank` goes with `of: product`; factors keep the members' rank")
        if self.kind == "breadcrumbs" and self.density + self.outliers > 1:
            raise ValueError("`density` and `outliers` add up to more than 1; lower one of them")
        return self


def _breadcrumbs(tensors: list[Tensor], weights: Tensor, chosen: ArithmeticSettings) -> Tensor:
    """Model Breadcrumbs, section 3: of each member the largest numbers are dropped as outliers, and
    the smallest as noise, so that a share `density` is left between."""
    kept = []
    for tensor in tensors:
        size = tensor.abs().flatten()
        order = size.argsort(descending=True)
        top = round(chosen.outliers * len(size))
        mask = torch.zeros_like(size, dtype=torch.bool)
        mask[order[top : top + max(1, round(chosen.density * len(size)))]] = True
        kept.append(torch.where(mask.reshape(tensor.shape), tensor, torch.zeros_like(tensor)))
    return task_arithmetic(kept, weights)


_KINDS: Mapping[Kind, Callable[[list[Tensor], Tensor, ArithmeticSettings], Any]] = {
    "linear": lambda t, w, c: task_arithmetic(t, w),
    "ties": lambda t, w, c: ties(t, w, c.density, c.sign),
    "dare_linear": lambda t, w, c: dare_linear(t, w, c.density),
    "dare_ties": lambda t, w, c: dare_ties(t, w, c.density, c.sign),
    "magnitude_prune": lambda t, w, c: magnitude_prune(t, w, c.density),
    "breadcrumbs": _breadcrumbs,
}


class Arithmetic:
    name: ClassVar[str] = "arithmetic"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Task Arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099; "
        "Model Breadcrumbs, arXiv 2312.06795; on factors as peft's add_weighted_adapter does it"
    )
    settings: ClassVar[type[MergeSettings]] = ArithmeticSettings
    whole: ClassVar[bool] = False

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: ArithmeticSettings) -> Merged:
        out, energy = {}, 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for module, present in aligned(members, weights).items():
                if settings.of == "factors":
                    out[module] = _factors(module, present, settings)
                else:
                    out[module], kept = _product(present, settings)
                    energy = min(energy, kept)
        report = {} if settings.of == "factors" else {"energy": energy}
        return Merged(out, report, energy)


def _factors(
    module: str, present: Sequence[tuple[float, Factors]], settings: ArithmeticSettings
) -> Factors:
    ranks = sorted({factors.rank for _, factors in present})
    if len(ranks) > 1:
        raise ValueError(
            f"{module} has the ranks {', '.join(map(str, ranks))}, and factors of different ranks "
            "cannot be added; set `of: product`, or merge by cat or svd"
        )
    whole = [weight * factors.scale for weight, factors in present]
    root = torch.tensor([math.sqrt(abs(w)) for w in whole])
    sign = torch.tensor([1.0 if w >= 0 else -1.0 for w in whole])
    dtype = present[0][1].a.dtype
    combine = _KINDS[settings.kind]
    a = combine([factors.a.float() for _, factors in present], root * sign, settings)
    b = combine([factors.b.float() for _, factors in present], root, settings)
    return Factors(a.to(dtype), b.to(dtype))


def _product(
    present: Sequence[tuple[float, Factors]], settings: ArithmeticSettings
) -> tuple[Factors, float]:
    weights = torch.tensor([weight for weight, _ in present])
    rank = settings.rank or max(factors.rank for _, factors in present)
    dtype = present[0][1].a.dtype
    whole = _KINDS[settings.kind]([f.delta() for _, f in present], weights, settings)
    small = min(whole.shape)
    eye = torch.eye(small)
    exact = Factors(eye, whole) if whole.shape[1] == small else Factors(whole, eye)
    cut, kept = truncated(exact, rank)
    return Factors(cut.a.to(dtype), cut.b.to(dtype)), kept
