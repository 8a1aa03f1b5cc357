"""What `tolerance` costs in quality and saves in swaps, on recorded outcomes of real models.

    python benchmarks/tolerance.py [--rho SHARE] [--patience SHARE] [--json FILE] [--quick]

The seven models of the pool `small` of mmlu_pro (../shared/data) are experts on one device with
memory for any 1, 2 or 4 of them. The dev rows' questions arrive as a Poisson process, in several
rounds, each a shuffle of all; the service's own chooser (`composer.routing.choose`) gives each to a
model, knowing who is resident at that moment, and the service's own swap policy
(`composer.scheduling`) runs in simulation. Tolerance 0 is the same without that knowledge.

The router: a logistic regression per model from the question's embedding to whether the model
answers it, fitted on train rows; one regularisation for all, by log loss on held-out train rows.

quality: mean recorded score of the models chosen, all calls counted, refused ones too;
against_0: what that is above tolerance 0 on the same calls, with its 95 % interval (bootstrap over
questions). expected: the same as the router predicts it. changed: share of calls given to a
resident instead of the best model. run_s: how long the models chosen answer, on average. swap_s:
all loads and unloads, in seconds. p50 and p95: waits for a lease, in seconds. misses: calls refused
for their bound on waiting, or cut.

Assumed, not recorded: a load takes 1.5 s and the weights (bfloat16) at 4 GB/s, an unload 0.5 s and
a tenth of that, each the same every time; an answer its recorded characters / 4, at most 2048
tokens, at 50 tokens/s; 8 calls run at once on a model. The bound on waiting is that of
`benchmarks/swapping/workload.py`: twice the time to load every model once and do the work.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, SHARED, add_arguments, bootstrap, progress, show
from benchmarks.swapping.simulator import Job, Result, Workload, simulate
from composer.embedder import CHARS_PER_TOKEN, load_encoder
from composer.encoders import Encoder
from composer.routing.aims import Aim
from composer.routing.base import Scores
from composer.routing.choose import choose
from composer.scheduling.events import Model, Waiting
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings
from composer.settings import Settings
from composer.types import Component, FloatArray, Policy

TABLE = "mmlu_pro"
EMBEDDER = "all-MiniLM-L6-v2"
ROOMS = (1, 2, 4)
TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1)
ROUNDS = 5
PATIENCE: float = Settings.model_fields["patience"].default

DISK_GB_PER_S = 4.0
TOKENS_PER_S = 50.0
MAX_TOKENS = 2048
IN_FLIGHT = 8
SLACK = 2.0
INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)

WEIGHTS_GB = {
    "Meta-Llama-3.1-8B-Instruct": 16.1,
    "Mistral-7B-Instruct-v0.2": 14.5,
    "Phi-3-mini-4k-instruct": 7.6,
    "Qwen1.5-7B-Chat": 15.4,
    "Yi-6b-Chat": 12.1,
    "gemma-7b": 17.1,
    "mathstral-7B": 14.5,
}
"""Of the pool `small`, in bfloat16: parameters as their model cards give them, times two bytes."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Rows of a table for some models: `score` and `tokens` are (n, E)."""

    text: list[str]
    score: Floats
    tokens: Floats


def read(part: str, models: Sequence[str]) -> Outcomes:
    """Raises SystemExit, with the remedy, where the shared data are missing."""
    path = SHARED / f"{TABLE}.{part}.csv.gz"
    if not path.exists():
        raise SystemExit(f"{path} is not there; put the shared routing data beside the repository")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Outcomes(
        text=[row["query"] for row in rows],
        score=np.array([[float(row[f"score|{m}"]) for m in models] for row in rows]),
        tokens=np.minimum(
            [[float(row[f"out_chars|{m}"]) / 4 for m in models] for row in rows], MAX_TOKENS
        ),
    )


def embedded(texts: Sequence[str], encoder: Encoder, label: str) -> FloatArray:
    """(n, d), kept on disk: a few minutes for 7,000 questions the first time."""
    cut = [text[: CHARS_PER_TOKEN * encoder.max_tokens] for text in texts]
    digest = hashlib.sha256("\0".join([encoder.digest, *cut]).encode("utf-8", "surrogatepass"))
    kept = ROOT / ".cache" / "composer" / "vectors" / f"{digest.hexdigest()[:32]}.npy"
    if kept.exists():
        return np.asarray(np.load(kept), np.float32)
    rows = np.empty((len(cut), encoder.dim), np.float32)
    by_length = np.argsort([len(text) for text in cut], kind="stable")  # little padding
    step = 64
    with progress(label, len(cut)) as advance:
        for first in range(0, len(cut), step):
            some = by_length[first : first + step]
            rows[some] = encoder.encode([cut[i] for i in some])
            for _ in some:
                advance()
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.save(kept, rows)
    return rows


def predicted(train_x: FloatArray, score: Floats, x: FloatArray) -> tuple[FloatArray, float]:
    """(n, E) probability that each model answers each row of `x` (n, d), and the chosen inverse
    penalty. A fifth of the training rows is held out to choose it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(0)
    held = rng.permutation(len(train_x)) < len(train_x) // 5

    def fit(rows: FloatArray, right: Floats, to: FloatArray, c: float) -> FloatArray:
        columns = [
            LogisticRegression(C=c, max_iter=1000).fit(rows, right[:, e]).predict_proba(to)[:, 1]
            for e in range(right.shape[1])
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    def loss(c: float) -> float:
        found = fit(train_x[~held], score[~held], train_x[held], c)
        each = [log_loss(score[held, e], found[:, e]) for e in range(score.shape[1])]
        return float(np.mean(each))

    best = min(INVERSE_PENALTIES, key=loss)
    return fit(train_x, score, x, best), best


@dataclass(frozen=True, slots=True)
class Setting:
    """What does not depend on the tolerance: `quality` (q, E) is predicted, `outcomes` recorded;
    `asked` (n,) the question of each call."""

    models: tuple[Model, ...]
    quality: FloatArray
    outcomes: Outcomes
    asked: npt.NDArray[np.int64]
    workload: Workload


def device(names: Sequence[str], tokens: Floats) -> tuple[Model, ...]:
    models = []
    for number, name in enumerate(names):
        load = 1.5 + WEIGHTS_GB[name] / DISK_GB_PER_S
        models.append(
            Model(
                id=name,
                in_flight=IN_FLIGHT,
                queue=1_000_000,  # never full: only the bound on waiting refuses
                memory_gb=WEIGHTS_GB[name],
                load_s=load,
                unload_s=0.5 + 0.1 * load,
                run_s=float(tokens[:, number].mean()) / TOKENS_PER_S,
                movable=True,
            )
        )
    return tuple(models)


def arrivals(
    models: tuple[Model, ...],
    quality: FloatArray,
    outcomes: Outcomes,
    *,
    room: int,
    rho: float,
    rounds: int,
) -> Setting:
    """The same calls for every tolerance. Rate and bound follow from the traffic of tolerance 0,
    as in `benchmarks/swapping/workload.py`."""
    rng = np.random.default_rng([room, round(100 * rho)])
    n_questions = len(outcomes.text)
    asked = np.concatenate([rng.permutation(n_questions) for _ in range(rounds)])
    run_s = outcomes.tokens / TOKENS_PER_S
    favourite = quality.argmax(axis=1)
    rate = rho * IN_FLIGHT / run_s[np.arange(n_questions), favourite].mean()
    when = np.cumsum(rng.exponential(1 / rate, len(asked)))
    tails = np.percentile(run_s, 95, axis=0).sum()
    cycle = (sum(m.load_s + m.unload_s for m in models) + tails) / room
    bound = SLACK * cycle / (1 - rho / room)
    jobs = tuple(
        Job(Waiting(number, models[0].id, at, deadline=at + bound), 0.0)  # decided at its arrival
        for number, at in enumerate(when.tolist())
    )
    memory = room * max(model.memory_gb for model in models)
    workload = Workload(f"room {room}", models, memory, jobs, bound)
    return Setting(models, quality, outcomes, asked, workload)


@dataclass(frozen=True, slots=True)
class Run:
    """`chosen` (n,) is the number of each call's model; `changed` (n,) where that was not the
    best one because another was resident."""

    chosen: npt.NDArray[np.int64]
    changed: npt.NDArray[np.bool_]
    result: Result


def run(setting: Setting, tolerance: float, patience: float = PATIENCE) -> Run:
    names = tuple(model.id for model in setting.models)
    nothing = Component("none", None)
    policy = Policy("p", nothing, nothing, names, tolerance=tolerance)
    aim = Aim(0.0, np.zeros(len(names), np.float32))
    uncertainty = np.zeros(len(names), np.float32)
    run_s = setting.outcomes.tokens / TOKENS_PER_S
    number = {name: i for i, name in enumerate(names)}
    chosen = np.full(len(setting.asked), -1)
    changed = np.zeros(len(setting.asked), np.bool_)

    def decide(job: Job, resident: Callable[[str], bool]) -> Job:
        question = int(setting.asked[job.call.id])
        scores = Scores(names, setting.quality[question], uncertainty, {})
        loaded = np.array([resident(name) for name in names]) if tolerance > 0 else None
        plan = choose(scores, aim, policy, loaded)
        expert = number[plan.best]
        chosen[job.call.id] = expert
        changed[job.call.id] = plan.reasons["rule"] == "resident_within_tolerance"
        return Job(replace(job.call, model=plan.best), float(run_s[question, expert]))

    swapping = SwapPolicy(PolicySettings(patience=patience))
    result = simulate(swapping, setting.workload, decide=decide)
    return Run(chosen, changed, result)


def described(setting: Setting, runs: Sequence[Run], room: int) -> list[dict[str, Any]]:
    """A row per tolerance; the first run is the one that the others are compared with."""
    recorded, expected = (
        [values[setting.asked, run.chosen] for run in runs]
        for values in (setting.outcomes.score, setting.quality)
    )
    run_s = setting.outcomes.tokens / TOKENS_PER_S
    table = []
    for i, (tolerance, run) in enumerate(zip(TOLERANCES, runs, strict=True)):
        result = run.result
        gained = recorded[i] - recorded[0]
        low, high = bootstrap(gained, groups=setting.asked) if i else (None, None)
        table.append(
            {
                "room": room,
                "tolerance": tolerance,
                "quality": float(recorded[i].mean()),
                "against_0": float(gained.mean()) if i else None,
                "low": low,
                "high": high,
                "expected": float((expected[i] - expected[0]).mean()) if i else None,
                "changed": float(run.changed.mean()),
                "run_s": float(run_s[setting.asked, run.chosen].mean()),
                "swaps": result.swaps,
                "swap_s": round(result.swap_s),
                "swap_s_share": result.swap_s / runs[0].result.swap_s,
                "p50": round(result.p50, 1),
                "p95": round(result.p95, 1),
                "misses": result.misses,
                "calls": result.calls,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rho", type=float, default=0.6, help="load, of the swap-free capacity")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        help="of the swap policy; default: the service's",
    )
    add_arguments(parser)
    args = parser.parse_args()
    began = perf_counter()
    pools = json.loads((SHARED / "pools.json").read_text()) if SHARED.is_dir() else {}
    names = list(pools.get(TABLE, {}).get("small", WEIGHTS_GB))
    train, dev = read("train", names), read("dev", names)
    encoder = load_encoder(EMBEDDER, backend="auto", cache_dir=ROOT / ".cache" / "composer")
    vectors = [
        embedded(part.text, encoder, label) for part, label in ((train, "train"), (dev, "dev"))
    ]
    quality, penalty = predicted(vectors[0], train.score, vectors[1])
    models = device(names, train.tokens)

    best = int(train.score.mean(axis=0).argmax())
    routed = dev.score[np.arange(len(dev.text)), quality.argmax(axis=1)].mean()
    print(
        f"C {penalty:g}; dev rows: best single model on train ({names[best]}) "
        f"{dev.score[:, best].mean():.4f}, router {routed:.4f}, "
        f"oracle {dev.score.max(axis=1).mean():.4f}"
    )
    table: list[dict[str, Any]] = []
    for room in ROOMS:
        setting = arrivals(
            models, quality, dev, room=room, rho=args.rho, rounds=1 if args.quick else ROUNDS
        )
        runs = [run(setting, tolerance, args.patience) for tolerance in TOLERANCES]
        table += described(setting, runs, room)
    title = f"Tolerance for residents, ρ {args.rho:g}, patience {args.patience:g}"
    show(table, args, title=title)
    print(f"{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
