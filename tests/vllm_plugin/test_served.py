"""Gates on the real vLLM (its CPU build), through its OpenAI server, against a transformers model
whose layers have the same gates by hooks. Everything in float32 and greedy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.adapters.gates.files import Gate
from composer.adapters.gates.vllm_folder import write_vllm_folder
from examples.tiny.experts import EXPERTS, base_folder
from examples.tiny.tasks import SKILLS
from tests.vllm import plugin_environment, vllm_marks, vllm_server
from tests.vllm_gates import BASE, folder_of, reference_hooks, tiny_gate

pytestmark = vllm_marks

ARGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16}
EAGER = ARGS | {"enforce_eager": True}
PROMPTS = [
    item.prompt for skill in EXPERTS["large"] for item in SKILLS[skill].sample("test", 10, seed=3)
]
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]
    logprob: float


class Reference:
    """The model in transformers. `switched`: of each prompt, the share of gated layers whose
    likeliest member is not the same at all of its tokens."""

    def __init__(self, gate: Gate | None) -> None:
        folder = base_folder("large")
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model: Any = model.eval()
        self._leading: dict[str, torch.Tensor] = {}
        if gate is not None:
            for name, layer in gate.layers.items():
                model.get_submodule(name).register_forward_hook(self._watch(name, layer))
            reference_hooks(model, gate)
        self.switched: list[float] = []

    def _watch(self, name: str, layer: Any) -> Any:
        def look(_: Any, inputs: tuple[torch.Tensor], __: Any) -> None:
            if inputs[0].shape[1] > 1:  # the prompt, not a token of the answer
                self._leading[name] = layer.weights(inputs[0])[0].argmax(-1)

        return look

    @torch.inference_mode()
    def answer(self, prompt: str) -> Answer:
        ids = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        made = self._model.generate(
            ids,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = made.sequences[0, ids.shape[1] :].tolist()
        steps = zip(made.logits, new, strict=True)
        logprob = sum(float(torch.log_softmax(step[0], -1)[token]) for step, token in steps)
        if self._leading:
            several = [len(leading.unique()) > 1 for leading in self._leading.values()]
            self.switched.append(sum(several) / len(several))
        return Answer(tuple(new), logprob)


async def asked(url: str, model: Path, prompts: list[str], at_once: int) -> list[Answer]:
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, prompt: str) -> Answer:
        body = {
            "model": str(model),
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "logprobs": True,
            "return_token_ids": True,
        }
        async with room:
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        logprob = sum(token["logprob"] for token in choice["logprobs"]["content"])
        return Answer(tuple(choice["token_ids"]), logprob)

    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))


async def served(
    gate: Gate, tmp_path: Path, args: dict[str, Any], plan: list[tuple[list[str], int]]
) -> list[list[Answer]]:
    """For each of `plan`, prompts and how many at once, the answers of one server."""
    folder = tmp_path / "model"
    write_vllm_folder(
        folder_of(gate, tmp_path / "gate"), base_folder("large"), folder, base_name=BASE
    )
    env = plugin_environment(tmp_path / "plugin")
    async with vllm_server(
        folder, log=tmp_path / "vllm.log", args=args, env=env, start_timeout_s=600
    ) as server:
        return [await asked(server.url, folder, *step) for step in plan]


def check(theirs: list[Answer], ours: list[Answer]) -> None:
    assert [answer.tokens for answer in theirs] == [answer.tokens for answer in ours]
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
async def test_the_same_tokens_as_the_reference(kind: str, tmp_path: Path) -> None:
    gate = tiny_gate(kind, times=3)
    reference = Reference(gate)
    ours = [reference.answer(prompt) for prompt in PROMPTS]
    assert len(ours) == 100
    assert sum(share >= 0.5 for share in reference.switched) >= 50
    base = Reference(None)
    first = PROMPTS[::10]
    both = zip(first, ours[::10], strict=True)
    changed = [base.answer(prompt).tokens != our.tokens for prompt, our in both]
    assert sum(changed) >= 5  # so that the gate matters
    together, alone = await served(gate, tmp_path, EAGER, [(PROMPTS, 16), (first, 1)])
    check(together, ours)
    check(alone, ours[::10])


@pytest.mark.slow
async def test_compiled_it_answers_the_same(tmp_path: Path) -> None:
    gate = tiny_gate("phatgoose", times=3)
    reference = Reference(gate)
    some = PROMPTS[::4]
    ours = [reference.answer(prompt) for prompt in some]
    (together,) = await served(gate, tmp_path, ARGS, [(some, 16)])
    check(together, ours)


@pytest.mark.slow
async def test_a_gate_that_holds_back_is_the_base_alone(tmp_path: Path) -> None:
    gate = tiny_gate("null", times=3)
    for layer in gate.layers.values():
        assert layer.projection.bias is not None
        layer.projection.bias[-1] = 1e4
    base = Reference(None)
    some = PROMPTS[::10]
    (answers,) = await served(gate, tmp_path, EAGER, [(some, 16)])
    check(answers, [base.answer(prompt) for prompt in some])
