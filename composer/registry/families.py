"""What experts.yaml may name (routers, strategies, engines), handed in with their settings models.

The registry knows them by name and settings alone, so it imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from composer.adapters.lora_config import AdapterFeature
from composer.types import Ability, Expert, Placement, Policy

SERVER_KEYS = ("engine", "placement")
"""Keys of a server that are the registry's own; all others are its engine's settings."""


def check_nothing(settings: Any) -> None:
    """The `check_adapters` of an engine that takes adapters, whatever its settings."""


def fits_anywhere(settings: Any, placement: Placement | None) -> None:
    """The `check` of an engine that has nothing to say about placements."""


@dataclass(frozen=True, slots=True)
class EngineFamily:
    """An engine as the registry sees it.

    `honours` are the abilities it can give an expert, `adapter_features` what it can do beyond
    plain LoRA. `model_field` is the setting that names the weights (a folder or a hub name) and
    `revision` its hub revision, so that adapters can be checked against them; None, or a server
    that leaves it empty: somebody else's weights, adapters are checked by themselves alone. A
    setting `model_name` adds a name the base goes by, `max_lora_rank` bounds its adapters,
    `api_key_env` names the environment variable that holds a key.

    `path_fields` are further settings that hold a path or a list of them, dotted where they lie
    deeper: relative ones start at the registry file's folder. So do those of `program_fields`
    that have a slash; a bare name there is a program for the system to find. `parameters` are the
    wire fields beyond OpenAI's core that its experts understand. `check` raises ValueError ("what
    is wrong; the remedy") for settings that do not fit a placement, `check_adapters` for a server
    that takes no adapters ("is …; the remedy", to stand behind the server's name).
    """

    settings: type[BaseModel]
    honours: frozenset[Ability] = frozenset()
    adapter_features: frozenset[AdapterFeature] = frozenset()
    model_field: str | None = "model"
    path_fields: tuple[str, ...] = ()
    program_fields: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()
    check: Callable[[Any, Placement | None], None] = fits_anywhere
    check_adapters: Callable[[Any], None] = check_nothing


def no_files(settings: Any) -> str:
    """The `digest` of a router or strategy whose settings name no files."""
    return ""


def fits_any_policy(policy: Policy, experts: Sequence[Expert]) -> None:
    """The `check` of a router or strategy that has nothing to say about its policy."""


def asks_nobody(settings: Any) -> None:
    """The `asks` of a router that needs no LLM, the `weighs` of a strategy that needs no gate."""


@dataclass(frozen=True, slots=True)
class ComponentFamily:
    """A part that policies are made of and that has settings of its own: a router, a
    strategy. It is all that the registry knows of the class behind a name.

    `path_fields` are settings that hold a path, dotted where they lie deeper: relative ones start
    at the registry file's folder, and what lies there is watched. `digest` stands for the content
    of those files, and is "" where they cannot be read. `check` raises ValueError ("what is wrong;
    the remedy") where the part does not fit the policy it stands in. The experts are given in any
    order, and may be fewer than the policy's.
    """

    settings: type[BaseModel]
    path_fields: tuple[str, ...] = ()
    digest: Callable[[Any], str] = no_files
    check: Callable[[Policy, Sequence[Expert]], None] = fits_any_policy


@dataclass(frozen=True, slots=True)
class RouterFamily(ComponentFamily):
    """`needs_texts`: it finds experts by what is said about them, so each must say something.
    `asks` says which expert's LLM it asks about each query, None for no one's."""

    needs_texts: bool = True
    asks: Callable[[Any], str | None] = asks_nobody


@dataclass(frozen=True, slots=True)
class StrategyFamily(ComponentFamily):
    """`weighs` says which expert's gate weighs the policy's experts, None for no one's."""

    weighs: Callable[[Any], str | None] = asks_nobody


@dataclass(frozen=True, slots=True)
class Families:
    """Settings models by registered name. Raises ValueError for one that would ignore unknown
    keys, since a misspelt setting would then silently have no effect, and for an engine's that
    has a key of the registry's own."""

    routers: Mapping[str, RouterFamily]
    strategies: Mapping[str, StrategyFamily]
    engines: Mapping[str, EngineFamily] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models = {
            **{f"router {name}": family.settings for name, family in self.routers.items()},
            **{f"strategy {name}": family.settings for name, family in self.strategies.items()},
            **{f"engine {name}": family.settings for name, family in self.engines.items()},
        }
        for name, model in models.items():
            if model.model_config.get("extra") != "forbid":
                raise ValueError(
                    f"the settings of {name} accept unknown keys; set extra='forbid' in "
                    f"{model.__name__}.model_config"
                )
        for name, family in self.engines.items():
            if taken := [key for key in SERVER_KEYS if key in family.settings.model_fields]:
                raise ValueError(
                    f"the settings of engine {name} have {taken[0]!r}, a key that is the "
                    "registry's own; rename it"
                )
