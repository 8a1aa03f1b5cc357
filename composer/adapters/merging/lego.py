"""Adapters taken apart into their rank units and put together from clusters of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor

from composer.adapters.factors import Factors, Modules
from composer.adapters.merging.base import Merged, MergeSettings, Weights, aligned
from composer.types import Tier


class LegoSettings(MergeSettings):
    rank: int = Field(16, ge=1, description="Number of clusters, the merged adapter's rank.")
    seed: int = Field(0, description="Of k-means' start.")


class Lego:
    """LoRA-LEGO. A unit is one row of A and one column of B; a layer's units, of all members, are
    clustered by k-means, and the centroids are the merged adapter's units.

    Rescaled twice: a centroid to its units' mean norm, since averages are shorter than what they
    are made of; and the layer's output by √(r / rank), r the members' mean rank, since more units
    add up to more. Scale and weight of a member are shared evenly by its row and its column.
    """

    name: ClassVar[str] = "lego"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "LoRA-LEGO, arXiv 2409.16167"
    settings: ClassVar[type[MergeSettings]] = LegoSettings
    whole: ClassVar[bool] = False

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: LegoSettings) -> Merged:
        return Merged(
            {m: _layer(present, settings) for m, present in aligned(members, weights).items()}
        )


def _layer(present: Sequence[tuple[float, Factors]], settings: LegoSettings) -> Factors:
    units = torch.cat([_units(factors.times(weight)) for weight, factors in present])
    width = present[0][1].shape[1]
    count = min(settings.rank, len(units))
    fitted = KMeans(count, n_init=4, random_state=settings.seed).fit(units.double().numpy())
    cluster = torch.from_numpy(fitted.labels_).long()
    size = torch.bincount(cluster, minlength=count).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        total = torch.zeros(count, *values.shape[1:], dtype=values.dtype)
        return total.index_add_(0, cluster, values) / size.reshape(-1, *[1] * (values.ndim - 1))

    centre = mean(units)
    norm = centre.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    centre = centre * (mean(units.norm(dim=1)) / norm)[:, None]
    rank = sum(factors.rank for _, factors in present) / len(present)
    dtype = present[0][1].a.dtype
    a, b = centre[:, :width].contiguous(), centre[:, width:].T.contiguous()
    return Factors(a.to(dtype), b.to(dtype), math.sqrt(rank / count))


def _units(factors: Factors) -> Tensor:
    """(r, d_in + d_out), with the scale shared by both sides, its sign on B's."""
    root = math.sqrt(abs(factors.scale))
    sign = math.copysign(1.0, factors.scale)
    return torch.cat([factors.a.float() * root, factors.b.float().T * (root * sign)], dim=1)
