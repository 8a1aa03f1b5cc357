"""Mixing the miniature experts: one for a query, one adapter made of several, or a gate per token.

    .venv/bin/python benchmarks/gates.py [--seeds 5] [--json FILE] [--quick] [--rows NAME …]
    .venv/bin/python benchmarks/gates.py --merge FILE …      # the table of runs of rows apart

Held in: questions of one skill. Composites: two skills in one prompt and one answer, of pairs that
nothing was trained on; no single adapter can answer them. An answer is right where greedy decoding
would give it. The oracle adapter is that of the question's (first) skill; the oracle pair is both
right adapters at half weight, all that one adapter a query could be told; the oracle mix switches
adapters at the true boundary of the segments, in the prompt and in the answer, and is the ceiling.
LoraHub alone is given examples of the judged tasks, a few of each, its search being for new tasks.
Routing: the share of tokens and modules at which the member with most weight is that of the token's
segment. Seeds vary the training of gates, its data, and the questions; experts stay. Intervals are
Student's over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import add_arguments
from benchmarks.gating import tables
from benchmarks.gating.answering import Asked, Way, answered
from benchmarks.gating.subjects import (
    Size,
    Subjects,
    all_questions,
    composites,
    cosines,
    few_of,
    held_in,
    load,
    single_questions,
)
from benchmarks.gating.ways import Averaged, Merged, Nobody, PerQuery, PerSegment, PerToken
from composer.adapters.gates.files import Gate
from composer.adapters.gates.prior import prior
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.gates.untrained import fixed
from composer.adapters.merging import METHODS
from composer.adapters.merging.base import Weights
from examples.tiny.segments import NAMES
from router_training.embedding import open_embedding
from router_training.gates.base import Bench
from router_training.gates.making import make
from router_training.gates.phatgoose import GliderSettings, with_instructions
from router_training.weights import learn

WHOLE = Size(
    held_in=20,
    composite=12,
    single_rows=200,
    composite_rows=3000,
    steps=250,
    member_steps=100,
    tokens=1500,
    member_tokens=300,
    shots=5,
    searched=60,
)
QUICK = Size(
    held_in=4,
    composite=2,
    single_rows=40,
    composite_rows=200,
    steps=20,
    member_steps=5,
    tokens=600,
    member_tokens=200,
    shots=2,
    searched=5,
)

SHARPNESS = 0.05
"""Temperature of the router's softmax over cosines."""

GAMMA = 20.0
"""Of the prior that a gate is trained with; set by hand, before a judged question was answered."""

Make = Callable[["Round"], tuple[Way, Way]]
"""The way for the held-in questions, and that for the composites."""


class Round:
    """One seed: its questions, and the gates trained for it, each when first asked for."""

    def __init__(self, subjects: Subjects, embedding: Any, size: Size, seed: int) -> None:
        self.subjects, self.embedding, self.size, self.seed = subjects, embedding, size, seed
        self.asked = (held_in(size, seed), composites(size, seed))
        self.own = single_questions(size, seed)
        encode = embedding.kept.encode
        self.cosines = tuple(cosines(encode, asked, self.own) for asked in self.asked)
        self.stacked: Mapping[str, GatedLayer] = fixed(subjects.members).layers
        self._gates: dict[str, Gate] = {}

    def bench(self) -> Bench:
        return Bench(
            self.subjects.members,
            self.subjects.base,
            all_questions(self.size, self.seed),
            encode=self.embedding.kept.encode,
            embedder=self.embedding.kept.id,
            seed=self.seed,
            progress=_tell,
        )

    def gate(self, kind: str, **settings: Any) -> Gate:
        name = f"{kind} {settings}"
        if name not in self._gates:
            self._gates[name] = make(kind, self.bench(), settings)
        return self._gates[name]

    def phatgoose(self) -> Gate:
        """Trained on the members' own questions alone, as the paper has it."""
        if "goose" not in self._gates:
            how = {"steps": self.size.member_steps, "tokens": self.size.member_tokens}
            bench = replace(self.bench(), questions=self.own)
            self._gates["goose"] = make("phatgoose", bench, how)
        return self._gates["goose"]

    def glider(self) -> Gate:
        """The same, and γ by the loss on questions of the seen pairs and of single skills."""
        bench = replace(self.bench(), questions=self.own)
        judged = all_questions(self.size, self.seed + 1000).rows
        some = [judged[i] for i in np.random.default_rng(self.seed).permutation(len(judged))[:64]]
        return with_instructions(
            self.phatgoose(), bench, self.subjects.base, some, GliderSettings()
        )

    def steps(self) -> dict[str, Any]:
        return {"steps": self.size.steps, "tokens": self.size.tokens, "learning_rate": 0.02}


def _one_hot(members: Tensor) -> Tensor:
    return torch.eye(len(NAMES))[members]


def _first(asked: Sequence[Asked]) -> Tensor:
    return torch.tensor([a.skills[0] for a in asked])


def _both(asked: Sequence[Asked]) -> Tensor:
    return torch.tensor([(a.skills * 2)[:2] for a in asked])


def _halves(asked: Sequence[Asked]) -> Tensor:
    return _one_hot(_both(asked)).mean(1)


def per_query(weights: Callable[[Round, int], Tensor]) -> Make:
    def ways(round_: Round) -> tuple[Way, Way]:
        return tuple(PerQuery(round_.stacked, weights(round_, i)) for i in (0, 1))  # type: ignore[return-value]

    return ways


def _random(round_: Round, which: int) -> Tensor:
    rng = torch.Generator().manual_seed(round_.seed)
    return _one_hot(torch.randint(len(NAMES), (len(round_.asked[which]),), generator=rng))


def _uniform(round_: Round, which: int) -> Tensor:
    return torch.full((len(round_.asked[which]), len(NAMES)), 1 / len(NAMES))


def _router_weights(round_: Round, which: int) -> Tensor:
    """The two likeliest by centroid, in steps of a sixteenth: so that like queries share one."""
    p = torch.softmax(round_.cosines[which][1] / SHARPNESS, 1)
    kept = torch.where(p >= p.topk(2, 1).values[:, 1:], p, 0.0)
    return torch.round(16 * kept / kept.sum(1, keepdim=True)) / 16


def _lorahub(round_: Round, which: int) -> Tensor:
    """One search for each judged task, on a few questions of its own."""
    base, members, size = round_.subjects.base, round_.subjects.members, round_.size
    found: dict[tuple[int, ...], tuple[float, ...]] = {}
    for skills in dict.fromkeys(a.skills for a in round_.asked[which]):
        few = few_of(skills, size.shots, round_.seed)
        found[skills] = learn("lorahub", base, members, few, evaluations=size.searched).weights
    return torch.tensor([found[a.skills] for a in round_.asked[which]])


def merged(method: str, **settings: Any) -> Make:
    def ways(round_: Round) -> tuple[Way, Way]:
        chosen = METHODS[method]
        modules = [lora.modules for lora in round_.subjects.members.values()]
        weights = Weights((1 / len(modules),) * len(modules))
        made = chosen.merge(modules, weights, chosen.settings.model_validate(settings))
        way = Merged(made.modules)
        return way, way

    return ways


def gated(gate: Callable[[Round], Gate]) -> Make:
    def ways(round_: Round) -> tuple[Way, Way]:
        way = PerToken(gate(round_))
        return way, way

    return ways


def with_prior(of: Callable[[Round], Gate], sort: type[PerToken] = PerToken) -> Make:
    def ways(round_: Round) -> tuple[Way, Way]:
        gate = of(round_)
        encode = round_.embedding.kept.encode
        found = []
        for asked in round_.asked:
            rows = np.asarray(encode([a.prompt for a in asked]), np.float32)
            found.append(sort(gate, torch.stack([prior(gate, row.tolist()) for row in rows])))
        return found[0], found[1]

    return ways


def _averaged(gate: Callable[[Round], Gate]) -> Make:
    return lambda round_: (Averaged(gate(round_)), Averaged(gate(round_)))


def _oracle_mix(round_: Round) -> tuple[Way, Way]:
    a, b = (PerSegment(round_.stacked, _both(x), len(NAMES)) for x in round_.asked)
    return a, b


def _arrow_subtracted(round_: Round) -> Gate:
    bench = replace(round_.bench(), general=round_.subjects.general)
    return make("arrow", bench, {"top_k": 2})


def _softmax(round_: Round) -> Gate:
    return round_.gate("softmax", **round_.steps())


def _informed(round_: Round) -> Gate:
    return round_.gate("softmax", **round_.steps(), gamma=GAMMA)


@dataclass(frozen=True, slots=True)
class Row:
    """`sort`: ceiling, query (one composition or adapter a query, or for all) or token."""

    name: str
    sort: str
    ways: Make


ROWS = (
    Row("base", "query", lambda r: (Nobody(), Nobody())),
    Row("random adapter", "query", per_query(_random)),
    Row("uniform cat", "query", per_query(_uniform)),
    Row("linear", "query", merged("arithmetic", kind="linear")),
    Row("ties", "query", merged("arithmetic", kind="ties", density=0.5)),
    Row("LoraHub", "query", per_query(_lorahub)),
    Row("retrieval, top 1", "query", per_query(lambda r, i: _one_hot(r.cosines[i][0].argmax(1)))),
    Row("centroid, top 1", "query", per_query(lambda r, i: _one_hot(r.cosines[i][1].argmax(1)))),
    Row("router-weighted cat", "query", per_query(_router_weights)),
    Row("prompt-averaged trained gate", "query", _averaged(_softmax)),
    Row("prompt-averaged, + prior", "query", with_prior(_informed, Averaged)),
    Row("Arrow", "token", gated(lambda r: r.gate("arrow", top_k=2))),
    Row("Arrow + subtraction", "token", gated(_arrow_subtracted)),
    Row("PHATGOOSE", "token", gated(Round.phatgoose)),
    Row("GLIDER", "token", with_prior(Round.glider)),
    Row("X-LoRA", "token", gated(lambda r: r.gate("xlora", **r.steps() | {"learning_rate": 5e-3}))),
    Row("trained gate", "token", gated(_softmax)),
    Row("trained gate + prior", "token", with_prior(_informed)),
    Row("oracle adapter", "ceiling", per_query(lambda r, i: _one_hot(_first(r.asked[i])))),
    Row("oracle pair, half each", "ceiling", per_query(lambda r, i: _halves(r.asked[i]))),
    Row("oracle mix", "ceiling", _oracle_mix),
)
SORTS = {row.name: row.sort for row in ROWS}


def extra_flops(way: Way, model: Any) -> float:
    """Multiplications and additions a token beside the base's, as a share of them: of the dense
    stacked form, which computes all members, and of the gates. A second pass is a whole base."""
    base: int = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    extra = 0
    for layer in way.layers.values():
        a, b = layer.stacked.a, layer.stacked.b
        ranks = a.shape[0] if not isinstance(way, PerQuery | PerSegment) else _rank(way, layer)
        extra += 2 * ranks * (a.shape[1] + b.shape[0])
        if isinstance(way, PerToken) and not isinstance(way, Averaged):
            extra += 2 * layer.projection.rows.numel()
    if isinstance(way, PerToken) and way.gate.manifest.passes == 2:
        extra += base
    return extra / base


def _rank(way: PerQuery | PerSegment, layer: GatedLayer) -> int:
    """Of the members with a weight alone: what a composed adapter would have."""
    most = 1 if isinstance(way, PerSegment) else int((way.weights != 0).sum(1).max())
    return most * max(layer.stacked.ranks)


def measured(row: Row, round_: Round) -> dict[str, float | None]:
    ways = row.ways(round_)
    base = round_.subjects.base
    found = [
        answered(base.model, base.tokenizer, way, asked)
        for way, asked in zip(ways, round_.asked, strict=True)
    ]
    return {
        "held_in": float(found[0].right.mean()),
        "composite": float(found[1].right.mean()),
        "routing_held_in": found[0].routed,
        "routing_composite": found[1].routed,
        "flops": extra_flops(ways[1], base.model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-in", type=int, default=WHOLE.held_in, help="questions of a skill")
    parser.add_argument("--composite", type=int, default=WHOLE.composite, help="and of a pair")
    parser.add_argument("--steps", type=int, default=WHOLE.steps, help="of a trained gate")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="of --json")
    args = parser.parse_args()
    if args.merge is not None:
        print(tables.merged(args.merge, SORTS))
        return
    torch.set_num_threads(1)
    asked_for = {"held_in": args.held_in, "composite": args.composite, "steps": args.steps}
    size = QUICK if args.quick else replace(WHOLE, **asked_for)
    rows = [row for row in ROWS if args.rows is None or row.name in args.rows]
    subjects, embedding = load(), open_embedding()
    found: dict[str, list[dict[str, float | None]]] = {row.name: [] for row in rows}
    for seed in range(1 if args.quick else args.seeds):
        round_ = Round(subjects, embedding, size, seed)
        for row in rows:
            began = time.process_time()
            found[row.name].append(measured(row, round_))
            if args.json is not None:  # also of a run that is stopped
                kept = {"asked": [len(a) for a in round_.asked], "found": found}
                args.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
            told = found[row.name][-1]
            print(
                f"seed {seed}, {row.name}: held in {told['held_in']:.3f}, composites "
                f"{told['composite']:.3f}, {time.process_time() - began:.0f} s",
                file=sys.stderr,
            )
    print(tables.markdown(SORTS, found, [len(asked) for asked in round_.asked]))


def _tell(label: str, done: int, total: int) -> None:
    if done == total:
        print(f"{label}: {done} steps", file=sys.stderr)


if __name__ == "__main__":
    main()
