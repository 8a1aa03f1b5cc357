"""A gated layer alone at real sizes, against the layer without it and with one LoRA.

    python benchmarks/stacked_layer.py [--device cuda] [--dtype float32] [--compile] [--members 8]

base: x·Wᵀ of a square layer. one LoRA: that and one adapter's two products. gated: that and the
stacked adapters of all members with their gate (`composer.vllm_plugin.layer`, what vLLM runs):
standardised rows in float32, the two likeliest members of each token. Random numbers; what they are
changes no time. Each round times the three one after the other, so that a busy machine slows all of
them; given are the medians of the rounds, and the median of the rounds' ratios. On CUDA by events,
the cache emptied by a write of 256 MB before each. A row that takes longer than --limit-s in all is
left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, Row, add_arguments
from composer.adapters.gates.files import GatedModule
from composer.adapters.gates.selection import Selection
from composer.vllm_plugin.layer import GatedLinear, Part

Layer = Callable[[Tensor], Tensor]

COLUMNS = ("d", "members", "tokens", "base_ms", "lora_ms", "gated_ms", "gated/lora", "gated/base",
           "rounds")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, quick="one width, two token counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--width", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--members", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, as vLLM runs it"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-s", type=float, default=60.0)
    args = parser.parse_args()
    if args.quick:
        args.width, args.tokens = args.width[:1], args.tokens[:2]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}", flush=True)
    rows = []
    for width in args.width:
        for members in args.members:
            for tokens in args.tokens:
                with torch.inference_mode():
                    rows.append(_measured(args, width, members, tokens))
                print(_line(rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _measured(args: argparse.Namespace, width: int, members: int, tokens: int) -> Row:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * scale
        return drawn.to(args.device, dtype)

    x, w = normal(tokens, width), normal(width, width, scale=width**-0.5)
    a, b = normal(args.rank, width, scale=width**-0.5), normal(width, args.rank, scale=0.01)
    gated = _gate(width, members, args.rank, dtype, generator).to(args.device)

    def base(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w)

    def one_lora(x: Tensor) -> Tensor:
        linear = torch.nn.functional.linear
        return linear(x, w) + linear(linear(x, a), b)

    def mixed(x: Tensor) -> Tensor:
        return gated(x, torch.nn.functional.linear(x, w))

    layers: list[Layer] = [base, one_lora, mixed]
    if args.compile:
        layers = [torch.compile(layer, dynamic=False) for layer in layers]
    clock = _cuda_clock() if args.device.startswith("cuda") else _cpu_clock()
    row: dict[str, object] = {"d": width, "members": members, "tokens": tokens}
    first = 0.0
    for layer in layers:
        layer(x)  # compiles, and picks its kernels
        first += clock(layer, x)
        if 3 * first > args.limit_s:
            break
    rounds = min(args.rounds, int(args.limit_s / first))
    if rounds < 3:
        CONSOLE.print(f"left out: {row}, {first:.1f} s a round")
        return row | {"rounds": 0}
    times = [[clock(layer, x) for layer in layers] for _ in range(rounds)]
    columns = list(zip(*times, strict=True))
    for name, column in zip(("base_ms", "lora_ms", "gated_ms"), columns, strict=True):
        row[name] = 1000 * statistics.median(column)
    row["gated/lora"] = statistics.median(one[2] / one[1] for one in times)
    row["gated/base"] = statistics.median(one[2] / one[0] for one in times)
    return row | {"rounds": rounds}


def _gate(
    width: int, members: int, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> GatedLinear:
    selection = Selection(top_k=2)
    part = Part(width, GatedModule(ranks=(rank,) * members))
    layer = GatedLinear(width, [part], "standardised", dtype, selection=selection)
    for name, shape in layer.shapes(0).items():
        layer.fill(0, name, torch.randn(*shape, generator=generator) * width**-0.5)
    return layer


def _cpu_clock() -> Callable[[Layer, Tensor], float]:
    def seconds(layer: Layer, x: Tensor) -> float:
        began = perf_counter()
        layer(x)
        return perf_counter() - began

    return seconds


def _cuda_clock() -> Callable[[Layer, Tensor], float]:
    cache = torch.empty(64 * 2**20, dtype=torch.float32, device="cuda")

    def seconds(layer: Layer, x: Tensor) -> float:
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begun.record()
        layer(x)
        done.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(done)) / 1000

    return seconds


def _line(row: Row) -> str:
    cells = (row.get(name) for name in COLUMNS)
    told = ("–" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells)
    return f"| {' | '.join(told)} |"


if __name__ == "__main__":
    main()
