"""General knowledge taken out of an adapter: an exact difference of two. Knows no merging."""

from __future__ import annotations

import torch

from composer.adapters.factors import Factors, Lora, Modules


def subtracted(modules: Modules, general: Modules) -> Modules:
    """ΔW − ΔW_g of every module, exactly: by concatenation, at rank r + r_g (GenKnowSub,
    ACL 2025, short papers, 54). peft's `use_gks` subtracts A and B apart, which is another
    matrix: (B − B_g)(A − A_g). A module that only `general` has is left alone: there the adapter
    says nothing that could be general. Raises ValueError where the layers' sizes differ."""
    out = {}
    for module, own in modules.items():
        other = general.get(module)
        if other is None:
            out[module] = own
            continue
        if other.shape != own.shape:
            raise ValueError(
                f"{module} is {own.shape} in one adapter and {other.shape} in the general one; "
                "subtract an adapter of the same base model"
            )
        a = torch.cat([own.a.float(), other.a.float()])
        b = torch.cat([own.b.float() * own.scale, other.b.float() * -other.scale], dim=1)
        out[module] = Factors(a, b)
    return out


def less(lora: Lora, general: Lora) -> Lora:
    """The adapter without what is general; it keeps its digest."""
    return Lora(subtracted(lora.modules, general.modules), lora.base, lora.digest)
