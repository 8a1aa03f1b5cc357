"""Throughput of gates on the real vLLM (its CPU build) against the base model and one LoRA.

    python benchmarks/gated_vllm.py [--eager] [--members 2 4 8 16] [--hidden 2048 --layers 4]

Needs `make vllm` (or COMPOSER_VLLM_PYTHON). A Llama of random weights (0.33 billion parameters as
it stands), adapters of rank 16 on all its linear layers, a gate that picks two members for each
token and layer (PHATGOOSE's: standardised, in float32). Each model is served by a process of its
own; all of them are started first and then asked in turn, round after round, so that what else runs
on the machine slows all alike. An answer is --answer tokens of any kind, after a prompt of 16.
Given are medians over rounds of tokens/s at 1 and 16 requests at once and of the milliseconds of
one forward pass, and the medians of each round's ratios. With `--enable-lora` vLLM's CPU build runs
eager, whatever it is told: "one LoRA" is eager in both modes. adapters_mb: what the adapters take
as they are served (stacked, with their gate); members_mb: the same as files of their own, summed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, Row, add_arguments, progress
from composer.adapters.factors import Factors, Lora, write_lora
from composer.adapters.gates.files import (
    TENSORS,
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
from composer.adapters.gates.vllm_folder import FOLDER, write_vllm_folder
from tests.vllm import ENVIRONMENT, plugin_environment, python

RANK = 16
AT_ONCE = (1, 16)
WORKER = Path(__file__).with_name("gated_vllm_worker.py")


class Served:
    """A model in a process of vLLM's interpreter."""

    def __init__(self, name: str, told: dict[str, Any], env: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self.rounds: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [python(), str(WORKER), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=env,
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return answer
        end = self.log.read_text()[-3000:]
        raise SystemExit(f"{self.name} ended; its log ends in:\n{end}")

    def ask(self, at_once: int, tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"at_once": at_once, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self.wait()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def save_base(folder: Path, hidden: int, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=32000,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return model


def random_lora(model: LlamaForCausalLM, seed: int, dtype: torch.dtype) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            a = torch.randn(RANK, module.in_features, generator=generator) * 0.02
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.02
            modules[name] = Factors(a.to(dtype), b.to(dtype))
    return Lora(modules, "random", f"sha256:{seed}")


def save_gate(folder: Path, loras: list[Lora], dtype: torch.dtype) -> Path:
    selection = Selection(top_k=2)
    layers, told = {}, {}
    for name in loras[0].modules:
        stacked = Stacked.of([lora.modules[name] for lora in loras], dtype)
        rows = Projection.of(torch.randn(len(loras), stacked.a.shape[1]), "standardised").rows
        layers[name] = gated_layer(stacked, rows, None, "standardised", selection)
        told[name] = GatedModule(ranks=stacked.ranks)
    names = [f"m{i}" for i in range(len(loras))]
    manifest = Manifest(
        kind="phatgoose",
        base=None,
        members=members_of(names, [lora.digest for lora in loras]),
        normalise="standardised",
        selection=selection,
        modules=told,
    )
    folder.mkdir()
    write_gate(folder, Gate(manifest, layers))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, quick="a small model, two rounds: shows that it runs, measures nothing")
    parser.add_argument("--eager", action="store_true", help="else compiled, as vLLM's default is")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--answer", type=int, default=48, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.members, args.rounds = 256, 2, args.members[:1], 2
    with tempfile.TemporaryDirectory() as folder:
        rows = _measured(args, Path(folder))
    _print(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _measured(args: argparse.Namespace, folder: Path) -> list[Row]:
    dtype = getattr(torch, args.dtype)
    model = save_base(folder / "base", args.hidden, args.layers, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    CONSOLE.print(f"{count / 1e9:.2f} billion parameters")
    loras = [random_lora(model, seed, dtype) for seed in range(max(args.members))]
    (folder / "lora").mkdir()
    write_lora(folder / "lora", loras[0])
    one_mb = (folder / "lora" / "adapter_model.safetensors").stat().st_size / 2**20
    env = os.environ | ENVIRONMENT | plugin_environment(folder / "plugin")
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"OMP_NUM_THREADS": str(args.threads)}
    common = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    plans: list[tuple[str, dict[str, Any], float]] = [("base", {}, 0.0)]
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK, "enforce_eager": True}
    plans.append(("one LoRA", lora, one_mb))
    for members in args.members:
        gate = save_gate(folder / f"gate-{members}", loras[:members], dtype)
        write_vllm_folder(gate, folder / "base", folder / f"gated-{members}")
        tensors = folder / f"gated-{members}" / FOLDER / TENSORS
        plans.append((f"gated, {members}", {}, tensors.stat().st_size / 2**20))
    running: list[Served] = []
    try:
        with progress("starting", len(plans)) as done:
            for name, more, _ in plans:
                members = name.removeprefix("gated, ")
                path = folder / (f"gated-{members}" if members != name else "base")
                told = {"llm": common | more | {"model": str(path)}}
                if name == "one LoRA":
                    told["lora"] = str(folder / "lora")
                served = Served(name, told, env, folder / f"{path.name}-{len(running)}.log")
                running.append(served)
            for served in running:
                served.wait()
                done()
        with progress("rounds", args.rounds) as done:
            for _ in range(args.rounds):
                for served in running:
                    answers = {n: served.ask(n, args.answer) for n in AT_ONCE}
                    served.rounds.append(
                        {
                            f"{what}@{n}": answer[what]
                            for n, answer in answers.items()
                            for what in answer
                        }
                    )
                done()
    finally:
        for served in running:
            served.end()
    return [
        _row(served, running, megabytes, one_mb)
        for served, (_, _, megabytes) in zip(running, plans, strict=True)
    ]


def _row(served: Served, running: list[Served], megabytes: float, one_mb: float) -> Row:
    row: dict[str, Any] = {"model": served.name}
    for n in AT_ONCE:
        for what in ("tokens_per_s", "forward_ms"):
            row[f"{what}@{n}"] = statistics.median(one[f"{what}@{n}"] for one in served.rounds)
    for n in AT_ONCE:
        for other in running[:2]:
            pairs = zip(served.rounds, other.rounds, strict=True)
            key = f"tokens_per_s@{n}"
            row[f"×{other.name}@{n}"] = statistics.median(a[key] / b[key] for a, b in pairs)
    row["adapters_mb"] = megabytes
    number = served.name.removeprefix("gated, ")
    row["members_mb"] = one_mb * int(number) if number.isdigit() else megabytes
    return row


def _print(rows: list[Row]) -> None:
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |")
    print("|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        cells = (f"{c:.3g}" if isinstance(c, float) else str(c) for c in row.values())
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
