"""Gated experts in the embedded engine, against a plain transformers loop without any cache."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from composer.adapters.factors import read_lora
from composer.adapters.gates.files import read_gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.prior import prior
from composer.adapters.gates.selection import Selection, Tsallis
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.gates.xlora import features
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.errors import EngineError
from composer.types import Adapter, Call, Usage
from tests.engines.conftest import HIDDEN, PROMPTS, QUERY, gather, make_call, text
from tests.gated import by_loop, save_gate


def soft(gate: Any, module: str, read: Tensor, extra: Tensor | None = None) -> Tensor:
    """softmax of the top two logits, the paper's way: no member without factors takes part."""
    layer = gate.layers[module]
    logits = read @ layer.projection.rows.T
    if gate.manifest.normalise == "absolute":
        logits = logits.abs()
    if gate.manifest.normalise == "standardised":
        logits = logits / read.std(-1, correction=0, keepdim=True)
    if extra is not None:
        logits = logits + extra
    absent = torch.tensor([rank == 0 for rank in layer.stacked.ranks])
    logits = logits.masked_fill(absent, -torch.inf)
    kept = logits.topk(2).values[..., -1:]
    return torch.softmax(logits.masked_fill(logits < kept, -torch.inf), -1)


@pytest_asyncio.fixture
async def engine(
    base: Path, adapters: tuple[Adapter, ...], gates: dict[str, Adapter]
) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), threads=1))
    await engine.start()
    await engine.prepare([*adapters, *gates.values()])
    yield engine
    await engine.close()


def call_of(prompt: str, adapter: Adapter | None, **more: Any) -> Call:
    call = make_call(prompt, adapter, **more)
    known = adapter is not None and adapter.gate is not None and adapter.gate.per_request
    return dataclasses.replace(call, embedding=QUERY) if known else call


@pytest.fixture(scope="module")
def loop(base: Path, members: dict[str, Path]) -> Callable[[Adapter | None, str, int], str]:
    """Greedy tokens one at a time, the whole text read anew for each: no cache, no stacking."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    loras = [read_lora(path) for path in members.values()]
    model: Any = LlamaForCausalLM.from_pretrained(base).eval()

    def hooks(adapter: Adapter | None, ids: Tensor) -> list[Any]:
        if adapter is None:
            return []
        if adapter.gate is None:
            return by_loop(model, [read_lora(adapter.path)], lambda module, x: torch.ones(1))
        gate = read_gate(adapter.path)
        if adapter.gate.passes == 2:
            hidden = model(ids, output_hidden_states=True).hidden_states[-1]
            read = torch.relu(
                hidden @ gate.tensors["features.0.weight"].T + gate.tensors["features.0.bias"]
            )
            return by_loop(model, loras, lambda module, x: soft(gate, module, read))
        extra = None
        if adapter.gate.per_request:
            extra = 5.0 * gate.tensors["prior.rows"] @ torch.tensor(QUERY)
        return by_loop(model, loras, lambda module, x: soft(gate, module, x, extra))

    @torch.inference_mode()
    def greedy(adapter: Adapter | None, prompt: str, new: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(new):
            own = hooks(adapter, ids)
            token = model(ids).logits[0, -1].argmax()
            for hook in own:
                hook.remove()
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
        return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))

    return greedy


async def test_a_mixed_batch_writes_what_the_plain_loop_writes(
    engine: EmbeddedEngine,
    adapters: tuple[Adapter, ...],
    gates: dict[str, Adapter],
    loop: Callable[[Adapter | None, str, int], str],
) -> None:
    choices = (None, *adapters[:2], *gates.values())
    calls = [
        call_of(PROMPTS[i % len(PROMPTS)], choices[i % len(choices)], max_tokens=4 + i)
        for i in range(16)
    ]
    together = await asyncio.gather(*(text(engine, call) for call in calls))
    expected = [loop(c.adapter, c.prompt or "", c.sampling.max_tokens or 0) for c in calls]
    assert together == expected
    assert len(set(expected)) > 12  # adapters, gates and prompts do make a difference


async def test_rows_that_join_late_and_leave_early_change_nobody(
    engine: EmbeddedEngine, adapters: tuple[Adapter, ...], gates: dict[str, Adapter]
) -> None:
    chance = random.Random(4)
    choices = (None, adapters[0], *gates.values())
    calls = [
        call_of(
            chance.choice(PROMPTS), chance.choice(choices),
            max_tokens=chance.randint(1, 24), n=chance.choice((1, 1, 2)), temperature=0.7, seed=i,
        )
        for i in range(40)
    ]  # fmt: skip

    async def later(call: Call) -> str:
        await asyncio.sleep(chance.random() * 0.2)
        return await in_order(call)

    async def in_order(call: Call) -> str:
        chunks = await gather(engine, call)
        return "".join(c.text for i in range(2) for c in chunks if c.index == i)

    alone = [await in_order(call) for call in calls]
    assert await asyncio.gather(*map(later, calls)) == alone


async def test_a_one_hot_gate_is_that_adapter(
    engine: EmbeddedEngine, adapters: tuple[Adapter, ...], members: dict[str, Path], tmp_path: Path
) -> None:
    hot = {
        "bias": save_gate(
            tmp_path / "bias", {"a": members["a"], "b": members["b"]}, seed=5, normalise="none",
            selection=Selection(), bias=[0.0, 1e4],
        ),
        "two passes": save_gate(
            tmp_path / "two", {"a": members["a"], "b": members["b"]}, kind="xlora", seed=6,
            normalise="none", selection=Selection(), bias=[0.0, 1e4], width=HIDDEN, passes=2,
        ),
        "alone": save_gate(
            tmp_path / "one", {"b": members["b"]}, selection=Selection(top_k=1)
        ),
    }  # fmt: skip
    await engine.prepare(hot.values())
    expected = await text(engine, make_call("the quick", adapters[1], max_tokens=20))
    for name, gate in hot.items():
        assert await text(engine, make_call("the quick", gate, max_tokens=20)) == expected, name


async def test_the_null_expert_leaves_the_base_alone(
    engine: EmbeddedEngine, members: dict[str, Path], tmp_path: Path
) -> None:
    null = save_gate(
        tmp_path / "null", members, seed=7, normalise="none", bias=[0.0, 0.0, 0.0, 1e4],
        selection=Selection(null=True, tsallis=Tsallis()),
    )  # fmt: skip
    await engine.prepare([null])
    chunks = await gather(engine, dataclasses.replace(make_call("2+2=", null), gates="all"))
    assert "".join(c.text for c in chunks) == await text(engine, make_call("2+2="))
    assert chunks[-1].gates is not None
    assert all(token.weights == {"all": {}} for token in chunks[-1].gates.prompt)


async def test_gates_come_and_go_by_digest_and_count_as_adapters(
    base: Path, adapters: tuple[Adapter, ...], gates: dict[str, Adapter]
) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), threads=1, max_adapters=2))
    await engine.start()
    try:
        await engine.prepare([adapters[0], gates["arrow"]])
        with pytest.raises(EngineError, match="would hold 3 adapters; its max_adapters is 2"):
            await engine.prepare([gates["xlora"]])
        before = await text(engine, make_call("hello", gates["arrow"]))
        await engine.retain([gates["arrow"]])  # peft unwraps its layers, and the gate stays
        assert await text(engine, make_call("hello", gates["arrow"])) == before
        with pytest.raises(EngineError, match="is not loaded"):
            await text(engine, make_call("hello", adapters[0]))
        await engine.retain([])
        with pytest.raises(EngineError, match="is not loaded"):
            await text(engine, make_call("hello", gates["arrow"]))
        await engine.stop()
        await engine.prepare([gates["arrow"]])
        await engine.start()
        assert await text(engine, make_call("hello", gates["arrow"])) == before
    finally:
        await engine.close()


async def test_a_gate_that_does_not_fit_is_refused(base: Path, gates: dict[str, Adapter]) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), threads=1))
    await engine.start()
    try:
        with pytest.raises(EngineError, match="it changed on disk"):
            await engine.prepare([dataclasses.replace(gates["arrow"], digest="sha256:0")])
        call = dataclasses.replace(call_of("hello", gates["glider"]), embedding=None)
        await engine.prepare([gates["glider"]])
        with pytest.raises(EngineError, match="came without its embedding"):
            await text(engine, call)
        with pytest.raises(EngineError, match="embeddings of 6 numbers, and the request's has 1"):
            await text(engine, dataclasses.replace(call, embedding=(1.0,)))
    finally:
        await engine.close()


async def test_traces_are_the_weights_of_each_token(
    engine: EmbeddedEngine, base: Path, gates: dict[str, Adapter], members: dict[str, Path]
) -> None:
    """In a batch with others, against the weights of one forward over prompt and answer."""
    asked = dataclasses.replace(
        make_call("the quick", gates["arrow"], max_tokens=8), gates="layers"
    )
    others = [
        call_of(p, a, max_tokens=12) for p, a in zip(PROMPTS, (None, *gates.values()), strict=False)
    ]
    chunks, *_ = await asyncio.gather(
        gather(engine, asked), *(gather(engine, call) for call in others)
    )
    trace = chunks[-1].gates
    assert trace is not None
    assert trace.members == ("a", "b", "c")
    answer = "".join(c.text for c in chunks)
    assert "".join(t.token for t in trace.prompt) == "the quick"
    assert "".join(t.token for t in trace.answers[0]) == answer
    assert [c.gates for c in chunks[:-1]] == [None] * (len(chunks) - 1)

    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    gate = read_gate(gates["arrow"].path)
    seen: dict[str, Tensor] = {}

    def weights(module: str, x: Tensor) -> Tensor:
        seen[module] = soft(gate, module, x)
        return seen[module]

    by_loop(model, [read_lora(path) for path in members.values()], weights)
    ids = AutoTokenizer.from_pretrained(base)("the quick" + answer, return_tensors="pt").input_ids
    with torch.inference_mode():
        model(ids)
    attention = torch.stack([seen[m] for m in seen if "layers.1." in m and "attn" in m]).mean(0)[0]
    start = len(trace.prompt)
    read_at = [*range(start), *range(start - 1, start - 1 + len(trace.answers[0]))]
    for token, position in zip((*trace.prompt, *trace.answers[0]), read_at, strict=True):
        assert set(token.weights) == {
            f"layer {layer}, {kind}" for layer in (0, 1) for kind in ("attention", "mlp")
        }
        told = token.weights["layer 1, attention"]
        expected = dict(zip("abc", attention[position].tolist(), strict=True))
        assert told == {k: pytest.approx(v, abs=2e-4) for k, v in expected.items() if v >= 1e-4}
        assert sum(told.values()) == pytest.approx(1, abs=1e-3)


async def test_who_does_not_ask_is_told_nothing(
    engine: EmbeddedEngine, adapters: tuple[Adapter, ...], gates: dict[str, Adapter]
) -> None:
    plain = dataclasses.replace(make_call("hello", adapters[0]), gates="all")
    for call in (plain, make_call("hello", gates["arrow"])):
        assert {chunk.gates for chunk in await gather(engine, call)} == {None}


@pytest.mark.parametrize("kind", ["arrow", "phatgoose", "xlora", "glider"])
async def test_a_prompt_is_weighed_by_the_means_of_its_tokens(
    engine: EmbeddedEngine, base: Path, gates: dict[str, Adapter], kind: str
) -> None:
    """In a batch of prompts of other lengths, against the weights of a forward of its own."""
    adapter = gates[kind]
    calls = [
        dataclasses.replace(call_of(prompt, adapter, max_tokens=1), weigh=True)
        for prompt in PROMPTS[:3]
    ]
    others = [call_of(PROMPTS[0], other, max_tokens=4) for other in (None, *gates.values())]
    answers = await asyncio.gather(*(gather(engine, call) for call in (*calls, *others)))
    assert {chunk.weights for chunks in answers[3:] for chunk in chunks} == {None}

    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    gate = read_gate(adapter.path)
    known = prior(gate, QUERY) if gate.manifest.per_request else None
    for prompt, (*_, last) in zip(PROMPTS, answers[:3], strict=False):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        read = None
        if gate.manifest.passes == 2:
            with torch.inference_mode():
                read = features(gate, model.model(ids).last_hidden_state)
        seen: dict[str, Tensor] = {}

        def weigh(
            module: str, layer: GatedLayer, x: Tensor, read: Any = read, seen: Any = seen
        ) -> Tensor:
            seen[module] = layer.weights(x if read is None else read, known)
            return seen[module]

        with torch.inference_mode(), Installed(model, gate.layers, weigh):
            model(ids)
        assert last.weights is not None
        assert last.weights.keys() == seen.keys()
        assert last.usage == Usage(ids.shape[1], 1)
        for module, weights in seen.items():
            assert last.weights[module] == pytest.approx(weights[0].mean(0).tolist(), abs=1e-4)
