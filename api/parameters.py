"""Wire fields beyond OpenAI's core, or beyond what every engine can honour: what each may hold.

Shapes and bounds alone: a policy says which of them its requests may carry, an expert's engine
which of them it understands. None of them has a default: left out, the engine's own holds.
What asks for more than an answer of ours can carry (`return_token_ids`) is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_PROMPT_LOGPROBS = 20
MAX_IDS = 1024
"""Items of one list, and entries of `logit_bias`."""

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Parameters(BaseModel):
    """Of chat and plain completions alike."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_IDS)] | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Text], Field(max_length=MAX_IDS)] | None = None
    repetition_detection: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_interval: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None

    def asked(self) -> dict[str, Any]:
        """Those that ask for something, by name."""
        return {
            name: value
            for name in FIELDS | CHAT_FIELDS
            if (value := getattr(self, name, None)) is not None and not _off(name, value)
        }


class ChatParameters(Parameters):
    """Of chat completions."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    verbosity: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, str]], Field(max_length=MAX_IDS)] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


FIELDS = frozenset(Parameters.model_fields)
CHAT_FIELDS = frozenset(ChatParameters.model_fields)

OFF: Mapping[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
"""Values that ask for nothing: OpenAI's defaults, which clients like to send. Other fields have
none, since a model's own defaults (its generation_config.json) may differ from what is sent."""


def _off(name: str, value: Any) -> bool:
    return name in OFF and bool(value == OFF[name])
