"""A base of a few thousand random parameters, a character tokenizer and random LoRA adapters.

Weights are drawn wide, so that texts differ between adapters and greedy choices are far from ties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from composer.adapters.files import WEIGHTS
from composer.adapters.lora_config import read_lora_config
from composer.adapters.tensors import read_tensors
from composer.adapters.verify import adapter_digest
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.types import Adapter, Call, Chunk, Message, Sampling
from tests.gated import save_gate

CONTEXT = 96
HIDDEN, FEATURES, DIM = 32, 10, 6
"""Widths: of the base, of what X-LoRA's classifier gives, and of embeddings."""

QUERY = tuple((torch.arange(DIM) / torch.arange(DIM).float().norm()).tolist())
"""A request's embedding, of unit length."""

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


MULTIBYTE = "é€😀"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character, and single bytes that make up `MULTIBYTE`."""
    pieces = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(MULTIBYTE)]
    octets = {symbol for parts in pieces for text, _ in parts for symbol in text}
    ascii_symbols = {chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"}
    symbols = sorted(ascii_symbols | octets)
    vocab = {"<s>": 0, "</s>": 1, **{symbol: i + 2 for i, symbol in enumerate(symbols)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(**changes: object) -> LlamaConfig:
    values: dict[str, object] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaConfig(**(values | changes))


def save_base(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, **changes: object) -> Adapter:
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    config = LoraConfig(**(values | changes))
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    adapter = Adapter(folder, "", config.r, config.lora_alpha, tuple(config.target_modules))
    return with_own_digest(adapter)


def with_own_digest(adapter: Adapter) -> Adapter:
    """The digest of the folder as it now is, right or wrong for its base."""
    config, _ = read_lora_config(adapter.path, ())
    assert config is not None
    digest = adapter_digest(config, read_tensors(adapter.path / WEIGHTS))
    return dataclasses.replace(adapter, digest=digest)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    """Four of them, of two ranks and two sets of modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return (
        save_adapter(base, folder / "a", 1),
        save_adapter(base, folder / "b", 2),
        save_adapter(base, folder / "c", 3, r=2, target_modules=["o_proj", "gate_proj"]),
        save_adapter(base, folder / "d", 4),
    )


@pytest.fixture(scope="session")
def members(adapters: tuple[Adapter, ...]) -> dict[str, Path]:
    """Three of two ranks, the third on other modules."""
    return dict(zip("abc", (adapter.path for adapter in adapters), strict=False))


@pytest.fixture(scope="session")
def gates(members: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("gates")
    torch.manual_seed(9)
    inner = {"features.0.weight": torch.randn(FEATURES, HIDDEN), "features.0.bias": torch.randn(10)}
    prior = {"prior.rows": torch.nn.functional.normalize(torch.randn(3, DIM))}
    return {
        "arrow": save_gate(folder / "arrow", members),
        "phatgoose": save_gate(
            folder / "phatgoose", members, kind="phatgoose", seed=1, normalise="standardised"
        ),
        "xlora": save_gate(
            folder / "xlora", members, kind="xlora", seed=2, normalise="none", width=FEATURES,
            tensors=inner, passes=2,
        ),
        "glider": save_gate(
            folder / "glider", members, kind="glider", seed=3, normalise="standardised",
            tensors=prior, per_request=True, settings={"gamma": 5.0},
        ),
    }  # fmt: skip


@pytest_asyncio.fixture
async def engine(base: Path, adapters: tuple[Adapter, ...]) -> AsyncIterator[EmbeddedEngine]:
    """Started, with all four adapters."""
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), threads=1))
    await engine.start()
    await engine.prepare(adapters)
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def bare(base: Path) -> AsyncIterator[EmbeddedEngine]:
    """Started, without adapters."""
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), threads=1))
    await engine.start()
    yield engine
    await engine.close()


def make_call(
    prompt: str | None = "hello",
    adapter: Adapter | None = None,
    *,
    messages: tuple[Message, ...] = (),
    extra: dict[str, object] | None = None,
    context_window: int = 4096,
    max_tokens_asked: bool = True,
    **sampling: object,
) -> Call:
    values: dict[str, object] = {"temperature": 0.0, "max_tokens": 12}
    return Call(
        id="call",
        expert="expert",
        server="tiny",
        adapter=adapter,
        messages=messages,
        prompt=None if messages else prompt,
        sampling=Sampling(**(values | sampling)),  # type: ignore[arg-type]
        context_window=context_window,
        max_tokens_asked=max_tokens_asked,
        extra=extra or {},
    )


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
