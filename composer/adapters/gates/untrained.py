"""Gates that need no data: Arrow's, read off the adapters, and fixed weights. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from composer.adapters.factors import Lora
from composer.adapters.gates.arrow import prototype
from composer.adapters.gates.build import Kind, Members, assembled, joined, stacks
from composer.adapters.gates.files import Gate
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.merging.subtraction import less

ARROW, FIXED = "arrow", "fixed"


def arrow(
    members: Members,
    *,
    top_k: int | None = 3,
    temperature: float = 1.0,
    general: Lora | None = None,
) -> Gate:
    """Arrow (Ostapenko et al., arXiv 2405.11157): |x·p_i| / temperature, the `top_k` largest kept.
    `general` is subtracted from each member first, from its prototypes and from what it says.
    Raises ValueError."""
    if general is not None:
        members = {name: less(lora, general) for name, lora in members.items()}
    selection = Selection(temperature=temperature, top_k=top_k)
    kind = Kind(
        ARROW,
        "absolute",
        selection,
        paper="arXiv 2405.11157",
        settings={"general": None if general is None else general.digest},
    )
    rows = {
        module: torch.stack(
            [_prototype_of(lora, module, stacked.a.shape[1]) for lora in members.values()]
        )
        for module, stacked in stacks(members).items()
    }
    projections = {module: Projection.of(own, "absolute") for module, own in rows.items()}
    return assembled(members, projections, kind)


def arrow_joined(gate: Gate, name: str, lora: Lora, general: Lora | None = None) -> Gate:
    """One member more, without training. `general`: that of the gate, if it has one. Raises
    ValueError."""
    asked = gate.manifest.settings.get("general")
    if asked != (None if general is None else general.digest):
        raise ValueError(
            f"the gate's members had {asked or 'nothing'} subtracted; give the same general adapter"
        )
    own = lora if general is None else less(lora, general)
    rows = {module: prototype(factors) for module, factors in own.modules.items()}
    return joined(gate, name, own, rows)


def fixed(members: Members, weights: Sequence[float] | None = None) -> Gate:
    """The same weights for every token, made to add up to 1; uniform unless given. A softmax over
    logits log w that no input moves. Raises ValueError where a weight is not above 0: leave such
    members out."""
    given = [1.0] * len(members) if weights is None else list(weights)
    if len(given) != len(members) or not all(w > 0 for w in given):
        raise ValueError(
            f"{len(given)} weights for {len(members)} members; give each one above 0, and leave "
            "out who is to be silent"
        )
    bias = torch.tensor(given).log()
    projections = {
        module: Projection.of(torch.zeros(len(members), stacked.a.shape[1]), bias=bias)
        for module, stacked in stacks(members).items()
    }
    return assembled(
        members, projections, Kind(FIXED, "none", Selection(), paper="arXiv 2410.13025")
    )


def _prototype_of(lora: Lora, module: str, width: int) -> Tensor:
    factors = lora.modules.get(module)
    return torch.zeros(width) if factors is None else prototype(factors)
