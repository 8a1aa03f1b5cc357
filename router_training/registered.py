"""What an experts.yaml says of its experts, for work offline. Starts nothing."""

from __future__ import annotations

from pathlib import Path

from composer.routing.learned import claims_of
from composer.types import Expert
from router_training.errors import TrainingError


def experts_in(registry: Path) -> dict[str, Expert]:
    """By id. Those that were added at run time are not there. Raises CatalogError."""
    from composer.build import load
    from router_training.environment import process_settings

    settings = process_settings().model_copy(update={"experts": registry})
    return dict(load(settings).catalog.experts)


def claims_in(registry: Path, expert: str) -> tuple[str, ...]:
    """The texts by which an expert joins. Raises TrainingError where it is not there or says
    nothing, CatalogError."""
    found = experts_in(registry).get(expert)
    if found is None:
        raise TrainingError(f"{registry} has no expert {expert!r}; correct the name, or leave it")
    claims = claims_of(found)
    if not claims:
        raise TrainingError(
            f"{registry} says nothing of {expert!r}; add `examples` or a `description` there"
        )
    return claims
