"""Swaps on one simulated device: ours against four other rules and against the exact optimum.

    python benchmarks/swaps.py [--part grid|windows|batch] [--jobs N] [--json FILE] [--quick]

**grid**: experts (4, 16, 64) × room (memory for 1, 2, 4 mean experts) × ρ (0.3, 0.6, 0.9) ×
arrivals (poisson, bursty), as benchmarks/swapping/workload.py says in full, with the same calls,
running times and bounds for all. Every rule is swept over its own knob; a point is (swap seconds
per 1,000 calls, p95 wait, share of misses), meaned over seeds. `least swaps`: per cell and rule
the fewest swap seconds among its points with at most 0.1 % misses, and that point's p95 wait;
`waits` is how many times the bound the calls' arrivals span (below about 2 the figures are those
of a beginning).
`dominated`: the share of a rule's points that do not lie below our curve. Our curve joins the
points of neighbouring knobs by lines (misses: the greater of the two); a point is below it where no
place on it has at most its swap seconds, at most its p95 wait (both within 3 %) and at most its
misses (within 0.1 %). The points that are not dominated are listed: there the other rule wins.

**windows**: 40 calls each, small enough for the exact optimum with all arrivals known
(benchmarks/swapping/optimum.py); ratio is mean swap seconds over the optimum's, over windows in
which the optimum serves every call. Others have the one knob that is best for them over all windows
at no more than 0.1 % misses.

**batch**: two-stage jobs; load seconds over the exact optimum's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONSOLE, add_arguments, bootstrap, progress, show
from benchmarks.swapping.batches import arrival_order, batch, grouped
from benchmarks.swapping.optimum import optimum
from benchmarks.swapping.points import MEANS, MISSES, Point, dominated, least_swaps
from benchmarks.swapping.rules import OURS, RULES
from benchmarks.swapping.simulator import Workload, simulate
from benchmarks.swapping.workload import Cell, grid, make, window
from composer.scheduling.batch_order import load_seconds, order

# --- the grid ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _made(cell: Cell, max_calls: int) -> Workload:
    return make(cell, max_calls=max_calls)


def run_point(task: tuple[Cell, str, float, int, int]) -> Point:
    cell, rule, knob, seeds, max_calls = task
    found = []
    for seed in range(seeds):
        work = _made(replace(cell, seed=seed), max_calls)
        result = simulate(RULES[rule][1](knob, work), work)
        thousand = len(work.jobs) / 1000
        found.append(
            (
                result.swap_s / thousand,
                result.swaps / thousand,
                result.miss_share,
                result.p50,
                result.p95,
                result.p99,
                work.max_wait_s,
                work.jobs[-1].call.arrived / (work.max_wait_s or math.inf),
                float(len(work.jobs)),
            )
        )
    means: dict[str, Any] = dict(zip(MEANS, np.mean(np.array(found), axis=0).tolist(), strict=True))
    return Point(cell.name, cell.rho, rule, knob, **means)


def sweep(
    cells: Sequence[Cell], *, seeds: int, max_calls: int, knobs: int | None, jobs: int
) -> list[Point]:
    tasks = []
    for cell in cells:
        for rule, (values, _) in RULES.items():
            chosen = values
            if knobs is not None:
                places = np.linspace(0, len(values) - 1, min(knobs, len(values))).round()
                chosen = [values[int(place)] for place in places]
            tasks += [(cell, rule, knob, seeds, max_calls) for knob in chosen]
    return parallel(run_point, tasks, "grid", jobs)


def parallel(work: Callable[[Any], Any], tasks: Sequence[Any], label: str, jobs: int) -> list[Any]:
    found = []
    with ProcessPoolExecutor(jobs) as pool, progress(label, len(tasks)) as advance:
        for result in pool.map(work, tasks):
            found.append(result)
            advance()
    return found


# --- windows against the optimum --------------------------------------------------------------


def run_window(seed: int) -> dict[str, Any]:
    work = window(seed)
    best = optimum(work)
    row: dict[str, Any] = {
        "seed": seed,
        "optimum": best.swap_s,
        "bound": best.bound_s,
        "must_miss": best.misses,
        "proven": best.proven,
        "results": {},
    }
    for rule, (knobs, policy) in RULES.items():
        for knob in knobs:
            result = simulate(policy(knob, work), work)
            row["results"][rule, knob] = (result.swap_s, result.misses, result.p95)
    return row


def against_optimum(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ratios to the bound that no plan is below, which is the optimum where it was proven."""
    free = [row for row in rows if row["must_miss"] == 0]
    bounds = np.array([row["bound"] for row in free])
    table = []
    for rule, (knobs, _) in RULES.items():
        candidates: list[dict[str, Any]] = []
        for knob in knobs:
            swaps, misses, waits = np.array(
                [row["results"][rule, knob] for row in free], dtype=float
            ).T
            calls = 40 * len(free)
            share = float(misses.sum() / calls)
            ratio = float(swaps.mean() / bounds.mean())
            low, high = bootstrap(
                np.stack([swaps, bounds], axis=1),
                statistic=lambda pairs: float(pairs[:, 0].mean() / pairs[:, 1].mean()),
            )
            candidates.append(
                {
                    "rule": rule,
                    "knob": knob if math.isfinite(knob) else "∞",
                    "windows": len(free),
                    "swap_s": float(swaps.mean()),
                    "optimum_s": float(bounds.mean()),
                    "ratio": ratio,
                    "low": low,
                    "high": high,
                    "misses": share,
                    "p95_wait_s": float(waits.mean()),
                }
            )
        if rule == OURS:
            table += candidates
        else:
            table.append(min(candidates, key=lambda c: (c["misses"] > MISSES, c["ratio"])))
    return table


# --- batches ------------------------------------------------------------------------------------


def run_batch(seed: int) -> dict[str, float]:
    work = batch(seed)
    args = (work.chains, work.models, work.memory_gb, work.resident)
    best = load_seconds(order(*args, exact_states=None), work.models)
    began = perf_counter()
    ours = load_seconds(order(*args), work.models)
    took = perf_counter() - began
    return {
        "optimum": best,
        "ours": ours,
        "seconds": took,
        "ours, local search alone": load_seconds(order(*args, exact_states=0), work.models),
        "grouped by stage and model": grouped(work),
        "arrival order": arrival_order(work),
    }


def batches(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    best = np.array([row["optimum"] for row in rows])
    some = best > 0
    table = []
    for name in rows[0]:
        if name in ("optimum", "seconds"):
            continue
        own = np.array([row[name] for row in rows])
        low, high = bootstrap(own[some] / best[some])
        table.append(
            {
                "order": name,
                "batches": len(rows),
                "load_s": float(own.mean()),
                "optimum_s": float(best.mean()),
                "ratio of means": float(own.mean() / best.mean()),
                "mean ratio": float((own[some] / best[some]).mean()),
                "low": low,
                "high": high,
                "worst": float((own[some] / best[some]).max()),
                "optimal": f"{np.mean(own <= best + 1e-6):.1%}",
                "slowest_s": max(row["seconds"] for row in rows) if name == OURS else None,
            }
        )
    return table


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("grid", "windows", "batch"), action="append")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--seeds", type=int, default=1, help="workloads per cell (1)")
    parser.add_argument("--max-calls", type=int, default=10_000, help="per workload (10000)")
    add_arguments(parser)
    args = parser.parse_args()
    parts = args.part or ["grid", "windows", "batch"]
    quiet = argparse.Namespace(json=None)
    note = " (quick: fewer)" if args.quick else ""
    everything: dict[str, Any] = {}
    began = perf_counter()
    if "grid" in parts:
        cells = grid()
        if args.quick:
            cells = [c for c in cells if c.experts == 16 and c.rho == 0.6]
        points = sweep(
            cells,
            seeds=args.seeds,
            max_calls=2500 if args.quick else args.max_calls,
            knobs=3 if args.quick else None,
            jobs=args.jobs,
        )
        least = least_swaps(points)
        shares, exceptions = dominated(points)
        show(least, quiet, title="Least swap seconds per 1,000 calls (p95 wait, s)" + note)
        show(shares, quiet, title="Points of other rules that are not below our curve" + note)
        if exceptions:
            show(exceptions, quiet, title="Where another rule wins" + note)
        everything |= {"points": [asdict(p) for p in points], "least_swaps": least}
        everything |= {"dominated": shares, "exceptions": exceptions}
    if "windows" in parts:
        windows = parallel(run_window, range(12 if args.quick else 240), "windows", args.jobs)
        table = against_optimum(windows)
        must = sum(row["must_miss"] > 0 for row in windows)
        proven = sum(row["proven"] for row in windows)
        title = (
            f"Windows of 40 calls against the optimum ({proven} of {len(windows)} proven; "
            f"{must} left out, where even the optimum misses calls)"
        )
        show(table, quiet, title=title + note)
        everything["windows"] = table
    if "batch" in parts:
        table = batches(parallel(run_batch, range(40 if args.quick else 240), "batch", args.jobs))
        show(table, quiet, title="Batches of two-stage jobs" + note)
        everything["batch"] = table
    CONSOLE.print(f"{perf_counter() - began:.0f} s")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(everything, indent=2).replace("Infinity", '"∞"')
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
