"""The words every room shares. Knows nothing of HTTP, YAML, models or databases.

Two groups: what is served (`catalog`) and what is asked and answered (`request`, `answer`). All are
frozen: a request sees one catalog for its whole life.
"""

from composer.types.answer import (
    Ask,
    Call,
    Choice,
    Chunk,
    FinishReason,
    Forward,
    Plan,
    Timings,
    TokenLogprob,
)
from composer.types.catalog import (
    SAFE_PARAMETERS,
    Adapter,
    ApiKey,
    Catalog,
    Component,
    Composed,
    Cost,
    Device,
    Expert,
    MemberShare,
    Placement,
    Policy,
    SamplingDefaults,
    Server,
    Unsure,
)
from composer.types.request import (
    Message,
    Request,
    Sampling,
    last_user_text,
    message_text,
    user_texts,
)
from composer.types.values import Ability, BoolArray, FloatArray, Priority, Tier, Usage, empty

__all__ = [
    "SAFE_PARAMETERS",
    "Ability",
    "Adapter",
    "ApiKey",
    "Ask",
    "BoolArray",
    "Call",
    "Catalog",
    "Choice",
    "Chunk",
    "Component",
    "Composed",
    "Cost",
    "Device",
    "Expert",
    "FinishReason",
    "FloatArray",
    "Forward",
    "MemberShare",
    "Message",
    "Placement",
    "Plan",
    "Policy",
    "Priority",
    "Request",
    "Sampling",
    "SamplingDefaults",
    "Server",
    "Tier",
    "Timings",
    "TokenLogprob",
    "Unsure",
    "Usage",
    "empty",
    "last_user_text",
    "message_text",
    "user_texts",
]
