"""Gates on the real vLLM (its CPU build), through its OpenAI server, against the embedded engine
with the same gates. Everything in float32 and greedy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from composer.adapters.gates.verify import verify_gate
from composer.adapters.gates.vllm_folder import write_vllm_folder
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.types import GateTrace, Message
from examples.tiny.experts import EXPERTS, base_folder
from examples.tiny.tasks import SKILLS
from tests.engines.conftest import gather, make_call
from tests.vllm import plugin_environment, vllm_marks, vllm_server
from tests.vllm_gates import BASE, folder_of, tiny_gate

pytestmark = vllm_marks

ARGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16}
EAGER = ARGS | {"enforce_eager": True}
PROMPTS = [
    item.prompt for skill in EXPERTS["large"] for item in SKILLS[skill].sample("test", 10, seed=3)
]
MAX_TOKENS = 32
AT_ONCE = 16
END = "</s>"


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens` without that of its end, which `reason` tells of. `switched`: in the prompt, the
    share of groups of modules whose likeliest member is not the same at all tokens; the embedded
    engine's alone, and None for a base."""

    tokens: tuple[str, ...]
    logprob: float
    reason: str
    switched: float | None = None


class Embedded:
    """The embedded engine, with this gate or with the base alone; AT_ONCE prompts at a time."""

    def __init__(self, gate: Path | None) -> None:
        self._adapter = None if gate is None else verify_gate(gate, None, features=("gate",))
        settings = EmbeddedSettings(model=str(base_folder("large")), dtype="float32", threads=1)
        self._engine = EmbeddedEngine("here", settings)

    async def answers(self, prompts: list[str]) -> list[Answer]:
        await self._engine.start()
        try:
            await self._engine.prepare([] if self._adapter is None else [self._adapter])
            room = asyncio.Semaphore(AT_ONCE)
            return await asyncio.gather(*(self._answer(room, prompt) for prompt in prompts))
        finally:
            await self._engine.close()

    async def _answer(self, room: asyncio.Semaphore, prompt: str) -> Answer:
        asked = make_call(
            messages=(Message(role="user", content=prompt),),
            adapter=self._adapter,
            context_window=512,
            max_tokens=MAX_TOKENS,
            logprobs=0,
        )
        async with room:
            chunks = await gather(self._engine, replace(asked, gates="layers"))
        said = [token for chunk in chunks for token in chunk.logprobs]
        (reason,) = (chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None)
        trace = chunks[-1].gates
        return Answer(
            tuple(token.token for token in said),
            sum(token.logprob for token in said),
            reason,
            None if trace is None else switched(trace),
        )


def switched(trace: GateTrace) -> float:
    leading: dict[str, set[str]] = {}
    for token in trace.prompt:
        for group, weights in token.weights.items():
            leading.setdefault(group, set()).add(max(weights, key=weights.__getitem__))
    return sum(len(members) > 1 for members in leading.values()) / len(leading)


async def asked(url: str, model: Path, prompts: list[str], at_once: int) -> list[Answer]:
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, prompt: str) -> Answer:
        body = {
            "model": str(model),
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "logprobs": True,
        }
        async with room:
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        said = [token for token in choice["logprobs"]["content"] if token["token"] != END]
        tokens = tuple(token["token"] for token in said)
        logprob = sum(token["logprob"] for token in said)
        return Answer(tokens, logprob, choice["finish_reason"])

    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))


async def served(
    gate: Path, tmp_path: Path, args: dict[str, Any], plan: list[tuple[list[str], int]]
) -> list[list[Answer]]:
    """For each of `plan`, prompts and how many at once, the answers of one server."""
    folder = tmp_path / "model"
    write_vllm_folder(gate, base_folder("large"), folder, base_name=BASE)
    env = plugin_environment(tmp_path / "plugin")
    async with vllm_server(
        folder, log=tmp_path / "vllm.log", args=args, env=env, start_timeout_s=600
    ) as server:
        return [await asked(server.url, folder, *step) for step in plan]


def check(theirs: list[Answer], ours: list[Answer]) -> None:
    for part in ("tokens", "reason"):
        assert [getattr(their, part) for their in theirs] == [getattr(our, part) for our in ours]
    for their, our in zip(theirs, ours, strict=True):
        assert their.logprob == pytest.approx(our.logprob, abs=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "phatgoose",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("arrow", "softmax", "null", "top_p", "tsallis")
        ),
    ],
)
async def test_the_same_tokens_as_on_the_embedded_engine(kind: str, tmp_path: Path) -> None:
    gate = folder_of(tiny_gate(kind, times=3), tmp_path / "gate")
    ours = await Embedded(gate).answers(PROMPTS)
    assert len(ours) == 100
    assert sum((answer.switched or 0) >= 0.5 for answer in ours) >= 50
    first = PROMPTS[::10]
    base = await Embedded(None).answers(first)
    changed = [own.tokens != our.tokens for own, our in zip(base, ours[::10], strict=True)]
    assert sum(changed) >= 5  # so that the gate matters
    together, alone = await served(gate, tmp_path, EAGER, [(PROMPTS, AT_ONCE), (first, 1)])
    check(together, ours)
    check(alone, ours[::10])


@pytest.mark.slow
async def test_compiled_it_answers_the_same(tmp_path: Path) -> None:
    gate = folder_of(tiny_gate("phatgoose", times=3), tmp_path / "gate")
    some = PROMPTS[::4]
    ours = await Embedded(gate).answers(some)
    (together,) = await served(gate, tmp_path, ARGS, [(some, AT_ONCE)])
    check(together, ours)


@pytest.mark.slow
async def test_a_gate_that_holds_back_is_the_base_alone(tmp_path: Path) -> None:
    made = tiny_gate("null", times=3)
    for layer in made.layers.values():
        assert layer.projection.bias is not None
        layer.projection.bias[-1] = 1e4
    gate = folder_of(made, tmp_path / "gate")
    some = PROMPTS[::10]
    base = await Embedded(None).answers(some)
    (answers,) = await served(gate, tmp_path, EAGER, [(some, AT_ONCE)])
    check(answers, base)
