"""The strategy `compose`: what it asks for, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from composer.strategies.compose import Compose, ComposeSettings
from composer.types import Choice, Chunk, Mix, Plan, Request


async def asked_for(*weights: float, **settings: Any) -> Mix:
    asked = []

    async def ask(expert: str | Mix, **more: Any) -> AsyncGenerator[Chunk, None]:
        asked.append(expert)
        assert more == {"verbatim": True}
        yield Chunk("so", expert="mixed")

    choices = tuple(Choice(f"e{i}", weight) for i, weight in enumerate(weights))
    plan = Plan("p", "compose", choices, tuple(choice.expert for choice in choices))
    strategy = Compose(ComposeSettings(**settings))
    request = Request(id="r", model="auto", prompt="?")
    async with aclosing(strategy.run(request, plan, ask)) as chunks:
        assert [chunk async for chunk in chunks] == [Chunk("so", expert="mixed")]
    [mix] = asked
    assert isinstance(mix, Mix)
    return mix


async def test_the_plans_weights_are_the_mixs() -> None:
    mix = await asked_for(0.5, 0.3, 0.2, steps=4)
    assert mix.steps == 4
    assert [expert for expert, _ in mix.shares] == ["e0", "e1", "e2"]
    assert [weight for _, weight in mix.shares] == pytest.approx([1.0, 0.6, 0.4])


async def test_sharpness_gives_the_best_more() -> None:
    mix = await asked_for(0.5, 0.25, sharpness=3)
    assert [weight for _, weight in mix.shares] == pytest.approx([1.0, 0.125])
    flat = await asked_for(0.0, 0.0)
    assert [weight for _, weight in flat.shares] == [1.0, 1.0]


def test_a_policy_of_one_expert_composes_nothing() -> None:
    with pytest.raises(ValueError, match="set the policy's `k` to 2 or more"):
        Compose.check_experts(ComposeSettings(), ["a", "b"], 1)
    Compose.check_experts(ComposeSettings(), ["a", "b"], 2)


async def test_a_gate_is_asked_for_its_weights() -> None:
    mix = await asked_for(0.5, 0.3, gate="goose", by_module=False)
    assert (mix.gate, mix.by_module) == ("goose", False)
    assert Compose.weighs(ComposeSettings(gate="goose")) == "goose"
    with pytest.raises(ValueError, match="keep one of `gate` and `sharpness`"):
        ComposeSettings(gate="goose", sharpness=2)


async def test_a_method_says_how_they_become_one_and_whether_all_count() -> None:
    twin = await asked_for(0.5, 0.3, method="twin", settings={"rank": 4})
    assert (twin.method, twin.settings, twin.whole) == ("twin", {"rank": 4}, True)
    cut = await asked_for(0.5, 0.3, method="svd", settings={"rank": 4})
    assert (cut.method, cut.whole) == ("svd", False)
    plain = await asked_for(0.5, 0.3)
    assert (plain.method, plain.whole) == ("cat", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "stew"}, "there is no method 'stew'; one of cat, svd"),
        ({"method": "twin", "settings": {"rank": 0}}, "rank: .*; twin has: shared, rank"),
        ({"settings": {"rank": 4}}, "rank: .*; cat has: none"),
    ],
)
def test_a_method_that_there_is_not_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compose.check_experts(ComposeSettings(**settings), ["a", "b"], 2)
