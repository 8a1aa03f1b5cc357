"""Composing an adapter at a real size: 8 members of rank 16 for a 4096-wide, 32-layer model.

    python benchmarks/composing.py > benchmarks/results/composing.md

Random weights in bfloat16 on q, k, v and o. Prints how long building, reading and using it a second
time take, each in a fresh process with warm files (the page cache holds them, as on a machine that
serves them) and as the median of some runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from composer.adapters.compose import compose
from composer.adapters.factors import Factors, Lora, read_lora, write_lora
from composer.adapters.files import WEIGHTS
from composer.adapters.recipe import Member, Recipe

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="A small model, to see that it runs.")
    parser.add_argument("--json", type=Path, help="Also write the figures here.")
    parser.add_argument("--one", nargs=2, metavar=("MEMBERS", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(once(*map(Path, given.one))))
        return
    if given.quick:
        given.width, given.layers, given.runs = 256, 4, 2
    with tempfile.TemporaryDirectory() as scratch:
        members = Path(scratch, "members")
        for number in range(given.members):
            write_member(members / f"m{number}", number, given.rank, given.width, given.layers)
        runs = [run(members, Path(scratch, f"out{n}")) for n in range(given.runs)]
    table(given, runs)
    if given.json:
        given.json.write_text(json.dumps(runs, indent=2) + "\n")


def write_member(folder: Path, seed: int, rank: int, width: int, layers: int) -> None:
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(layers):
        for target in TARGETS:
            a = torch.randn(rank, width, generator=make).bfloat16()
            b = torch.randn(width, rank, generator=make).bfloat16()
            modules[f"model.layers.{layer}.self_attn.{target}"] = Factors(a, b, 2.0)
    folder.mkdir(parents=True)
    write_lora(folder, Lora(modules, "a-model"))


def run(members: Path, out: Path) -> dict[str, Any]:
    """In a process of its own, so that nothing is warm in it but its imports."""
    command = [sys.executable, __file__, "--one", str(members), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def once(members: Path, out: Path) -> dict[str, Any]:
    folders = sorted(members.iterdir())

    def recipe(weights: list[float]) -> Recipe:
        parts = zip(folders, weights, strict=True)
        return Recipe(tuple(Member(f.name, f, w, digests[f]) for f, w in parts))

    began = time.perf_counter()
    digests = {folder: read_lora(folder).digest for folder in folders}  # as a registry verifies
    verified = time.perf_counter() - began
    even = [1 / len(folders)] * len(folders)
    busy = time.process_time()
    first = compose(recipe(even), out)
    busy = time.process_time() - busy
    again = compose(recipe(even), out)
    other = compose(recipe([1.0, *[0.0] * (len(folders) - 3), 0.5, 0.25]), out)
    assert first.built
    assert other.built
    assert not again.built
    began = time.perf_counter()
    with safe_open(first.folder / WEIGHTS, framework="pt") as file:
        loaded = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    load = time.perf_counter() - began
    return {
        "verified_s": verified,
        "build_s": first.seconds,
        "build_cpu_s": busy,
        "three_s": other.seconds,
        "again_s": again.seconds,
        "load_s": load,
        "mb": sum(t.numel() * t.element_size() for t in loaded.values()) / 1e6,
        "rank": first.rank,
        "member_mb": (folders[0] / WEIGHTS).stat().st_size / 1e6,
    }


def table(given: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    print("# Composing an adapter at a real size\n")
    print("`python benchmarks/composing.py > benchmarks/results/composing.md`\n")
    print(
        f"{given.members} members of rank {given.rank} ({runs[0]['member_mb']:.0f} MB each) on "
        f"{', '.join(TARGETS)} of a model {given.width} wide with {given.layers} layers; random "
        f"weights, bfloat16; {torch.get_num_threads()} thread(s); median of {given.runs} runs "
        "(least to most), each in a process of its own, files in the page cache. Seconds are "
        "those of the clock on a machine that may do other work.\n"
    )
    print("| | seconds |\n|---|---:|")
    rows = {
        "reading and hashing the members, once in a process (a registry does)": "verified_s",
        f"building: cat of {given.members} at rank {runs[0]['rank']}, "
        f"{runs[0]['mb']:.0f} MB, written and hashed": "build_s",
        "the same build in CPU seconds": "build_cpu_s",
        "building: three of them, for another query": "three_s",
        "second use of the same composition: no build": "again_s",
        "loading it as an engine does: mapped, each tensor copied": "load_s",
    }
    for words, key in rows.items():
        values = [run[key] for run in runs]
        print(f"| {words} | {median(key):.3f} ({min(values):.3f} to {max(values):.3f}) |")


if __name__ == "__main__":
    main()
