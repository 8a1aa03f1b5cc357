"""What callers may ask of this service itself, beside OpenAI's fields."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.body import Body

MAX_WAIT_S = 86_400


class ComposerField(Body):
    """The `composer` field of a request."""

    exclude: list[str] = Field([], description="Experts that must not answer this request.")
    priority: Literal["interactive", "batch"] = Field(
        "interactive", description="A batch request gives way to all others, and waits for them."
    )
    max_wait_s: float | None = Field(
        None,
        gt=0,
        le=MAX_WAIT_S,
        allow_inf_nan=False,
        description="Most seconds that each of its calls may wait for its expert before the "
        "request is refused (503). It can only shorten what the policy allows.",
    )
    quality: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Share of the best single expert's mean quality to be reached at least cost: "
        "1 is as good as that expert, and the highest is what the router's curve reaches (1, or "
        "more where routing beats that expert); needs a policy with a trained router, and takes "
        "the place of what it aims at.",
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="US dollars that such requests may cost on average, all calls of each "
        "together, for the best quality.",
    )
    session: str | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="Your name for this conversation, which then rather keeps its expert; default: "
        "the header x-composer-session, or how the conversation began.",
    )
    explore: bool = Field(True, description="Whether an expert may be tried out on this request.")
    gates: bool | Literal["all", "layers"] | None = Field(
        None,
        description="Whether to tell which adapters of a gated expert spoke at which token, in "
        "`composer.gates` of the answer: true or `all` on average over all layers, `layers` by "
        "ranges of them, attention and the rest apart.",
    )

    @model_validator(mode="after")
    def _one_aim(self) -> ComposerField:
        if self.quality is not None and self.max_cost is not None:
            raise PydanticCustomError(
                "two_aims", "it has both quality and max_cost; leave one of them out"
            )
        return self
