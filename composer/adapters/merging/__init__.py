"""Every way of merging adapters by its name, and its settings as they are written. Knows nothing
else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from composer.adapters.merging.arithmetic import Arithmetic
from composer.adapters.merging.base import MergeSettings, Method
from composer.adapters.merging.cat import Cat
from composer.adapters.merging.lego import Lego
from composer.adapters.merging.svd import Svd
from composer.adapters.merging.twin import Twin

METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Cat, Svd, Arithmetic, Lego, Twin)
}


def method_named(name: str) -> type[Method]:
    """Raises ValueError where there is none."""
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; one of {', '.join(METHODS)}")
    return METHODS[name]


def settings_of(method: type[Method], written: Mapping[str, Any]) -> MergeSettings:
    """Raises ValueError for those that it does not have, or not so."""
    try:
        return method.settings.model_validate(written)
    except ValidationError as error:
        wrong = ", ".join(
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()
        )
        known = ", ".join(method.settings.model_fields) or "none"
        raise ValueError(f"{wrong}; {method.name} has: {known}") from error
