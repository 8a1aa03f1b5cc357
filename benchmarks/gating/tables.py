"""The figures of ways of mixing as Markdown: mean ± half of the 95 % interval over seeds. Knows no
way and no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
ADAPTER, MIX = "oracle adapter", "oracle mix"
"""The rows that gates are measured against, held in and on composites."""

Figures = Mapping[str, Sequence[Mapping[str, float | None]]]
"""Row → its figures for each seed, shares from 0 to 1."""


def merged(files: Sequence[Path], sorts: Mapping[str, str]) -> str:
    """The table of runs of rows apart. Raises SystemExit where they were asked other questions."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = {name: values for run in runs for name, values in run["found"].items() if values}
    if len({tuple(run["asked"]) for run in runs}) > 1 or len({len(v) for v in found.values()}) > 1:
        raise SystemExit("these runs have other questions or seeds; merge runs of the same options")
    return markdown(sorts, found, runs[0]["asked"])


def markdown(sorts: Mapping[str, str], found: Figures, asked: Sequence[int]) -> str:
    """`sorts`: row → "query", "token" or "ceiling", in the table's order; those not in `found` are
    left out. `asked`: how many held-in questions and composites. A second table says what share of
    its ceiling each gate has, where the ceilings were measured."""
    seeds = len(next(iter(found.values())))
    lines = [
        f"{seeds} seeds; {asked[0]} held-in questions and {asked[1]} composites of unseen pairs "
        "each; mean ± half of the 95 % interval over seeds, in %.",
        "",
        "| way | decides per | held in | composites | routing, held in | routing, composites | "
        "extra FLOPs |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in sorts:
        if name not in found:
            continue
        cells = [
            _spread([one[key] for one in found[name]])
            for key in ("held_in", "composite", "routing_held_in", "routing_composite")
        ]
        flops = found[name][0]["flops"] or 0.0
        lines.append(f"| {name} | {sorts[name]} | {' | '.join(cells)} | {100 * flops:.1f} % |")
    if {ADAPTER, MIX} <= set(found) and "query" in {sorts[name] for name in found}:
        lines += ["", *_shares(sorts, found)]
    return "\n".join(lines)


def _shares(sorts: Mapping[str, str], found: Figures) -> list[str]:
    """Quotients and differences are taken seed by seed."""

    def of(name: str, key: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([one[key] for one in found[name]], np.float64)

    queries = [name for name in found if sorts[name] == "query"]
    best = max(queries, key=lambda name: of(name, "composite").mean())
    lines = [
        f"| gate | held in, of the {ADAPTER} | composites, of the {MIX} | "
        f"composites, points above {best} |",
        "|---|---:|---:|---:|",
    ]
    for name in sorts:
        if name in found and sorts[name] == "token":
            cells = [
                of(name, "held_in") / of(ADAPTER, "held_in"),
                of(name, "composite") / of(MIX, "composite"),
                of(name, "composite") - of(best, "composite"),
            ]
            told = " | ".join(_spread(cell.tolist()) for cell in cells)
            lines.append(f"| {name} | {told} |")
    return lines


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = 100 * float(np.mean(known))
    if len(known) < 2:
        return f"{mean:.1f}"
    wide = student.ppf(0.5 + LEVEL / 2, len(known) - 1) * np.std(known, ddof=1) / len(known) ** 0.5
    return f"{mean:.1f} ± {100 * wide:.1f}"
