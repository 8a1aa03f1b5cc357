"""What the embedded engine writes, against plain transformers and peft, alone and in batches."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.errors import (
    ContextTooLong,
    EngineError,
    Unsupported,
)
from composer.types import Adapter, Call
from tests.engines.conftest import CONTEXT, PROMPTS, gather, make_call, reference, save_base, text


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


@pytest.mark.parametrize("window", [20, 4096])
async def test_an_experts_default_length_is_cut_to_the_room(
    bare: EmbeddedEngine, window: int
) -> None:
    async def answered(prompt: int, default: int) -> int:
        call = make_call(
            "x" * prompt, max_tokens=default, max_tokens_asked=False, context_window=window
        )
        usage = (await gather(bare, call))[-1].usage
        assert usage is not None
        return usage.completion_tokens

    room = min(window, CONTEXT)
    assert await answered(room - 3, 90) == 3
    assert await answered(room - 1, 90) == 1
    assert await answered(room - 8, 5) == 5
    with pytest.raises(ContextTooLong, match=f"prompt's {room} tokens exceed"):
        await answered(room, 90)


async def test_the_highest_draw_stays_within_the_nucleus(
    bare: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - 2^-26 is 1 in float32: beyond the last token of any mass."""

    class Highest(random.Random):
        def random(self) -> float:
            return 1 - 2**-26

    greedy = await text(bare, make_call("2+2="))
    monkeypatch.setattr("composer.engines.worker.random.Random", Highest)
    assert await text(bare, make_call("2+2=", temperature=1.0, top_p=1e-6)) == greedy


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


async def test_knobs_left_open_are_one(engine: EmbeddedEngine) -> None:
    left_open = make_call(seed=3, temperature=None, top_p=None, max_tokens=20)
    assert await text(engine, left_open) == await text(
        engine, make_call(seed=3, temperature=1.0, top_p=1.0, max_tokens=20)
    )
