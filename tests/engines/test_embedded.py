"""The embedded engine against plain transformers and peft, and under all that may go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.errors import (
    ContextTooLong,
    EngineError,
    EngineUnavailable,
    Unsupported,
)
from composer.types import Adapter, Call, Chunk
from tests.engines.conftest import CONTEXT, make_call, save_adapter, save_base

PROMPTS = ("hello", "a", "the quick brown fox jumps over", "2+2=", "abc " * 9, "x" * 40)


async def gather(engine: EmbeddedEngine, call: Call) -> list[Chunk]:
    async with aclosing(engine.run(call)) as chunks:
        return [chunk async for chunk in chunks]


async def text(engine: EmbeddedEngine, call: Call) -> str:
    return "".join(chunk.text for chunk in await gather(engine, call))


def reference(base: Path, adapter: Adapter | None, prompt: str, new: int) -> str:
    """The greedy continuation by transformers' own `generate`, one prompt, one adapter."""
    model = LlamaForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.eval().generate(input_ids=ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


async def test_a_mixed_batch_writes_what_each_row_writes_alone_and_generate_writes(
    engine: EmbeddedEngine, base: Path, adapters: tuple[Adapter, ...]
) -> None:
    choices = (None, *adapters)
    calls = [
        make_call(PROMPTS[i % len(PROMPTS)], choices[i % len(choices)], max_tokens=4 + 2 * i)
        for i in range(16)
    ]
    together = await asyncio.gather(*(text(engine, call) for call in calls))
    alone = [await text(engine, call) for call in calls]
    assert together == alone
    assert len(set(alone)) > 12  # adapters and prompts do make a difference
    assert together == [
        reference(base, c.adapter, c.prompt or "", c.sampling.max_tokens or 0) for c in calls
    ]


async def test_rows_that_join_late_and_leave_early_change_nobody(
    engine: EmbeddedEngine, adapters: tuple[Adapter, ...]
) -> None:
    chance = random.Random(1)
    calls = [
        make_call(
            chance.choice(PROMPTS),
            chance.choice((None, *adapters)),
            max_tokens=chance.randint(1, 30),
            temperature=chance.choice((0.0, 1.0)),
            top_p=chance.choice((1.0, 0.8)),
            seed=i,
        )
        for i in range(60)
    ]
    alone = [await text(engine, call) for call in calls]

    async def later(call: Call) -> str:
        await asyncio.sleep(chance.random() * 0.2)
        return await text(engine, call)

    assert await asyncio.gather(*map(later, calls)) == alone


async def test_tokens_arrive_one_by_one_while_the_call_runs(engine: EmbeddedEngine) -> None:
    chunks = await gather(engine, make_call("2+2=", max_tokens=20))
    assert len(chunks) > 10
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 20)


async def test_n_choices_share_a_prompt_and_differ(engine: EmbeddedEngine) -> None:
    chunks = await gather(engine, make_call("hello", n=3, temperature=1.0, seed=5, max_tokens=10))
    texts = ["".join(c.text for c in chunks if c.index == i) for i in range(3)]
    assert len(set(texts)) == 3
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"] * 3
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 30)
    assert texts[0] == await text(
        engine, make_call("hello", temperature=1.0, seed=5, max_tokens=10)
    )


async def test_a_seed_repeats_and_no_seed_does_not(engine: EmbeddedEngine) -> None:
    seeded = make_call(temperature=1.0, seed=7, max_tokens=30)
    free = make_call(temperature=1.0, max_tokens=30)
    assert await text(engine, seeded) == await text(engine, seeded)
    assert await text(engine, free) != await text(engine, free)


async def test_stop_strings_end_the_answer_before_them(engine: EmbeddedEngine) -> None:
    whole = await text(engine, make_call("2+2=", max_tokens=30))
    stop = whole[10:13]
    chunks = await gather(engine, make_call("2+2=", max_tokens=30, stop=(stop, "never seen")))
    assert "".join(c.text for c in chunks) == whole[: whole.find(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens < 30


async def test_the_end_token_ends_the_answer(base: Path, tmp_path: Path) -> None:
    """Every token is made an end token, so that the first one ends it."""
    shutil.copytree(base, tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.generation_config.save_pretrained(tmp_path / "base")
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(tmp_path / "base")))
    await engine.start()
    (chunk,) = await gather(engine, make_call())
    assert (chunk.text, chunk.finish_reason) == ("", "stop")
    await engine.close()


async def test_logprobs_are_the_models_own(
    engine: EmbeddedEngine, base: Path, adapters: tuple[Adapter, ...]
) -> None:
    for seed in range(50):  # to one whose bytes are all ASCII, which can be encoded back
        call = make_call("2+2=", adapters[0], max_tokens=6, logprobs=3, temperature=2.0, seed=seed)
        chunks = await gather(engine, call)
        if "".join(c.text for c in chunks).isascii():
            break
    tokens = [t for c in chunks for t in c.logprobs]
    assert "".join(t.token for t in tokens) == "".join(c.text for c in chunks)

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapters[0].path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer("2+2=").input_ids
    answer = tokenizer("".join(t.token for t in tokens), add_special_tokens=False).input_ids
    logits = model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0]
    expected = torch.log_softmax(logits.detach(), -1)[len(prompt) - 1 : -1]
    for token, id_, row in zip(tokens, answer, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[id_]), abs=1e-4)
        best, ids = row.topk(3)
        assert [v for _, v in token.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert [t for t, _ in token.top] == [tokenizer.decode([i]) for i in ids.tolist()]


async def test_zero_logprobs_give_the_chosen_token_alone(engine: EmbeddedEngine) -> None:
    tokens = [t for c in await gather(engine, make_call(logprobs=0)) for t in c.logprobs]
    assert tokens
    assert all(t.top == () and t.logprob <= 0 for t in tokens)


async def test_messages_go_through_the_chat_template(engine: EmbeddedEngine) -> None:
    chat = make_call(
        messages=(
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        )
    )
    assert await text(engine, chat) == await text(engine, make_call("s:be brief\nu:hi\na:"))
    assert await engine.count_tokens(chat.messages, None) == len("s:be brief\nu:hi\na:")
    assert await engine.count_tokens((), "hello") == 5


async def test_a_template_that_refuses_and_a_missing_one(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(tmp_path / "base")))
    await engine.start()
    late = ({"role": "user", "content": "a"}, {"role": "system", "content": "b"})
    with pytest.raises(Unsupported, match="system must come first"):
        await text(engine, make_call(messages=late))
    await engine.close()

    (tmp_path / "base" / "chat_template.jinja").unlink()
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(tmp_path / "base")))
    await engine.start()
    with pytest.raises(EngineError, match="no chat template"):
        await text(engine, make_call(messages=({"role": "user", "content": "a"},)))
    assert await text(engine, make_call())
    await engine.close()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"extra": {"tools": [{"type": "function"}]}}, "tools"),
        ({"extra": {"tool_choice": "required"}}, "tool_choice"),
        ({"extra": {"response_format": {"type": "json_object"}}}, "response_format"),
        ({"extra": {"logit_bias": {"1": 5}}}, "logit_bias"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"prompt": ""}, "prompt"),
        (
            {"messages": ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]},)},
            "messages.0.content",
        ),
        ({"messages": ({"role": "tool", "content": "x", "tool_call_id": "1"},)}, "messages.0"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    bare: EmbeddedEngine, changes: dict[str, object], param: str
) -> None:
    with pytest.raises(Unsupported) as refused:
        await gather(bare, make_call(**changes))  # type: ignore[arg-type]
    assert refused.value.param == param


async def test_idle_extras_are_not_refused(bare: EmbeddedEngine) -> None:
    extra = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}}
    assert await text(bare, make_call(extra=extra)) == await text(bare, make_call())


@pytest.mark.parametrize("window", [20, 4096])
async def test_the_context_is_counted_exactly(bare: EmbeddedEngine, window: int) -> None:
    room = min(window, CONTEXT)
    fits = make_call("x" * (room - 4), max_tokens=4, context_window=window)
    assert (await gather(bare, fits))[-1].usage.completion_tokens == 4  # type: ignore[union-attr]
    with pytest.raises(ContextTooLong, match=f"{room - 3} tokens and max_tokens 4"):
        await gather(bare, make_call("x" * (room - 3), max_tokens=4, context_window=window))
    with pytest.raises(ContextTooLong):
        await gather(bare, make_call("x" * room, max_tokens=None, context_window=window))
    full = await gather(bare, make_call("x", max_tokens=None, context_window=window))
    assert full[-1].usage.completion_tokens == room - 1  # type: ignore[union-attr]


async def test_leaving_a_stream_frees_its_rows(bare: EmbeddedEngine) -> None:
    worker = bare._worker
    assert worker is not None
    stream = bare.run(make_call(n=8, temperature=1.0, max_tokens=90))
    await anext(stream)
    assert len(worker._rows) == 8
    await stream.aclose()
    await text(bare, make_call(max_tokens=2))
    assert worker._rows == []
    assert worker._batch.lengths == []


async def test_a_cancelled_call_never_starts(base: Path) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_batch=1))
    await engine.start()
    first = engine.run(make_call(max_tokens=90))
    await anext(first)
    second = asyncio.create_task(text(engine, make_call("abc")))
    await asyncio.sleep(0.02)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert [c async for c in first][-1].finish_reason == "length"
    assert await text(engine, make_call("abc"))
    assert not engine._worker._waiting  # type: ignore[union-attr]
    await engine.close()


@pytest.mark.parametrize("limit", [{"max_batch": 3}, {"kv_tokens": 60}, {"prefill_tokens": 10}])
async def test_limits_delay_but_lose_nothing(base: Path, limit: dict[str, int]) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), **limit))  # type: ignore[arg-type]
    await engine.start()
    sizes: list[int] = []
    batch, model = engine._worker._batch, engine._worker._model  # type: ignore[union-attr]
    step, forward = batch.step, model.forward

    def watched_step(tokens: list[int]) -> torch.Tensor:
        logits = step(tokens)
        if "prefill_tokens" not in limit:
            sizes.append(len(tokens) * (batch.width if "kv_tokens" in limit else 1))
        return logits

    def watched_forward(ids: torch.Tensor, **rest: object) -> torch.Tensor:
        if "prefill_tokens" in limit and len(ids) > 1 and ids.shape[1] > 1:
            sizes.append(ids.numel())
        return forward(ids, **rest)  # type: ignore[arg-type]

    batch.step, model.forward = watched_step, watched_forward  # type: ignore[assignment,method-assign]
    calls = [make_call(p, max_tokens=12) for p in PROMPTS[:4] * 3]
    answers = await asyncio.gather(*(text(engine, call) for call in calls))
    assert answers == [await text(engine, call) for call in calls]
    assert max(sizes) <= next(iter(limit.values()))
    await engine.close()


# --- adapters ---------------------------------------------------------------------------


async def test_adapters_come_and_go_while_calls_run(
    bare: EmbeddedEngine, adapters: tuple[Adapter, ...]
) -> None:
    plain = await text(bare, make_call(max_tokens=80))
    running = asyncio.create_task(text(bare, make_call(max_tokens=80)))
    await bare.prepare(adapters[:2])
    await bare.prepare(adapters[1:3])  # one known, one new
    first = await text(bare, make_call(adapter=adapters[0]))
    assert await running == plain
    await bare.retain(adapters[:1])
    assert await text(bare, make_call(adapter=adapters[0])) == first
    assert await text(bare, make_call(max_tokens=80)) == plain
    with pytest.raises(EngineError, match="not loaded"):
        await text(bare, make_call(adapter=adapters[1]))
    await bare.retain(())
    await bare.prepare(adapters)
    assert await text(bare, make_call(adapter=adapters[0])) == first


def broken(kind: str, adapter: Adapter, base: Path, folder: Path) -> Adapter:
    """A copy of an adapter with one thing wrong."""
    shutil.copytree(adapter.path, folder)
    weights = folder / "adapter_model.safetensors"
    config = folder / "adapter_config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "missing":
        weights.unlink()
    elif kind == "rank":
        config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    elif kind == "modules":
        config.write_text(config.read_text().replace('"q_proj"', '"k_proj"'))
    elif kind == "no such module":
        for module in ("q_proj", "v_proj", "down_proj"):
            config.write_text(config.read_text().replace(f'"{module}"', f'"no_{module}"'))
    else:
        raise AssertionError(kind)
    return dataclasses.replace(adapter, path=folder, digest=f"sha256:{kind}")


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "missing", "rank", "modules", "no such module"])
async def test_a_load_that_fails_adds_nothing_and_breaks_nothing(
    bare: EmbeddedEngine,
    base: Path,
    adapters: tuple[Adapter, ...],
    tmp_path: Path,
    kind: str,
    held: int,
) -> None:
    await bare.prepare(adapters[:held])
    calls = [make_call(), *(make_call(adapter=a) for a in adapters[:held])]
    before = [await text(bare, call) for call in calls]
    bad = broken(kind, adapters[3], base, tmp_path / "bad")
    with pytest.raises(EngineError, match="cannot be loaded"):
        await bare.prepare([adapters[1], bad, adapters[2]])
    assert [await text(bare, call) for call in calls] == before
    for absent in (adapters[1], adapters[2], bad):
        with pytest.raises(EngineError, match="not loaded"):
            await text(bare, make_call(adapter=absent))
    await bare.prepare(adapters)
    assert await text(bare, make_call("2+2=", adapters[2])) == reference(
        base, adapters[2], "2+2=", 12
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_adapters_take_the_bases_precision(
    base: Path, adapters: tuple[Adapter, ...], dtype: str
) -> None:
    settings = EmbeddedSettings(model=str(base), dtype=dtype)  # type: ignore[arg-type]
    engine = EmbeddedEngine("tiny", settings)
    await engine.start()
    await engine.prepare(adapters)
    calls = [make_call("2+2=", adapter, max_tokens=1) for adapter in (None, *adapters)]
    together = await asyncio.gather(*(text(engine, call) for call in calls))
    assert together == [reference(base, call.adapter, "2+2=", 1) for call in calls]
    await engine.close()


async def test_too_many_adapters_are_refused(base: Path, adapters: tuple[Adapter, ...]) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_adapters=2))
    await engine.start()
    await engine.prepare(adapters[:2])
    with pytest.raises(EngineError, match="would hold 3 adapters; its max_adapters is 2"):
        await engine.prepare(adapters[:3])
    await engine.close()


async def test_a_poisoned_adapter_fails_its_own_calls_only(
    engine: EmbeddedEngine, base: Path, tmp_path: Path
) -> None:
    poison = save_adapter(base, tmp_path / "poison", 9)
    await engine.prepare([poison])
    name = engine._worker._model._names[poison.digest]  # type: ignore[union-attr]
    for key, parameter in engine._worker._model._base.named_parameters():  # type: ignore[union-attr]
        if name in key:
            parameter.data.fill_(torch.nan)
    fine = make_call("2+2=", max_tokens=20)
    expected = await text(engine, fine)
    good, bad = await asyncio.gather(
        text(engine, fine), text(engine, make_call(adapter=poison)), return_exceptions=True
    )
    assert good == expected
    assert isinstance(bad, EngineError)
    assert "not finite" in str(bad)


async def test_a_step_that_fails_fails_its_rows_and_the_engine_goes_on(
    bare: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await text(bare, make_call())
    model = bare._worker._model  # type: ignore[union-attr]
    forward, calls = model.forward, 0

    def flaky(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 6):  # a step of the first call, the prefill of the second
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", flaky)
    with pytest.raises(EngineError, match="out of memory"):
        await text(bare, make_call())
    monkeypatch.setattr(model, "forward", forward)
    calls = 5
    monkeypatch.setattr(model, "forward", flaky)
    with pytest.raises(EngineError, match="out of memory"):
        await text(bare, make_call())
    assert await text(bare, make_call()) == expected
    assert await bare.healthy()


# --- life -------------------------------------------------------------------------------


async def test_close_fails_what_runs_and_may_be_called_twice(base: Path) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_batch=1))
    with pytest.raises(EngineUnavailable, match="not started"):
        await text(engine, make_call())
    await engine.start()
    assert await engine.healthy()
    stream = engine.run(make_call(max_tokens=90))
    await anext(stream)
    waiting = asyncio.create_task(text(engine, make_call()))
    await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        [c async for c in stream]
    with pytest.raises(EngineUnavailable, match="closed"):
        await waiting
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.prepare(())
    assert not await engine.healthy()
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]


@pytest.mark.parametrize("problem", ["nowhere", "weights", "tokenizer"])
async def test_a_base_that_cannot_be_loaded_names_the_remedy(
    base: Path, tmp_path: Path, problem: str
) -> None:
    folder = tmp_path / "base"
    if problem != "nowhere":
        shutil.copytree(base, folder)
        if problem == "weights":
            (folder / "model.safetensors").write_bytes(b"no")
        else:
            (folder / "tokenizer.json").unlink()
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(folder)))
    with pytest.raises(EngineUnavailable, match="`model` must be a folder with config"):
        await engine.start()
    assert not await engine.healthy()
    await engine.close()


async def test_a_sliding_window_is_kept_in_mixed_batches(tmp_path: Path) -> None:
    """Mistral's attention sees only the last tokens; rows of unequal length must too."""
    from transformers import MistralConfig, MistralForCausalLM

    base = save_base(tmp_path / "base")
    llama = LlamaForCausalLM.from_pretrained(base)
    shared = llama.config.to_dict()
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    torch.manual_seed(3)
    config = MistralConfig(**{key: shared[key] for key in keys}, sliding_window=6)
    MistralForCausalLM(config).save_pretrained(base)
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    await engine.start()
    calls = [make_call(prompt, max_tokens=20) for prompt in PROMPTS]
    together = await asyncio.gather(*(text(engine, call) for call in calls))
    model = MistralForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
        assert found == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    await engine.close()


def test_importing_the_engine_imports_no_torch() -> None:
    code = "import sys, composer.engines.local; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
