"""One adapter is composed of the chosen experts' adapters for this query, and answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from composer.types import Ask, Chunk, Mix, Plan, Request, Tier


class ComposeSettings(BaseModel):
    """The policy's `k` is how many adapters are composed at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        8,
        ge=1,
        le=64,
        description="Weights are rounded to whole numbers of 1 / `steps`: with fewer, more queries "
        "share an adapter. An expert whose weight is rounded to 1 answers alone.",
    )
    sharpness: float = Field(
        1.0,
        gt=0,
        le=64,
        allow_inf_nan=False,
        description="Power that the plan's weights (the router's qualities, as shares) are raised "
        "to: above 1, the best expert has more of the adapter.",
    )
    gate: str | None = Field(
        None,
        min_length=1,
        description="An expert with a `gate`, on an engine that mixes adapters in the model: its "
        "weights, averaged over the prompt's tokens, in place of the router's, which then only "
        "says whom they are of. Takes one more reading of the prompt.",
    )
    by_module: bool = Field(
        True,
        description="Each module has the gate's own weights there; false: all have their mean, so "
        "that more queries share an adapter.",
    )
    method: str = Field(
        "cat",
        min_length=1,
        description="How they become one, as in a `composition`: cat, svd, arithmetic, lego or "
        "twin, whose shared part is of all the policy's experts and whose weights are those of "
        "their own parts.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The method's own, such as {rank: 16} of svd."
    )

    @model_validator(mode="after")
    def _one_source(self) -> ComposeSettings:
        if self.gate is not None and self.sharpness != 1:
            raise ValueError(
                "`sharpness` is for the router's weights, and the gate's take their place; keep "
                "one of `gate` and `sharpness`"
            )
        return self


class Compose:
    """Weights of the query, not of the token: the adapters' exact sum (cat), which any engine
    serves, stock vLLM too. They are the plan's or, where a forward pass of the base is at hand,
    those of a gate averaged over the prompt.
    """

    name: ClassVar[str] = "compose"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "LoraRetriever, arXiv 2402.09997, section 3.3 (mixture of retrieved adapters); weights by "
        "query as in Twin-Merging, arXiv 2406.15479, section 3.3"
    )
    settings: ClassVar[type[BaseModel]] = ComposeSettings
    path_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def weighs(cls, settings: ComposeSettings) -> str | None:
        return settings.gate

    @classmethod
    def check_experts(cls, settings: ComposeSettings, experts: Sequence[str], k: int) -> None:
        if k < 2:
            raise ValueError(
                "it composes the chosen experts' adapters, and `k` is 1; set the policy's `k` to "
                "2 or more"
            )
        _whole(settings)

    def __init__(self, settings: ComposeSettings) -> None:
        self._settings = settings
        self._whole = _whole(settings)

    def check(self, request: Request) -> None:
        """Refuses nothing: what an expert cannot do is the filter's and the engine's to say."""

    def calls(self, experts: int) -> tuple[int, int]:
        return 1, 1

    async def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
        power = self._settings.sharpness
        most = max(choice.weight for choice in plan.choices)
        shares = tuple(
            (choice.expert, (choice.weight / most) ** power if most > 0 else 1.0)
            for choice in plan.choices
        )
        mix = Mix(
            shares,
            self._settings.steps,
            gate=self._settings.gate,
            by_module=self._settings.by_module,
            method=self._settings.method,
            settings=self._settings.settings,
            whole=self._whole,
        )
        async with aclosing(ask(mix, verbatim=True)) as chunks:
            async for chunk in chunks:
                yield chunk


def _whole(settings: ComposeSettings) -> bool:
    """Whether members of weight 0 count too. Raises ValueError for a method that there is not, or
    settings that it does not have."""
    if settings.method == "cat" and not settings.settings:
        return False
    # Seconds of imports (torch, peft), for whoever composes otherwise.
    from composer.adapters.merging import method_named, settings_of

    method = method_named(settings.method)
    settings_of(method, settings.settings)
    return method.whole
