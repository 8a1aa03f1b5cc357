"""Trains the tokenizer, the bases and the experts, measures them and writes their cards.

    python examples/tiny/train.py                  everything, two processes, one thread each
    python examples/tiny/train.py --keep-bases     only the experts, on the bases as they are
    python examples/tiny/train.py --cards          only the cards, from results.json

What is mixed inside the model has a base and experts of its own, trained on from the large base:

    python examples/tiny/instructing.py            bases/instructed, four minutes
    python examples/tiny/mixing.py                 experts/instructed on it, five minutes

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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Queue

# Before torch is loaded: one thread per process, which also keeps sums in a fixed order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
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

Figures = cards.Figures
Report = Callable[[str, int, int, str], None]  # task, steps done, steps in all, note
Events = Queue[tuple[str, int, int, str]]  # what is reported, from process to process


def train_base(size: str, root: Path, report: Report) -> Figures:
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


def measure_base(size: str, root: Path, report: Report) -> Figures:
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


def measure_expert(size: str, skill_id: str, root: Path, report: Report) -> Figures:
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


def _start_job(events: Events) -> Report:
    """Prepares a process for its job, and gives what reports its progress."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of transformers' own loading and saving

    def report(task: str, done: int, total: int, note: str) -> None:
        if done % 20 == 0 or done == total or total < 20:  # each event crosses processes
            events.put((task, done, total, note))

    return report


def base_job(size: str, root: Path, kept: Figures | None, events: Events) -> Figures:
    """Trains a base (unless figures of the one already there are given), measures it."""
    report = _start_job(events)
    figures = dict(kept or train_base(size, root, report))
    return figures | measure_base(size, root, report)


def expert_job(
    size: str, skill_id: str, root: Path, kept: Figures | None, events: Events
) -> Figures:
    """Trains an expert (unless figures of the one already there are given), measures it."""
    report = _start_job(events)
    if kept is not None:
        seconds = kept["seconds"]
    else:
        model, tokenizer = experts.load_base(size, root)
        steps, name = EXPERT_STEPS[skill_id], f"{size} {skill_id}"
        started = time.monotonic()
        trained = experts.train_expert(
            model,
            tokenizer,
            SKILLS[skill_id],
            steps,
            SEED,
            on_step=lambda step, loss: report(name, step + 1, steps, f"loss {loss:.3f}"),
        )
        seconds = time.monotonic() - started
        experts.save_expert(trained, size, experts.expert_folder(size, skill_id, root))
    return measure_expert(size, skill_id, root, report) | {"seconds": seconds}


def run(args: argparse.Namespace, pool: ProcessPoolExecutor, events: Events, show: Report) -> None:
    """Runs the jobs, each base's experts after it; writes cards and results as they come in.

    Raises whatever a job raised; what was finished before stays on disk.
    """
    path = args.out / "results.json"
    known: Figures = {"seed": SEED, "bases": {}, "experts": {}}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    kept_bases = known["bases"] if args.keep_bases or args.keep_experts else {}
    kept_experts = known["experts"] if args.keep_experts else {}
    running: dict[Future[Figures], tuple[str, str | None]] = {
        pool.submit(base_job, size, args.out, kept_bases.get(size), events): (size, None)
        for size in args.sizes
    }
    while running:
        finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        while not events.empty():
            show(*events.get())
        for future in finished:
            size, skill_id = running.pop(future)
            new: Figures = {"bases": {}, "experts": {}}
            if skill_id is not None:
                new["experts"][f"{size}/{skill_id}"] = future.result()
            else:
                new["bases"][size] = future.result()
                for skill in experts.EXPERTS[size]:
                    if not args.only or skill in args.only:
                        kept = kept_experts.get(f"{size}/{skill}")
                        job = pool.submit(expert_job, size, skill, args.out, kept, events)
                        running[job] = (size, skill)
            for group in new:
                known[group] |= new[group]
            cards.write_all(args.out, new)
            cards.write_results(path, known)


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
    parser.add_argument(
        "--keep-experts", action="store_true", help="measure all of them again only"
    )
    parser.add_argument("--cards", action="store_true", help="write cards from results.json only")
    args = parser.parse_args()
    if args.cards:
        results = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
        cards.write_all(args.out, results)
        return
    context = multiprocessing.get_context("spawn")
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
        ) as progress,
    ):
        bars: dict[str, TaskID] = {}

        def show(task: str, done: int, total: int, note: str) -> None:
            if task not in bars:
                bars[task] = progress.add_task(task, total=total, note=note)
            progress.update(bars[task], completed=done, note=note)

        run(args, pool, manager.Queue(), show)


if __name__ == "__main__":
    main()
