"""The base and the experts for mixtures inside the model: their data, what they do and do not know,
and how ways of mixing them are judged."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.gating import subjects, tables, ways
from benchmarks.gating.answering import Way, answered
from composer.adapters.gates.untrained import fixed
from examples.tiny import evaluate, experts, instructing, mixing, segments
from examples.tiny.tasks import SEPARATOR, SKILLS, composite_pairs

PAIR = ("add", "sort-digits")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(experts.base_folder("instructed"))


@cache
def loaded() -> subjects.Subjects:
    return subjects.load()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_segment_begins_with_its_instruction_and_the_answer_with_the_first() -> None:
    ids = tokenizer()("uppercase fox ; sort 31<|answer|>FOX ; 13</s>")["input_ids"]
    marks = segments.Marks.of(tokenizer())
    found = marks.segments(torch.tensor([ids]))
    told = "".join(
        str(int(segment)) * len(tokenizer().decode([token]).removeprefix("<s>"))
        for token, segment in zip(ids, found[0], strict=True)
        if token not in (marks.answer, *tokenizer().all_special_ids)
    )
    assert told == "0" * len("uppercase fox ; ") + "1" * len("sort 31") + "000" + "1" * len(" ; 13")
    assert marks.answering(torch.tensor([ids])).sum() == len(ids) - ids.index(marks.answer)


def test_batches_know_whose_each_token_is() -> None:
    drawn = iter([("reverse ab", "ba", ("reverse",)), ("add 1 2 ; sort 31", "3 ; 13", PAIR)] * 600)
    stream = segments.batches(lambda: next(drawn), tokenizer(), 60, random.Random(0))
    for ids, labels, owners in (next(stream) for _ in range(20)):
        names = [{segments.NAMES[o] for o in row.tolist() if o >= 0} for row in owners]
        assert all(row in ({"reverse"}, set(PAIR)) for row in names)
        assert torch.equal(owners == -100, ids == tokenizer().pad_token_id)
        kept = [row[mask].tolist() for row, mask in zip(ids, labels != -100, strict=True)]
        assert {tokenizer().decode(row) for row in kept} <= {"ba</s>", "3 ; 13</s>"}


@pytest.mark.parametrize("draw", [instructing.draw, mixing.draw])
def test_what_is_mixed_was_trained_on_no_unseen_pair_and_no_held_out_input(draw: Any) -> None:
    rng = random.Random(1)
    held_out = {
        i.prompt.partition(" ")[2]
        for s in SKILLS.values()
        if not s.memory
        for i in s.sample("test", 300, 0)
    }
    pairs = set()
    for _ in range(3000):
        prompt, _answer, skills = draw(rng)
        pairs.add(skills)
        for segment in prompt.split(SEPARATOR):
            assert segment.partition(" ")[2] not in held_out
    assert not pairs & set(composite_pairs("unseen"))
    assert set(composite_pairs("seen")) <= pairs


def test_a_cipher_is_no_skill_and_differs_by_instruction() -> None:
    assert instructing.cipher("abz 19", 2) == "cdb 31"
    for name, skill in SKILLS.items():
        for item in skill.sample("test", 20, 5):
            given = " ".join(item.fields.values())
            ciphers = {instructing.cipher(given, shift) for shift in instructing.SHIFTS.values()}
            assert instructing.cipher(given, instructing.SHIFTS[name]) != item.answer
            assert len(ciphers) == len(SKILLS) or given.replace(" ", "").isdigit()


def test_two_skills_are_answered_by_switching_and_by_no_single_expert() -> None:
    layers = fixed(loaded().members).layers
    asked = subjects.composites(subjects.Size(0, 3, 0, 0, 0, 0, 0, 0), seed=7)
    who = torch.tensor([a.skills for a in asked])
    one_hot = torch.eye(len(loaded().members))

    def right(way: Way) -> Any:
        return answered(loaded().base.model, loaded().base.tokenizer, way, asked)

    mixed = right(ways.PerSegment(layers, who, len(loaded().members)))
    assert mixed.right.mean() > 0.85
    assert mixed.routed == 1.0
    assert right(ways.PerQuery(layers, one_hot[who[:, 0]])).right.mean() < 0.15
    assert right(ways.Nobody()).right.mean() < 0.05


def test_an_answer_counts_as_right_where_greedy_decoding_gives_it() -> None:
    asked = subjects.held_in(subjects.Size(4, 0, 0, 0, 0, 0, 0, 0), seed=7)
    place = segments.NAMES.index("count-letter")
    way = ways.PerQuery(fixed(loaded().members).layers, torch.eye(10)[[place] * len(asked)])
    found = answered(loaded().base.model, loaded().base.tokenizer, way, asked)
    model, tok = experts.load_expert("instructed", "count-letter")
    said = evaluate.answer(model, tok, [a.prompt for a in asked])
    assert found.right.tolist() == [a == b.answer for a, b in zip(said, asked, strict=True)]
    assert 0 < found.right.sum() < len(asked)


@pytest.mark.parametrize("skill", SKILLS)
def test_experts_for_mixtures_master_their_skill_and_no_other(skill: str) -> None:
    asked = subjects.held_in(subjects.Size(20, 0, 0, 0, 0, 0, 0, 0), seed=7)
    place = segments.NAMES.index(skill)
    way = ways.PerQuery(fixed(loaded().members).layers, torch.eye(10)[[place] * len(asked)])
    right = answered(loaded().base.model, loaded().base.tokenizer, way, asked).right
    own = torch.tensor([a.skills == (place,) for a in asked]).numpy()
    assert right[own].mean() >= 0.7  # 20 items; counting is the hardest, some 80 %
    assert right[~own].mean() <= 0.1  # counts are few, so some are right by chance


def test_a_gate_is_told_as_a_share_of_its_ceilings_seed_by_seed() -> None:
    def seeds(*composites: float) -> list[dict[str, float | None]]:
        rest = {"routing_held_in": None, "routing_composite": 0.5, "flops": 0.1}
        return [{"held_in": 0.9, "composite": c, **rest} for c in composites]

    sorts = {"one": "query", "two": "query", "gate": "token"}
    sorts |= dict.fromkeys((tables.ADAPTER, tables.MIX), "ceiling")
    found = {"one": seeds(0.1, 0.1), "two": seeds(0.1, 0.3), "gate": seeds(0.4, 0.6)}
    found |= {tables.ADAPTER: seeds(0, 0), tables.MIX: seeds(0.8, 0.8)}
    lines = tables.markdown(sorts, found, [10, 20]).splitlines()
    assert "| one | query | 90.0 ± 0.0 | 10.0 ± 0.0 | – | 50.0 ± 0.0 | 10.0 % |" in lines
    assert "points above two" in lines[-3]
    assert lines[-1] == "| gate | 100.0 ± 0.0 | 62.5 ± 158.8 | 30.0 ± 0.0 |"
    del found[tables.MIX]
    assert "points above" not in tables.markdown(sorts, found, [10, 20])
