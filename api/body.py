"""How bodies of requests are read, whatever is in them."""

from __future__ import annotations

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """JSON as sent: no text is read as a number, no number as text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def off(*values: Any) -> AfterValidator:
    """Only `null` and these values pass: they ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(v) and value == v for v in values):
            return value
        raise PydanticCustomError(
            "unsupported", "this cannot be honoured here and would change the answer; leave it out"
        )

    return AfterValidator(check)
