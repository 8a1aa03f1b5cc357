"""Run by vLLM's interpreter: a small random model of an architecture with a random gate, in vLLM
and in transformers with the gate by hooks. Prints "equal" and the greatest difference of an
answer's log-probability, or fails.

    python architectures.py ARCHITECTURE FOLDER [lora]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import torch
import transformers
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from composer.adapters.factors import Factors, Lora, write_lora
from composer.adapters.gates.files import (
    Gate,
    GatedModule,
    Manifest,
    gated_layer,
    members_of,
    write_gate,
)
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import Stacked
from composer.adapters.gates.vllm_folder import write_vllm_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # k and gate have none
RANKS = (4, 8, 2)
PROMPTS = [[(7 * i + 3 * j) % 190 + 5 for j in range(4 + i)] for i in range(12)]
TOKENS = 12


def factors(linear: torch.nn.Linear, rank: int, generator: torch.Generator) -> Factors:
    a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
    b = torch.randn(linear.out_features, rank, generator=generator)
    return Factors(a, b, 0.7)


def random_gate(linears: dict[str, torch.nn.Linear], generator: torch.Generator) -> Gate:
    selection = Selection(top_k=2)
    layers, told = {}, {}
    for name, linear in linears.items():
        own = [factors(linear, rank, generator) for rank in RANKS]
        own[0] = None if name.endswith("up_proj") else own[0]
        stacked = Stacked.of(own, torch.float32)
        vectors = torch.randn(len(RANKS), linear.in_features, generator=generator)
        rows = Projection.of(vectors, "standardised").rows
        layers[name] = gated_layer(stacked, rows, None, "standardised", selection)
        told[name] = GatedModule(ranks=stacked.ranks)
    manifest = Manifest(
        kind="phatgoose",
        base=None,
        members=members_of(["x", "y", "z"], ["1", "2", "3"]),
        normalise="standardised",
        selection=selection,
        modules=told,
    )
    return Gate(manifest, layers)


def added(delta: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda _, inputs, out: out + delta(inputs[0])


def main(architecture: str, folder: Path, with_lora: bool) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    own = {"head_dim": 32}  # not hidden / heads, which vLLM's Qwen2 alone takes for granted
    if architecture == "Qwen2ForCausalLM":
        own = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = model_class(model_class.config_class(**(SIZES | own))).float().eval()
    model.save_pretrained(folder / "base")
    linears = {n: m for n, m in model.named_modules() if n.endswith(TARGETS)}
    generator = torch.Generator().manual_seed(1)
    gate = random_gate(linears, generator)
    (folder / "gate").mkdir()
    write_gate(folder / "gate", gate)
    write_vllm_folder(folder / "gate", folder / "base", folder / "gated")
    lora = Lora({n: factors(m, 4, generator) for n, m in linears.items()}, "base")
    (folder / "lora").mkdir()
    write_lora(folder / "lora", lora)
    plain = answers(model)
    for name, linear in linears.items():
        linear.register_forward_hook(added(gate.layers[name].delta))
        if with_lora:
            own = lora.modules[name].delta()
            linear.register_forward_hook(added(lambda x, own=own: x @ own.T))
    ours = answers(model)
    assert sum(one[0] != other[0] for one, other in zip(plain, ours, strict=True)) > 6
    llm = LLM(
        str(folder / "gated"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        enable_lora=with_lora,
        max_lora_rank=8,
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    request = LoRARequest("one", 1, str(folder / "lora")) if with_lora else None
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    worst = 0.0
    for made, (tokens, logprob) in zip(
        llm.generate(prompts, params, lora_request=request), ours, strict=True
    ):
        assert list(made.outputs[0].token_ids) == tokens, (made.outputs[0].token_ids, tokens)
        worst = max(worst, abs(made.outputs[0].cumulative_logprob - logprob))
    assert worst < 1e-3, worst
    print(f"equal {worst:.2e}")


@torch.inference_mode()
def answers(model: Any) -> list[tuple[list[int], float]]:
    made = []
    for prompt in PROMPTS:
        ids, logprob = list(prompt), 0.0
        for _ in range(TOKENS):
            step = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
            ids.append(int(step.argmax()))
            logprob += float(step.max())
        made.append((ids[len(prompt) :], logprob))
    return made


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "lora" in sys.argv[3:])
