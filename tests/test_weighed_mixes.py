"""Adapters composed for a query by a gate's weights, averaged over its prompt: whose they are, how
they are rounded, and through the API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from composer.adapters.compose import compose
from composer.adapters.factors import read_lora
from composer.adapters.gates.averaging import PromptMeans
from composer.adapters.gates.files import read_gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.recipe import Member, Recipe
from composer.adapters.shelf import Shelf
from composer.blending import blended, quantised
from composer.errors import ContextTooLong, EngineUnavailable, Overloaded
from composer.mixing import Mixer
from composer.types import Adapter, Catalog, Chunk, Expert, Gated, Mix
from composer.weighing import weighed
from examples.tiny import experts
from tests.fakes import stage
from tests.test_gated_expert import PAIR, QUERY, with_gate, write_both
from tests.tiny import TINY, chat, serving

BY_MODULE = {"q": (0.5, 0.25, 0.0), "v": (0.0, 0.0, 0.0)}
"""Of fox, owl and bear; what is left is the null expert's."""


def adapter(name: str, gate: Gated | None = None) -> Adapter:
    return Adapter(Path(name), f"sha256:{name}", 2, 2.0, ("q", "v"), gate=gate)


@pytest.fixture
def catalog() -> Catalog:
    names = ("fox", "owl", "bear")
    gate = Gated("arrow", names, tuple(f"sha256:{name}" for name in names))
    found = {name: Expert(name, "server", adapter=adapter(name)) for name in (*names, "stranger")}
    found["goose"] = Expert("goose", "server", adapter=adapter("goose", gate))
    found["base"] = Expert("base", "server")
    return stage(experts=found).generation.catalog


async def weigh(mix: Mix, catalog: Catalog, *excluded: str, told: Any = BY_MODULE) -> Mix:
    async def call(expert: Expert) -> AsyncGenerator[Chunk, None]:
        assert expert.id == "goose"
        yield Chunk("x", weights=told)

    return await weighed(mix, catalog, excluded, call)


async def test_members_have_the_gates_weights_and_the_null_expert_is_the_bases(
    catalog: Catalog,
) -> None:
    shares = (("owl", 0.1), ("stranger", 0.9), ("fox", 0.2))
    mix = await weigh(Mix(shares, 4, gate="goose", by_module=True), catalog)
    assert (mix.weighed, mix.left_out) == (True, ("stranger",))
    assert mix.shares == (("owl", 0.125), ("fox", 0.25))
    assert mix.modules == {"q": (0.25, 0.5, 0.25), "v": (0.0, 0.0, 1.0)}

    blend = blended(mix, catalog)
    recipe = blend.recipe(None)
    assert [member.name for member in recipe.members] == ["fox", "owl"]  # by their digests
    assert recipe.modules == {"q": (0.5, 0.25), "v": (0.0, 0.0)}
    # A module that the gate does not have, has no adapter either.
    assert [member.weight for member in recipe.members] == [0.0, 0.0]
    assert (blend.base, blend.alone) == (0.625, None)
    assert blend.left_out == ("stranger",)

    flat = await weigh(Mix(shares, 8, gate="goose"), catalog)
    assert (flat.modules, flat.base) == ({}, 0.625)
    weights = {member.name: member.weight for member in blended(flat, catalog).recipe(None).members}
    assert weights == {"fox": 0.25, "owl": 0.125}


async def test_where_no_gate_may_be_asked_the_routers_weights_stand(catalog: Catalog) -> None:
    asked = Mix((("fox", 0.9), ("owl", 0.4)), gate="goose")
    strangers = Mix((("stranger", 0.9), ("base", 0.4)), gate="goose")
    away = Mix((("fox", 0.9), ("owl", 0.4)), gate="a run-time expert that is left out")
    for mix, excluded in ((asked, ("goose",)), (strangers, ()), (away, ())):
        kept = await weigh(mix, catalog, *excluded)
        assert kept == mix
    silent = await weigh(asked, catalog, told={"q": (0.0, 0.0, 1.0)})  # bear has all of it
    assert silent == asked


@pytest.mark.parametrize(
    "error",
    [EngineUnavailable("down"), Overloaded("full", retry_after=1.0), ContextTooLong("too long")],
)
async def test_where_the_gate_is_not_to_be_had_the_routers_weights_stand_and_it_is_told(
    catalog: Catalog, error: Exception
) -> None:
    async def fails(expert: Expert) -> AsyncGenerator[Chunk, None]:
        raise error
        yield Chunk("")

    asked = Mix((("fox", 0.9), ("owl", 0.0)), gate="goose")
    kept = await weighed(asked, catalog, (), fails)
    assert kept == replace(asked, unweighed=str(error))
    silent = await weigh(asked, catalog, told=None)
    assert "told no weights of the gate 'goose'" in silent.unweighed

    mixer = Mixer(Shelf(Path("nowhere"), 0), most=0)
    async with mixer.expert(kept, stage(experts=catalog.experts).generation) as mixed:
        told = mixed.details["composition"]
    assert (told["weights"], told["unweighed"]) == ("router", str(error))


async def test_all_the_weight_of_the_null_expert_is_the_base_alone(catalog: Catalog) -> None:
    mix = await weigh(
        Mix((("fox", 1.0), ("owl", 1.0)), 4, gate="goose"), catalog, told={"q": (0.05, 0.0, 0.0)}
    )
    alone = blended(mix, catalog).alone
    assert alone is not None
    assert (alone.id, alone.adapter, alone.server) == ("1*base", None, "server")


def with_mix(folder: Path, **settings: Any) -> str:
    data = yaml.safe_load(with_gate(folder))
    data["policies"]["mixed"] = {
        "router": {"name": "neighbours"},
        "strategy": {"name": "compose", "steps": 4, "gate": "both", **settings},
        "experts": list(PAIR),
        "k": 2,
    }
    return str(yaml.safe_dump(data))


async def asked(client: httpx.AsyncClient, text: str, **more: Any) -> tuple[dict[str, Any], Any]:
    body = chat(text, "mixed") | {"max_tokens": 24, "temperature": 0} | more
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    return answer["composer"], answer


def averaged(folder: Path, prompt: str) -> tuple[dict[str, list[float]], int]:
    """By hooks on the base model: module → the gate's mean weights; the prompt's tokens."""
    model, tokenizer = experts.load_base("large")
    ids = tokenizer(f"{prompt}<|answer|>", return_tensors="pt").input_ids
    means = PromptMeans(torch.ones_like(ids, dtype=torch.bool))

    def weigh(module: str, layer: GatedLayer, x: torch.Tensor) -> torch.Tensor:
        weights = layer.weights(x)
        means.add(module, weights)
        return weights

    with torch.inference_mode(), Installed(model, read_gate(folder).layers, weigh):
        model(ids)
    return {module: list(means.row(0)[module]) for module in means.of}, ids.shape[1]


async def test_a_query_is_answered_by_what_its_prompts_gates_compose(tmp_path: Path) -> None:
    both = write_both(tmp_path)
    text, roots = with_mix(tmp_path), (TINY, tmp_path)
    async with serving(tmp_path, text, adapter_roots=roots, cache_dir=tmp_path) as (client, _):
        told, answer = await asked(client, QUERY)
        made = told["details"]["composition"]
        assert (made["weights"], made["built"], "failed" in made) == ("both", True, False), made
        means, tokens = averaged(both, QUERY)
        folders = {skill: TINY / "experts" / "large" / skill for skill in PAIR}
        recipe = Recipe(
            tuple(Member(name, folder, 0.0) for name, folder in folders.items()),
            modules={
                module: tuple(whole / 4 for whole in quantised(own, 4))
                for module, own in means.items()
            },
        )
        want = read_lora(compose(recipe, tmp_path / "wanted").folder).modules
        [folder] = [f for f in (tmp_path / "compositions" / "queries").iterdir() if f.is_dir()]
        found = read_lora(folder).modules
        assert found.keys() == want.keys()
        for module, factors in found.items():
            assert torch.allclose(factors.delta(), want[module].delta(), atol=1e-6)
        for column, name in enumerate(PAIR):
            mean = sum(quantised(own, 4)[column] for own in means.values()) / len(means) / 4
            assert made["members"][name] == pytest.approx(mean, abs=1e-5)
        assert len({quantised(own, 4)[0] for own in means.values()}) > 1  # modules differ

        # What the gate read is counted, but it is nobody who answered.
        assert told["experts"] == [told["expert"]]
        assert answer["usage"]["prompt_tokens"] == 2 * tokens
        again, _ = await asked(client, QUERY)
        assert again["details"]["composition"]["built"] is False
        assert (await asked(client, QUERY, stop=["zz"], n=1))[1]["choices"] == answer["choices"]
        streamed = await client.post(
            "/v1/chat/completions", json=chat(QUERY, "mixed") | {"stream": True}
        )
        assert '"weights": "both"' in streamed.text or '"weights":"both"' in streamed.text

        without, _ = await asked(client, QUERY, composer={"exclude": ["both"]})
        assert without["details"]["composition"]["weights"] == "router"


async def test_one_weight_for_all_modules(tmp_path: Path) -> None:
    both = write_both(tmp_path)
    text, roots = with_mix(tmp_path, by_module=False), (TINY, tmp_path)
    async with serving(tmp_path, text, adapter_roots=roots, cache_dir=tmp_path) as (client, _):
        made = (await asked(client, QUERY))[0]["details"]["composition"]
        means, _ = averaged(both, QUERY)
        whole = quantised([sum(own) for own in zip(*means.values(), strict=True)], 4)
        assert made["members"] == {
            name: share / 4 for name, share in zip(PAIR, whole, strict=True) if share
        }
