"""The whole service over replayed models that share a device: its accuracies are the table's."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from composer.build import families
from composer.registry import load_catalog
from composer.service import Service
from composer.strategies.extract import choice
from composer.strategies.voting.counting import Weights, log_odds, winner
from composer.types import Choice
from tests.replayed import ROOM, TOPICS, WAITS, Recorded, record, registry
from tests.tiny import ROOT, chat, serving

SHARED = ROOT.parent / "shared" / "data"
EXAMPLE = ROOT / "examples" / "replay" / "experts.yaml"


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record(tmp_path)


async def ask_all(client: httpx.AsyncClient, query: Sequence[str], model: str) -> list[Any]:
    """All at once; the bodies in the order of the questions."""
    responses = await asyncio.gather(
        *(client.post("/v1/chat/completions", json=chat(text, model)) for text in query)
    )
    assert [response.status_code for response in responses] == [200] * len(query), responses[0].text
    return [response.json() for response in responses]


def said(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


def loads(service: Service, device: str = "gpu") -> int:
    moved = service.scheduler.owners[device].residency.moved
    return sum(moves.count for (_, kind), moves in moved.items() if kind == "load")


def loads_in_order(experts: Sequence[str], room: int) -> int:
    """Of the least recently used rule, one call after another."""
    resident: list[str] = []
    count = 0
    for expert in experts:
        if expert in resident:
            resident.remove(expert)
        else:
            count += 1
        resident = [*resident, expert][-room:]
    return count


async def test_one_expert_answers_what_was_recorded(tmp_path: Path, recorded: Recorded) -> None:
    async with serving(tmp_path, registry(recorded.path), **WAITS) as (client, service):
        bodies = await ask_all(client, recorded.query, "auto")
        swaps = loads(service)
    experts = [body["composer"]["expert"] for body in bodies]
    expected = [recorded.answer[e][i] for i, e in enumerate(experts)]
    assert [said(body) for body in bodies] == expected
    alone = max(recorded.right(answers) for answers in recorded.answer.values())
    assert recorded.right(expected) > alone  # the router earns its keep, and can be seen to
    assert len(TOPICS) <= swaps < loads_in_order(experts, ROOM) / 2


async def test_a_vote_gives_the_winner_of_the_recorded_answers(
    tmp_path: Path, recorded: Recorded
) -> None:
    async with serving(tmp_path, registry(recorded.path), **WAITS) as (client, service):
        bodies = await ask_all(client, recorded.query, "vote")
        swaps = loads(service)
    won = []
    for i, body in enumerate(bodies):
        best_first = sorted(body["composer"]["scores"].items(), key=lambda item: -item[1])[:3]
        keys = [choice(recorded.answer[expert][i]) for expert, _ in best_first]
        won.append(keys[winner([1.0] * 3, dict(enumerate(keys)))])
    assert [choice(said(body)) for body in bodies] == won
    assert recorded.right([choice(said(body)) for body in bodies]) == recorded.right(won)
    assert len(TOPICS) <= swaps < len(recorded.query)


async def test_one_after_another_gives_the_same_winner_for_fewer_calls(
    tmp_path: Path, recorded: Recorded
) -> None:
    async with serving(tmp_path, registry(recorded.path), **WAITS) as (client, _):
        bodies = await ask_all(client, recorded.query, "waves")
    asked = []
    for i, body in enumerate(bodies):
        ranked = sorted(body["composer"]["scores"].items(), key=lambda item: -item[1])
        keys = {rank: choice(recorded.answer[e][i]) for rank, (e, _) in enumerate(ranked)}
        weights = log_odds([Choice(e, 0.25, quality) for e, quality in ranked], 4)
        details, spent = body["composer"]["details"], len(body["composer"]["experts"])
        assert body["composer"]["experts"] == [e for e, _ in ranked[:spent]]
        assert choice(said(body)) == keys[winner(weights, keys)]
        assert details["asked"] == spent
        assert details["stopped"] == ("all_asked" if spent == 4 else "cannot_change")
        heard = {rank: keys[rank] for rank in range(spent)}
        rule = Weights(weights, options=4)
        assert details["probability"] == pytest.approx(rule.probability(heard), abs=5e-3)
        asked.append(spent)
    assert 1 < np.mean(asked) < 4


async def test_a_tolerant_policy_stays_with_who_is_loaded(
    tmp_path: Path, recorded: Recorded
) -> None:
    settings = {**WAITS, "preload": False}  # the first question decides who is loaded
    async with serving(tmp_path, registry(recorded.path), **settings) as (client, service):
        first = await ask_all(client, recorded.query[:1], "near")
        bodies = await ask_all(client, recorded.query, "near")
        assert loads(service) == 1
    (expert,) = {body["composer"]["expert"] for body in [*first, *bodies]}
    assert [said(body) for body in bodies] == recorded.answer[expert]
    for body in bodies:
        scores, reasons = body["composer"]["scores"], body["composer"]["reasons"]
        best = max(scores, key=scores.get)
        if best == expert:
            assert reasons["rule"] == "best_score"
        else:
            assert reasons["instead_of"] == [best]
            assert reasons["gave_up"] == pytest.approx(scores[best] - scores[expert], abs=2e-4)


def test_the_example_is_as_the_registry_wants_it() -> None:
    catalog = load_catalog(EXAMPLE, families(), version=1).catalog
    tables = {server.settings.table for server in catalog.servers.values()}
    assert tables == {(SHARED / "mmlu_pro.dev.csv.gz",)}
    assert catalog.policies["auto"].tolerance > 0
    sizes = sorted(server.placement.memory_gb for server in catalog.servers.values())
    assert sum(sizes[-2:]) > catalog.devices["gpu"].memory_gb > sum(sizes[:2])


def test_tables_are_found_from_the_registrys_folder(tmp_path: Path) -> None:
    config = yaml.safe_load(registry(Path("./one.csv")))
    config["servers"]["cells-server"]["table"] = ["./one.csv", "deeper/two.csv.gz"]
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config))
    servers = load_catalog(tmp_path / "experts.yaml", families(), version=1).catalog.servers
    one, two = tmp_path / "one.csv", tmp_path / "deeper" / "two.csv.gz"
    assert servers["cells-server"].settings.table == (one, two)
    assert servers["courts-server"].settings.table == (one,)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: the shared outcome tables")
async def test_the_example_over_real_outcomes(tmp_path: Path) -> None:
    """examples/replay, but at once and without its tolerance: the scores recorded for whoever was
    chosen."""
    config = yaml.safe_load(EXAMPLE.read_text())
    path = (EXAMPLE.parent / config["servers"]["phi-3-mini"]["table"]).resolve()
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [table[i] for i in np.random.default_rng(0).permutation(len(table))[:60]]
    for server in config["servers"].values():
        server |= {"table": str(path), "time_scale": 0}
        server["placement"] |= {"start_s": 0.05, "stop_s": 0.02}
    for policy in config["policies"].values():
        policy |= {"tolerance": 0.0}
    model = {id_: config["servers"][e["server"]]["model"] for id_, e in config["experts"].items()}
    async with serving(tmp_path, json.dumps(config), **WAITS) as (client, service):
        single = await ask_all(client, [row["query"] for row in rows], "auto")
        swaps = loads(service)
        vote = await ask_all(client, [row["query"] for row in rows], "vote")
    chosen = [body["composer"]["expert"] for body in single]
    scores = [float(row[f"score|{model[e]}"]) for row, e in zip(rows, chosen, strict=True)]
    right = [said(body) == row["gold"] for body, row in zip(single, rows, strict=True)]
    assert right == [score == 1 for score in scores]
    for body, row in zip(single, rows, strict=True):
        expert = model[body["composer"]["expert"]]
        assert said(body) == row[f"answer|{expert}"]
        assert body["usage"]["completion_tokens"] == -(-int(row[f"out_chars|{expert}"]) // 4)
    for body, row in zip(vote, rows, strict=True):
        ranked = sorted(body["composer"]["scores"].items(), key=lambda item: -item[1])
        keys = [choice(row[f"answer|{model[expert]}"]) for expert, _ in ranked]
        assert choice(said(body)) == keys[winner([1.0] * 3, dict(enumerate(keys)))]
    assert 1 <= swaps < loads_in_order(chosen, 2)
