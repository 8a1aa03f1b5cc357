"""NAME=VALUE, as command lines have settings. Knows no command and no setting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def assigned(words: Iterable[str]) -> dict[str, Any]:
    """Values as JSON has them, or else as they stand; of a name given twice, the last. Raises
    ValueError ("what is wrong; the remedy") for a word without a name or an equals sign."""
    out: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not name or not sign:
            raise ValueError(f"{word!r} is not NAME=VALUE; write it so")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out
