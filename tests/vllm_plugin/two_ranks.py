"""Run by vLLM's interpreter: gated layers on two processes that share the model, against the whole
layers on one. Prints "equal" and the greatest difference, or fails.

    python two_ranks.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from composer.adapters.gates.files import GatedModule, gated_layer
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.vllm_plugin.linear import attach

WIDTH, HEAD, RANKS = 64, 16, (4, 0, 8)
CASES: list[tuple[Normalise, Selection]] = [
    ("standardised", Selection(top_k=2)),
    ("absolute", Selection(top_k=1)),
    ("none", Selection(temperature=0.5, null=True)),
]


def whole(
    d_in: int, d_out: int, seed: int, normalise: Normalise, selection: Selection
) -> GatedLayer:
    generator = torch.Generator().manual_seed(seed)
    outs = len(RANKS) + selection.null
    a = torch.randn(sum(RANKS), d_in, generator=generator) / d_in**0.5
    b = torch.randn(d_out, sum(RANKS), generator=generator)
    vectors = torch.randn(outs, d_in, generator=generator) / (
        1 if normalise == "standardised" else 8
    )
    rows = Projection.of(vectors, normalise).rows
    return gated_layer(Stacked(a, b, RANKS), rows, torch.zeros(outs), normalise, selection)


def run(rank: int, folder: str) -> None:
    os.environ["VLLM_DIST_IDENT"] = Path(folder).name  # of their shared memory
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"file://{folder}/meet", rank, "gloo")
        initialize_model_parallel(2)
        worst = max(difference(rank, *case) for case in CASES)
    if rank == 0:
        print(f"equal {worst:.2e}")


def difference(rank: int, normalise: Normalise, selection: Selection) -> float:
    """The greatest over layers of every kind, of which k and v have one head for two processes."""
    layers = {
        "qkv": (QKVParallelLinear(WIDTH, HEAD, 4, 1, bias=False), ["q", "k", "v"], [64, 16, 16]),
        "gate_up": (MergedColumnParallelLinear(WIDTH, [96, 96], bias=False), ["g", "u"], [96, 96]),
        "fused": (MergedColumnParallelLinear(WIDTH, [96, 96], bias=False), [], [192]),
        "up": (ColumnParallelLinear(WIDTH, 96, bias=False), [], [96]),
        "down": (RowParallelLinear(96, WIDTH, bias=False), [], [WIDTH]),
    }
    worst = 0.0
    for name, (layer, packed, widths) in layers.items():
        d_in = 96 if name == "down" else WIDTH
        x = torch.randn(10, d_in, generator=torch.Generator().manual_seed(7)) + 0.5
        modules = [f"m.{last}" for last in packed] or [f"m.{name}"]
        gates = {
            module: whole(d_in, width, seed, normalise, selection)
            for seed, (module, width) in enumerate(zip(modules, widths, strict=True))
        }
        if packed:
            gates.pop(modules[1])  # a module without a gate between or behind others
        told = {module: GatedModule(ranks=RANKS) for module in gates}
        layer.weight.data.zero_()
        gated = attach(f"m.{name}", layer, packed, told, normalise, selection)
        for module, one in gates.items():
            gated.load(module, "a", one.stacked.a)
            gated.load(module, "b", one.stacked.b)
            gated.load(module, "rows", one.projection.rows)
        for part in layer.modules():
            if (method := getattr(part, "quant_method", None)) is not None:
                method.process_weights_after_loading(part)
        own = x[:, rank * 48 : (rank + 1) * 48] if name == "down" else x
        got = layer(own)[0]
        want = [
            gates[module].delta(x) if module in gates else torch.zeros(10, width)
            for module, width in zip(modules, widths, strict=True)
        ]
        if name == "down":
            expected = want[0]
        else:
            pieces = [p for one in want for p in (one.split(96, -1) if name == "fused" else [one])]
            expected = torch.cat([shard(p, rank, name, i) for i, p in enumerate(pieces)], dim=-1)
        assert got.shape == expected.shape, (name, got.shape, expected.shape)
        worst = max(worst, float((got - expected).abs().max()))
        assert worst < 1e-4, (name, normalise, worst)
        assert float(expected.abs().max()) > 0.1, name
    return worst


def shard(piece: torch.Tensor, rank: int, name: str, index: int) -> torch.Tensor:
    if name == "qkv" and index > 0:  # one head, which both have
        return piece
    width = piece.shape[-1] // 2
    return piece[:, rank * width : (rank + 1) * width]


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    mp.spawn(run, (sys.argv[1],), nprocs=2)
