"""The JSON schema of experts.yaml for editors, made from the models that validate it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from composer.registry.families import Families
from composer.registry.specs import (
    AdaptersFrom,
    DeviceSpec,
    ExpertSpec,
    FileSpec,
    Id,
    KeySpec,
    PlacementSpec,
    PolicySpec,
    Text,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"

PLACEMENT = Field(
    None, description="Its place on a device that servers share; without, it is always there."
)


def registry_json_schema(families: Families) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the whole file, one branch per router, strategy and
    engine. Equal for equal families; a test keeps examples/experts.schema.json in step."""
    engines = {name: family.settings for name, family in families.engines.items()}
    policy = _extended(
        "Policy",
        PolicySpec,
        router=_tagged("name", "Router", {n: f.settings for n, f in families.routers.items()}),
        strategy=_tagged(
            "name", "Strategy", {n: f.settings for n, f in families.strategies.items()}
        ),
    )
    server = _tagged("engine", "Server", engines, placement=(PlacementSpec | None, PLACEMENT))
    file = _extended(
        "Experts",
        FileSpec,
        devices=dict[Id, DeviceSpec],
        servers=dict[Id, server],  # type: ignore[valid-type]
        experts=dict[Id, ExpertSpec],
        adapters_from=Text | list[Text | AdaptersFrom],
        policies=dict[Id, policy],  # type: ignore[valid-type]
        keys=dict[Id, KeySpec],
    )
    schema = file.model_json_schema()
    for keyed in (
        "devices",
        "servers",
        "experts",
        "policies",
        "keys",
    ):  # by id: another kind of key is a mistake
        schema["properties"][keyed]["additionalProperties"] = False
    return {"$schema": DIALECT, **schema}


def _tagged(tag: str, kind: str, models: Mapping[str, type[BaseModel]], /, **fields: Any) -> Any:
    """The union of the models, each with its registered name under the key `tag`, and with these
    fields besides."""
    branches: list[Any] = []
    for name, model in models.items():
        definitions: dict[str, Any] = {tag: (Literal[name], ...), **fields}
        branches.append(
            create_model(f"{kind}_{name}", __base__=model, __doc__=model.__doc__, **definitions)
        )
    if len(branches) == 1:
        return branches[0]
    return Annotated[reduce(or_, branches), Field(discriminator=tag)]


def _extended(name: str, base: type[BaseModel], /, **fields: Any) -> Any:
    """A subclass with these fields' annotations put in place of (or added to) the base's; a
    field of the base keeps its description and default."""
    definitions: dict[str, Any] = {
        field: (
            annotation,
            Field(known.get_default(call_default_factory=True), description=known.description)
            if (known := base.model_fields.get(field))
            else ...,
        )
        for field, annotation in fields.items()
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **definitions)
