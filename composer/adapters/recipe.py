"""A composition as it is written (experts.yaml, a file of its own) and as it is made: members,
weights, method. Reads no adapter, and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from composer.errors import AdapterError, CatalogError, Problem
from composer.source import parse_yaml
from composer.types import empty

Text = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _kind(members: Any) -> str:
    return "weighed" if isinstance(members, dict) else "alike"


Members = Annotated[
    Annotated[dict[Text, Weight], Field(min_length=1), Tag("weighed")]
    | Annotated[tuple[Text, ...], Field(min_length=1), Tag("alike")],
    Discriminator(_kind),
]


class RecipeSpec(BaseModel):
    """Adapters of one base that become one adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    members: Members = Field(
        description="Ids of experts with adapters, or folders of adapters such as ./adapters/fox: "
        "each with its weight, or as a list, which weighs all alike.",
    )
    subtract: Text | None = Field(
        None,
        description="An expert or folder, trained on text of every kind: what every member is rid "
        "of first, exactly (ΔW − ΔW_g, at the sum of the ranks).",
    )
    method: Text = Field("cat", description="cat, svd, arithmetic, lego or twin (README.md).")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The method's own, such as {rank: 16} of svd."
    )
    modules: dict[Text, tuple[Weight, ...]] = Field(
        default_factory=dict,
        description="Weights of single modules in place of the members', one for each member.",
    )
    max_rank: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="Most rank of the composed adapter; what has more is truncated. The server's "
        "max_lora_rank limits it in any case.",
    )

    @model_validator(mode="after")
    def _one_each(self) -> RecipeSpec:
        if len(set(self.members)) != len(self.members):
            raise ValueError("a member is named twice; name it once, with the sum of its weights")
        for module, own in self.modules.items():
            if len(own) != len(self.members):
                raise ValueError(
                    f"`modules` has {len(own)} weights for {module} and {len(self.members)} "
                    "members; give one for each"
                )
        return self

    @property
    def weights(self) -> Mapping[str, float]:
        """Member → weight, in the order written."""
        if isinstance(self.members, dict):
            return self.members
        return dict.fromkeys(self.members, 1 / len(self.members))


@dataclass(frozen=True, slots=True)
class Member:
    """`weight` counts but where `Recipe.modules` has a module's own. `digest` None: whatever the
    folder holds."""

    name: str
    folder: Path
    weight: float = 1.0
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """`modules`: module → (M,) weights of its own. `subtract`, whose weight says nothing, is taken
    out of every member first. `max_rank`: the server's `max_lora_rank`; what
    has more is truncated. `settings` are the method's."""

    members: tuple[Member, ...]
    method: str = "cat"
    settings: Mapping[str, Any] = field(default_factory=empty)
    modules: Mapping[str, tuple[float, ...]] = field(default_factory=empty)
    max_rank: int | None = None
    subtract: Member | None = None


_FORM = (
    "Write `members:` with folders and their weights, as README.md shows; a recipe has: "
    f"{', '.join(RecipeSpec.model_fields)}."
)


def read_recipe(file: Path) -> Recipe:
    """A recipe whose members are folders, relative to the file's own. Raises AdapterError."""

    try:
        document = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except CatalogError as error:
        raise AdapterError(error.problems) from error
    except (OSError, UnicodeError) as error:
        message, remedy = f"it cannot be read: {error}", "Name a recipe's file."
        raise AdapterError([Problem(str(file), "", message, remedy)]) from error
    if not isinstance(document.data, dict):
        what = "there is nothing" if document.data is None else "there are no keys with values"
        raise AdapterError([document.problem((), f"{what} in it", _FORM)])
    try:
        spec = RecipeSpec.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        path = [step for step in first["loc"] if step not in ("weighed", "alike")]
        message = first["msg"].removeprefix("Value error, ")
        raise AdapterError([document.problem(path, message, _FORM)]) from error
    subtract = spec.subtract
    return Recipe(
        tuple(Member(name, file.parent / name, weight) for name, weight in spec.weights.items()),
        spec.method,
        spec.settings,
        spec.modules,
        spec.max_rank,
        None if subtract is None else Member(subtract, file.parent / subtract),
    )
