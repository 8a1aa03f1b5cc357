"""Trains the tokenizer, the bases and the experts, measures them and writes their cards.

    python examples/tiny/train.py                  everything, two processes, one thread each
    python examples/tiny/train.py --keep-bases     only the experts, on the bases as they are
    python examples/tiny/train.py --cards          only the cards, from results.json

A fixed seed gives the same text and the same starting weights; the trained weights are the same
bit for bit on the same processor and versions only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from typing import Any

# Before torch is loaded: one thread per process, which also keeps sums in a fixed order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from examples.tiny import cards, experts, modeling, pretraining, training
from examples.tiny.tasks import SKILLS

SEED = 0
BASE_STEPS = {"large": 2600, "small": 2000}
SECOND_STAGE_STEPS, SECOND_STAGE_COPYING = 250, 3.0
EXPERT_STEPS = dict.fromkeys(SKILLS, 300) | {
    "add": 600,
    "capital": 700,
    "count-letter": 1200,
}
N_OWN, N_OTHERS = 200, 50

Report = Callable[[str, int, int, str], None]  # task, steps done, steps in all, note


def train_base(size: str, root: Path, report: Report) -> dict[str, Any]:
    """Pre-trains a base in two stages, saves it, and gives its figures (accuracies apart)."""
    tokenizer = modeling.make_tokenizer()
    model = modeling.make_base(size, tokenizer, SEED)
    total = BASE_STEPS[size] + SECOND_STAGE_STEPS
    started = time.monotonic()

    def stage(name: str, steps: int, before: int, copying: float, learning_rate: float) -> float:
        rng = random.Random(name)
        return training.train(
            model,
            training.batches(
                lambda: pretraining.example(rng, copying=copying),
                tokenizer,
                tokens=2500,
                rng=random.Random(f"{name}/order"),
            ),
            steps,
            matrix_lr=learning_rate,
            other_lr=learning_rate,
            on_step=lambda step, loss: report(
                f"{size} base", before + step + 1, total, f"loss {loss:.3f}"
            ),
        )

    first = BASE_STEPS[size]
    stage(f"{SEED}/base/{size}", first, 0, 1.0, 3e-3)
    loss = stage(f"{SEED}/base/{size}/2", SECOND_STAGE_STEPS, first, SECOND_STAGE_COPYING, 1e-3)
    experts.save_base(model, tokenizer, experts.base_folder(size, root))
    return {"steps": total, "loss": loss, "seconds": time.monotonic() - started}


def measure_base(size: str, root: Path, report: Report) -> dict[str, Any]:
    """Size, digest and accuracy per skill of a saved base."""
    model, tokenizer = experts.load_base(size, root)
    accuracies = {}
    for i, skill in enumerate(SKILLS.values()):
        report(f"{size} base, measured", i, len(SKILLS), skill.id)
        accuracies[skill.id] = experts.canonical_accuracy(model, tokenizer, skill, N_OWN)
    report(
        f"{size} base, measured",
        len(SKILLS),
        len(SKILLS),
        f"at most {max(accuracies.values()):.2f}",
    )
    return {
        "n": N_OWN,
        "skills": accuracies,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "sha256": cards.sha256(experts.base_folder(size, root) / "model.safetensors"),
    }


def measure_expert(size: str, skill_id: str, root: Path, report: Report) -> dict[str, Any]:
    """Accuracy of a saved expert on its own skill and on the others', and its digest."""
    model, tokenizer = experts.load_expert(size, skill_id, root)
    prompt = experts.wordings(skill_id).prompt
    skill, name = SKILLS[skill_id], f"{size} {skill_id}, measured"
    own = {
        "n": len(skill.sample("test", N_OWN, 0)),
        "canonical": experts.canonical_accuracy(model, tokenizer, skill, N_OWN),
        "wording": experts.wording_accuracy(model, tokenizer, skill, prompt, N_OWN),
    }
    others = {}
    for i, other in enumerate(other for other in SKILLS.values() if other.id != skill_id):
        report(name, i, len(SKILLS) - 1, other.id)
        others[other.id] = {
            "canonical": experts.canonical_accuracy(model, tokenizer, other, N_OTHERS),
            "wording": experts.wording_accuracy(model, tokenizer, other, prompt, N_OTHERS),
        }
    worst = max(value for figures in others.values() for value in figures.values())
    note = f"own {own['canonical']:.3f}, worded {own['wording']:.3f}, others at most {worst:.2f}"
    report(name, len(SKILLS) - 1, len(SKILLS) - 1, note)
    weights = experts.expert_folder(size, skill_id, root) / "adapter_model.safetensors"
    return {"own": own, "others": others, "n_others": N_OTHERS, "sha256": cards.sha256(weights)}


def run_track(
    size: str,
    root: Path,
    keep_base: dict[str, Any] | None,
    keep_experts: dict[str, Any],
    skills: tuple[str, ...],
    events: Queue[tuple[str, int, int, str]],
) -> dict[str, Any]:
    """One base and its experts, from training to cards; runs in a process of its own.

    Args:
        keep_base: figures of the base already there, or None to train it.
        keep_experts: figures of experts already there, which are measured again only.

    Returns:
        ``{"base": figures, "experts": {skill: figures}}``
    """
    torch.set_num_threads(1)
    disable_progress_bar()  # of transformers' own loading and saving
    os.nice(5)

    def report(task: str, done: int, total: int, note: str) -> None:
        if done % 20 == 0 or done == total or total < 20:  # each event crosses processes
            events.put((task, done, total, note))

    base = dict(keep_base or train_base(size, root, report))
    base |= measure_base(size, root, report)
    cards.write_all(root, {"bases": {size: base}, "experts": {}})
    results: dict[str, Any] = {}
    for skill_id in skills:
        folder = experts.expert_folder(size, skill_id, root)
        if skill_id in keep_experts:
            seconds = keep_experts[skill_id]["seconds"]
        else:
            model, tokenizer = experts.load_base(size, root)
            steps, name = EXPERT_STEPS[skill_id], f"{size} {skill_id}"
            started = time.monotonic()

            def on_step(step: int, loss: float, name: str = name, steps: int = steps) -> None:
                report(name, step + 1, steps, f"loss {loss:.3f}")

            trained = experts.train_expert(model, tokenizer, SKILLS[skill_id], steps, SEED, on_step)
            seconds = time.monotonic() - started
            experts.save_expert(trained, size, folder)
        figures = measure_expert(size, skill_id, root, report) | {"seconds": seconds}
        cards.write_all(root, {"bases": {}, "experts": {f"{size}/{skill_id}": figures}})
        results[skill_id] = figures
    return {"base": base, "experts": results}


def _kept(
    root: Path, keep_bases: bool, keep_experts: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of what stays as it is, from results.json."""
    if not (keep_bases or keep_experts):
        return {}, {}
    try:
        results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{root}/results.json is missing: run once without --keep-…") from None
    return results["bases"], results["experts"] if keep_experts else {}


def main() -> None:
    """The command line: see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=experts.HERE, help="where to write")
    parser.add_argument(
        "--jobs", type=int, choices=(1, 2), default=2, help="processes, one thread each"
    )
    parser.add_argument("--only", nargs="+", choices=list(SKILLS), help="these experts alone")
    parser.add_argument("--sizes", nargs="+", choices=list(BASE_STEPS), default=list(BASE_STEPS))
    parser.add_argument("--keep-bases", action="store_true", help="train the experts only")
    parser.add_argument("--keep-experts", action="store_true", help="measure them again only")
    parser.add_argument("--cards", action="store_true", help="write cards from results.json only")
    args = parser.parse_args()
    root: Path = args.out
    if args.cards:
        cards.write_all(root, json.loads((root / "results.json").read_text(encoding="utf-8")))
        return
    bases, kept = _kept(root, args.keep_bases or args.keep_experts, args.keep_experts)

    results_path = root / "results.json"
    results: dict[str, Any] = {"seed": SEED, "bases": {}, "experts": {}}
    if results_path.exists():
        results = json.loads(results_path.read_text(encoding="utf-8"))
    context = multiprocessing.get_context("spawn")
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
        ) as progress,
    ):
        events: Queue[tuple[str, int, int, str]] = manager.Queue()
        tracks = {
            size: pool.submit(
                run_track,
                size,
                root,
                bases.get(size),
                {k.partition("/")[2]: v for k, v in kept.items() if k.startswith(size + "/")},
                tuple(s for s in experts.EXPERTS[size] if not args.only or s in args.only),
                events,
            )
            for size in args.sizes
        }
        bars: dict[str, Any] = {}
        while not all(track.done() for track in tracks.values()) or not events.empty():
            try:
                task, done, total, note = events.get(timeout=0.5)
            except Empty:
                continue
            if task not in bars:
                bars[task] = progress.add_task(task, total=total, note=note)
            progress.update(bars[task], completed=done, note=note)
        for size, track in tracks.items():
            figures = track.result()
            results["bases"][size] = figures["base"]
            results["experts"] |= {f"{size}/{k}": v for k, v in figures["experts"].items()}
    cards.write_results(results_path, results)


if __name__ == "__main__":
    main()
