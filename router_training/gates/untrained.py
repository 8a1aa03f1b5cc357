"""Arrow and fixed weights as kinds: nothing is trained. Knows no model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from composer.adapters.gates.files import Gate
from composer.adapters.gates.untrained import ARROW, FIXED, arrow, arrow_joined, fixed
from composer.types import Tier
from router_training.errors import TrainingError
from router_training.gates.base import Bench, GateSettings


class ArrowSettings(GateSettings):
    top_k: int | None = Field(3, ge=1)
    temperature: float = Field(1.0, gt=0)


class Arrow:
    """The input's direction that an adapter moves most is its row. With `general`, after exact
    subtraction of general knowledge (GenKnowSub, ACL 2025, short papers, 54)."""

    name: ClassVar[str] = ARROW
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "arXiv 2405.11157"
    settings: ClassVar[type[GateSettings]] = ArrowSettings
    trained: ClassVar[bool] = False

    @staticmethod
    def make(bench: Bench, settings: ArrowSettings) -> Gate:
        how = {"top_k": settings.top_k, "temperature": settings.temperature}
        return arrow(bench.members, general=bench.general, **how)  # type: ignore[arg-type]

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        return arrow_joined(gate, name, bench.members[name], bench.general)


class FixedSettings(GateSettings):
    weights: tuple[float, ...] | None = None


class Fixed:
    """The same weights for every token: cat (LoRA Soups) as a gate."""

    name: ClassVar[str] = FIXED
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "arXiv 2410.13025"
    settings: ClassVar[type[GateSettings]] = FixedSettings
    trained: ClassVar[bool] = False

    @staticmethod
    def make(bench: Bench, settings: FixedSettings) -> Gate:
        return fixed(bench.members, settings.weights)

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        raise TrainingError(
            "fixed weights are of their members alone; make the gate again, with a weight for each"
        )
