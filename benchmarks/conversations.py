"""Routing of follow-up turns: the whole conversation against its last message.

    .venv/bin/python benchmarks/conversations.py [--family NAME] [--json FILE] [--quick]

The sixty conversations of tests/data/conversations.yaml, three turns each over the ten tiny skills,
turn after turn through the default policy of experts.yaml with the service's own embedder; nothing
is answered. Each system sees the same turns:

- last message: what a router sees that knows no conversation;
- all turns as one text: the plainest way to route the whole conversation;
- composer: the reading of the conversation that is understood best (`conversation.py`);
- composer, stay S: besides, an expert keeps its session where the gain is no more than S, as a
  policy with `stay: S` says (`choose.py`, `sessions.py`).

With `--family`, a router of that family takes the default one's place: trained on the experts'
examples, each of which its expert alone gets right.

A switch is a turn answered by another expert than the one before it; it is needless where the right
expert is the same as before. Intervals are bootstrapped over conversations.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.common import ROOT, add_arguments, bootstrap, progress, show
from composer.build import build_ways, load, make_embedder
from composer.deciding import decide
from composer.embedder import TextEmbedder
from composer.generations import Generation, Way
from composer.routing.artefact import EmbedderStamp
from composer.routing.conversation import joined
from composer.routing.families import FAMILIES
from composer.routing.learned import LearnedSettings
from composer.routing.outcomes import Outcomes
from composer.routing.sessions import Sessions
from composer.settings import Settings
from composer.types import Catalog, Component, Expert, Message, Policy, Request
from router_training.train import train

CONVERSATIONS = ROOT / "tests" / "data" / "conversations.yaml"
STAYS = (0.05, 0.1, 0.2)

Turns = Sequence[tuple[str, str]]
"""The right expert and the user's words of each turn."""


@dataclass(frozen=True, slots=True)
class System:
    """How a conversation is shown to the default policy: `whole`, else what `shown` makes of it."""

    name: str
    whole: bool = True
    one_text: bool = False
    stay: float = 0.0


SYSTEMS = (
    System("last message", whole=False),
    System("all turns as one text", whole=False, one_text=True),
    System("composer"),
    *(System(f"composer, stay {stay:g}", stay=stay) for stay in STAYS),
)


def conversations(path: Path = CONVERSATIONS) -> list[Turns]:
    """The file's, each turn's one entry as (right expert, text)."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [[next(iter(turn.items())) for turn in turns] for turns in written]


def shown(system: System, texts: Sequence[str]) -> tuple[Message, ...]:
    """The messages of a request after these turns of the user. Answers are there in form only: no
    reading looks at them."""
    if system.one_text and len(texts) > 1:
        return ({"role": "user", "content": joined(texts)},)
    if not system.whole:
        return ({"role": "user", "content": texts[-1]},)
    messages: list[Message] = []
    for text in texts[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "…"}]
    return (*messages, {"role": "user", "content": texts[-1]})


async def routed(
    system: System, asked: Sequence[Turns], generation: Generation, policy: Policy
) -> list[list[str]]:
    """Who is chosen in each turn of each conversation."""
    way: Way = replace(generation.ways[policy.id], policy=replace(policy, stay=system.stay))
    staying = replace(generation, ways={policy.id: way})
    sessions = Sessions()
    chosen: list[list[str]] = []
    with progress(system.name, len(asked)) as advance:
        for number, turns in enumerate(asked):
            chosen.append([])
            for turn in range(len(turns)):
                texts = [text for _, text in turns[: turn + 1]]
                request = Request(
                    id=f"{number}-{turn}",
                    model=policy.id,
                    messages=shown(system, texts),
                    caller=str(number),
                )
                session = sessions.of(request, way.policy)
                last = () if session is None else sessions.experts(session)
                plan = await decide(request, staying, way, answered_last=last)
                chosen[-1].append(plan.best)
                if session is not None:
                    sessions.keep(session, [plan.best])
            advance()
    return chosen


def described(
    system: str, asked: Sequence[Turns], chosen: Sequence[Sequence[str]]
) -> dict[str, object]:
    """One row: accuracy in %, of first turns, of follow-ups, and of those that stay with the skill
    or change it; switches, all and needless, over all conversations."""
    right = np.array([[expert for expert, _ in turns] for turns in asked])  # (n, 3)
    got = np.array([list(experts) for experts in chosen])  # (n, 3)
    hit = got == right
    same = right[:, 1:] == right[:, :-1]  # (n, 2)
    switched = got[:, 1:] != got[:, :-1]
    low, high = bootstrap(hit[:, 1:].mean(axis=1))
    return {
        "system": system,
        "first_turns": _percent(hit[:, 0]),
        "follow_ups": _percent(hit[:, 1:]),
        "low": round(100 * low, 1),
        "high": round(100 * high, 1),
        "same_skill": _percent(hit[:, 1:][same]),
        "other_skill": _percent(hit[:, 1:][~same]),
        "switches": int(switched.sum()),
        "needless": int((switched & same).sum()),
    }


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return round(100 * float(hits.mean()), 1)


async def measure(asked: Sequence[Turns], family: str | None) -> list[dict[str, object]]:
    settings = Settings(experts=ROOT / "experts.yaml")
    catalog = load(settings).catalog
    policy = replace(catalog.policies[catalog.default_policy], tolerance=0.0)
    embedder = make_embedder(settings)
    folder = tempfile.TemporaryDirectory()
    try:
        if family is not None:
            policy = trained(family, policy, catalog, embedder, Path(folder.name) / "router")
        ways = await build_ways(replace(catalog, policies={policy.id: policy}), embedder)
        generation = Generation(catalog, ways, _nobody, {})
        chosen = {
            system.name: await routed(system, asked, generation, policy) for system in SYSTEMS
        }
    finally:
        await embedder.close()
        folder.cleanup()
    table = [described(name, asked, experts) for name, experts in chosen.items()]
    table.append(
        described("right expert each time", asked, [[e for e, _ in turns] for turns in asked])
    )
    for name, experts in chosen.items():
        if name.startswith("composer"):
            print(f"{name}:", *_misses(asked, experts), sep="\n  ")
    return table


def outcomes_of(experts: Sequence[Expert], most: int | None = None) -> Outcomes:
    """The experts' examples (`most` of each), which each alone gets right."""
    ids = tuple(expert.id for expert in experts)
    shown = [(text, i) for i, expert in enumerate(experts) for text in expert.examples[:most]]
    quality = np.zeros((len(shown), len(ids)), np.float32)
    quality[np.arange(len(shown)), [right for _, right in shown]] = 1
    return Outcomes(
        ids,
        tuple(text for text, _ in shown),
        quality,
        np.full(quality.shape, np.nan, np.float32),
        tuple(ids[right] for _, right in shown),
        ("",) * len(shown),
        np.arange(len(shown)),
    )


def trained(
    family: str, policy: Policy, catalog: Catalog, embedder: TextEmbedder, folder: Path
) -> Policy:
    """The policy with a router trained on its experts' examples, over those that have some."""
    experts = [catalog.experts[id_] for id_ in policy.experts if catalog.experts[id_].examples]
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    train(outcomes_of(experts), family, embedder.encode, stamp).artefact().save(folder)
    router = Component("learned", LearnedSettings(artefact=folder))
    ids = tuple(expert.id for expert in experts)
    return replace(policy, router=router, experts=ids, default_expert=None, threshold=0.0)


def _misses(asked: Sequence[Turns], chosen: Sequence[Sequence[str]]) -> list[str]:
    """Every one, so that the figures can be argued with."""
    return [
        f"{text!r} after {[before for _, before in turns[:number]]}: {expert}, not {right}"
        for turns, experts in zip(asked, chosen, strict=True)
        for number, ((right, text), expert) in enumerate(zip(turns, experts, strict=True))
        if expert != right
    ]


def _nobody(expert: str) -> Way:
    raise KeyError(expert)  # nobody is asked by name here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=CONVERSATIONS, help="other conversations")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="a trained router instead")
    add_arguments(parser, quick="the first two conversations of each skill")
    args = parser.parse_args()
    asked = conversations(args.file)
    if args.quick:
        asked = [turns for i, turns in enumerate(asked) if i % 6 < 2]
    began = perf_counter()
    table = asyncio.run(measure(asked, args.family))
    by = "" if args.family is None else f" by a trained router ({args.family})"
    show(table, args, title=f"{len(asked)} conversations of three turns{by}, right expert in %")
    print(f"{perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
