"""The JSON schema for editors comes from the same models that validate, branch by branch."""

from __future__ import annotations

from typing import Any

from composer.registry import Families, registry_json_schema
from composer.registry.specs import ExpertSpec, PolicySpec
from tests.registry.world import FAMILIES


def resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def of_each(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema of every value of a top-level mapping by id."""
    mapping = schema["properties"][key]
    assert mapping["additionalProperties"] is False
    (node,) = mapping["patternProperties"].values()
    return resolved(schema, node)


def branches(schema: dict[str, Any], node: dict[str, Any], tag: str) -> dict[str, dict[str, Any]]:
    """The branches of a discriminated union by the value of their tag."""
    found = [resolved(schema, branch) for branch in node["oneOf"]]
    return {branch["properties"][tag]["const"]: branch for branch in found}


def test_each_engine_has_a_branch_with_its_settings() -> None:
    schema = registry_json_schema(FAMILIES)
    servers = branches(schema, of_each(schema, "servers"), "engine")
    assert servers.keys() == {"embedded", "remote"}
    assert servers["embedded"]["properties"].keys() >= {"engine", "model", "queue"}
    assert set(servers["embedded"]["required"]) == {"engine", "model"}
    assert servers["remote"]["properties"].keys() == {"engine", "url", "launch", "placement"}
    assert all(branch["additionalProperties"] is False for branch in servers.values())


def test_policies_choose_among_routers_and_strategies() -> None:
    schema = registry_json_schema(FAMILIES)
    policy = of_each(schema, "policies")
    assert policy["properties"].keys() == {*PolicySpec.model_fields, "router", "strategy"}
    assert set(policy["required"]) == {"router", "strategy"}
    routers = branches(schema, policy["properties"]["router"], "name")
    assert routers.keys() == FAMILIES.routers.keys()
    assert routers["neighbours"]["properties"]["pooling"]["enum"] == ["max", "mean"]
    assert branches(schema, policy["properties"]["strategy"], "name").keys() == {"single", "vote"}


def test_experts_have_the_fields_that_are_validated() -> None:
    schema = registry_json_schema(FAMILIES)
    expert = of_each(schema, "experts")
    assert expert["properties"].keys() == ExpertSpec.model_fields.keys()
    assert all("description" in field for field in expert["properties"].values())


def test_a_family_of_one_needs_no_choice() -> None:
    one = Families(
        {"neighbours": FAMILIES.routers["neighbours"]},
        {"single": FAMILIES.strategies["single"]},
        {"remote": FAMILIES.engines["remote"]},
    )
    schema = registry_json_schema(one)
    server = of_each(schema, "servers")
    assert server["properties"]["engine"]["const"] == "remote"


def test_the_schema_is_the_same_each_time() -> None:
    assert registry_json_schema(FAMILIES) == registry_json_schema(FAMILIES)
