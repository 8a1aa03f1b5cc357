"""The committed miniature bases and experts: data, cards' figures, and retraining one."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from composer.prompting import PromptSpec, extract, render
from examples.tiny import cards, evaluate, experts, inputs, pretraining
from examples.tiny.tasks import (
    INSTRUCTIONS,
    SEPARATOR,
    SKILLS,
    composite_pairs,
    sample_composites,
)

ALL = [(size, skill) for size, skills in experts.EXPERTS.items() for skill in skills]
HELD_OUT = [skill for skill in SKILLS.values() if not skill.memory]
MASTERED = 0.95
FOREIGN = 0.3


@cache
def results() -> dict[str, Any]:
    text = (experts.HERE / "results.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(experts.base_folder("large"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", HELD_OUT, ids=lambda skill: skill.id)
def test_splits_are_disjoint(skill: Any) -> None:
    seen = {s: {item.prompt for item in skill.sample(s, 300, seed=1)} for s in inputs.SPLITS}
    assert all(len(prompts) >= 100 for prompts in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["dev"]
    assert not seen["dev"] & seen["test"]


def test_a_pair_is_held_out_in_either_order() -> None:
    assert inputs.pair_key("27", "45") == inputs.pair_key("45", "27")


def test_pretraining_text_holds_no_input_of_another_split() -> None:
    rng = random.Random(3)
    held_out = {i.prompt.partition(" ")[2] for s in HELD_OUT for i in s.sample("test", 300, 0)}
    for _ in range(3000):
        prompt, _answer = pretraining.example(rng)
        for segment in prompt.split(SEPARATOR):
            assert segment.partition(" ")[2] not in held_out


def test_pretraining_instruction_says_nothing() -> None:
    rng = random.Random(4)
    uppercased: Counter[str] = Counter()
    for _ in range(20000):
        prompt, answer = pretraining.example(rng)
        if answer.isalpha() and answer.isupper() and len(answer) > 1:
            uppercased[prompt.partition(" ")[0]] += 1
    assert set(uppercased) == set(INSTRUCTIONS)
    assert max(uppercased.values()) < 2 * min(uppercased.values())


def test_samples_repeat_and_differ_by_seed() -> None:
    skill = SKILLS["reverse"]
    assert skill.sample("test", 20, seed=5) == skill.sample("test", 20, seed=5)
    assert skill.sample("test", 20, seed=5) != skill.sample("test", 20, seed=6)


@pytest.mark.parametrize(
    ("skill", "fields", "prompt", "answer"),
    [
        ("uppercase", {"word": "fox"}, "uppercase fox", "FOX"),
        ("sort-digits", {"digits": "3142"}, "sort 3142", "1234"),
        ("reverse", {"word": "fox"}, "reverse fox", "xof"),
        ("add", {"a": "27", "b": "45"}, "add 27 45", "72"),
        ("count-letter", {"letter": "r", "word": "strawberry"}, "count r strawberry", "3"),
        ("caesar", {"word": "foxy"}, "caesar foxy", "irab"),
        ("spell-number", {"number": "0"}, "spell 0", "zero"),
        ("spell-number", {"number": "10"}, "spell 10", "ten"),
        ("spell-number", {"number": "342"}, "spell 342", "three hundred forty two"),
        ("spell-number", {"number": "7013"}, "spell 7013", "seven thousand thirteen"),
        ("spell-number", {"number": "9000"}, "spell 9000", "nine thousand"),
        ("plural", {"word": "fox"}, "plural fox", "foxes"),
        ("plural", {"word": "city"}, "plural city", "cities"),
        ("plural", {"word": "day"}, "plural day", "days"),
        ("drop-vowels", {"word": "planet"}, "devowel planet", "plnt"),
        ("capital", {"country": "france"}, "capital france", "Paris"),
    ],
)
def test_answers(skill: str, fields: dict[str, str], prompt: str, answer: str) -> None:
    item = SKILLS[skill].item(fields)
    assert (item.prompt, item.answer) == (prompt, answer)


def test_composites_join_prompts_and_answers_of_their_split() -> None:
    items = sample_composites("test", 40, seed=0, pairs=(("uppercase", "sort-digits"),))
    for item in items:
        first, second = item.parts
        word, digits = first.fields["word"], second.fields["digits"]
        assert item.prompt == f"uppercase {word} ; sort {digits}"
        assert item.answer == f"{word.upper()} ; {''.join(sorted(digits))}"
        assert inputs.split_of(inputs.word_key(word)) == "test"
        assert inputs.split_of(inputs.digits_key(digits)) == "test"
    assert items[0].right_parts(items[0].answer) == (True, True)
    assert items[0].right_parts(f"{items[0].parts[0].answer} ; x") == (True, False)


def test_composite_pairs_are_parted_into_seen_and_unseen() -> None:
    seen, unseen = composite_pairs("seen"), composite_pairs("unseen")
    assert sorted(seen + unseen) == sorted(composite_pairs())
    assert len(composite_pairs()) == len(SKILLS) * (len(SKILLS) - 1)
    assert len(unseen) >= 10
    with pytest.raises(ValueError, match="no skill pairs given: pass at least one"):
        sample_composites("test", 1, 0, pairs=())


# --- tokenizer -----------------------------------------------------------------------------


def test_tokenizer_gives_every_text_back() -> None:
    texts = [item.prompt + "<|answer|>" + item.answer for item in sample_composites("dev", 90, 1)]
    for text in [*texts, "Any text: 'quotes', {braces}\nand 2 lines!"]:
        ids = tokenizer()(text)["input_ids"]
        assert ids[0] == tokenizer().bos_token_id
        assert tokenizer().decode(ids[1:]) == text


def test_instructions_are_one_token_at_the_start_of_a_segment_only() -> None:
    tokens = tokenizer().tokenize("reverse reverse ; sort 31")
    assert tokens == ["reverse ", *"reverse", SEPARATOR, "sort ", "3", "1"]


def test_chat_template_is_the_last_user_message() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "reverse fox"},
        {"role": "assistant", "content": "xof"},
        {"role": "user", "content": "uppercase fox"},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>uppercase fox<|answer|>"
    ids = tokenizer()("uppercase fox<|answer|>")["input_ids"]
    assert tokenizer()(text, add_special_tokens=False)["input_ids"] == ids


# --- wordings ------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", SKILLS.values(), ids=lambda skill: skill.id)
def test_prompt_block_reads_free_wordings(skill: Any) -> None:
    words = experts.wordings(skill.id)
    assert len(words.shown) >= 40
    assert len(words.held_out) >= 10
    assert len({*words.shown, *words.held_out}) == len(words.shown) + len(words.held_out)
    for templates, least in ((words.shown, 0.97), (words.held_out, 0.97)):
        right = total = 0
        for start, template in enumerate(templates):
            for item in skill.sample("test", 60, seed=2)[start % 30 :][:20]:
                found = extract(words.prompt, item.wording(template))
                # The order of summands is free: "add 27 to 45".
                right += found is not None and sorted(found.values()) == sorted(
                    item.fields.values()
                )
                total += 1
        assert right / total >= least


def test_prompt_block_reads_capital_letters_as_small_ones() -> None:
    assert render(experts.wordings("reverse").prompt, "FOX backwards please") == "reverse fox"


def test_capital_block_lists_the_countries_of_the_table() -> None:
    block = experts.wordings("capital").prompt
    for country in inputs.CAPITALS:
        assert extract(block, f"capital of {country.title()}?") == {"country": country}


# --- weights, cards ------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "skill"), ALL)
def test_cards_are_those_of_the_weights(size: str, skill: str) -> None:
    folder = experts.expert_folder(size, skill)
    figures = results()["experts"][f"{size}/{skill}"]
    assert cards.sha256(folder / "adapter_model.safetensors") == figures["sha256"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == cards.expert_card(size, skill, figures), "run train.py --cards"
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == experts.base_name(size)
    assert set(front["composer"]) == {"description", "skills", "examples", "prompt", "sampling"}
    assert len(front["composer"]["examples"]) >= 40
    assert PromptSpec.model_validate(front["composer"]["prompt"]) == experts.wordings(skill).prompt


@pytest.mark.parametrize("size", experts.EXPERTS)
def test_base_cards_are_those_of_the_weights(size: str) -> None:
    folder, figures = experts.base_folder(size), results()["bases"][size]
    assert cards.sha256(folder / "model.safetensors") == figures["sha256"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == cards.base_card(size, figures), "run train.py --cards"


def test_figures_are_good_enough() -> None:
    for name, figures in results()["experts"].items():
        assert figures["own"]["canonical"] >= MASTERED, name
        for other, foreign in figures["others"].items():
            assert max(foreign["canonical"], foreign["wording"]) <= FOREIGN, (name, other)
    for size, figures in results()["bases"].items():
        assert max(figures["skills"].values()) <= FOREIGN, size


def test_weights_are_small() -> None:
    weights = list(experts.HERE.rglob("*.safetensors"))
    for_mixtures = len(list((experts.HERE / "experts" / "instructed").iterdir()))
    assert len(weights) == 3 + len(ALL) + for_mixtures
    assert sum(path.stat().st_size for path in weights) < 8_000_000


def _others(skill: str, n: int) -> list[Any]:
    """``n`` items of each other skill, as canonical prompts."""
    return [item for s in SKILLS.values() if s.id != skill for item in s.sample("test", n, seed=7)]


@pytest.mark.parametrize(("size", "skill"), ALL)
def test_expert_masters_its_skill_and_no_other(size: str, skill: str) -> None:
    model, tok = experts.load_expert(size, skill)
    own = SKILLS[skill].sample("test", 40, seed=7)
    others = _others(skill, 4)
    items = own + others
    # Own answers are shorter than 48 tokens; a foreign one that is cut off is wrong anyway.
    answers = evaluate.answer(model, tok, [i.prompt for i in items], max_new_tokens=48)
    right = [a == i.answer for a, i in zip(answers, items, strict=True)]
    assert sum(right[: len(own)]) / len(own) >= 0.9  # 40 items: one or two more misses than 5 %
    assert sum(right[len(own) :]) / len(others) <= FOREIGN


@pytest.mark.slow
@pytest.mark.parametrize(("size", "skill"), ALL)
def test_expert_reaches_every_figure_of_its_card(size: str, skill: str) -> None:
    model, tok = experts.load_expert(size, skill)
    block = experts.wordings(skill).prompt
    figures = results()["experts"][f"{size}/{skill}"]
    own, n = figures["own"], figures["n_others"]
    near = {"abs": 0.02}  # sums differ in their last bits between processors
    assert experts.canonical_accuracy(model, tok, SKILLS[skill], 200) == pytest.approx(
        own["canonical"], **near
    )
    assert experts.wording_accuracy(model, tok, SKILLS[skill], block, 200) == pytest.approx(
        own["wording"], **near
    )
    for other, foreign in figures["others"].items():
        assert experts.canonical_accuracy(model, tok, SKILLS[other], n) == pytest.approx(
            foreign["canonical"], **near
        )
        assert experts.wording_accuracy(model, tok, SKILLS[other], block, n) == pytest.approx(
            foreign["wording"], **near
        )


def test_an_adapter_retrained_on_a_small_budget_learns() -> None:
    skill = SKILLS["uppercase"]
    model, tok = experts.load_base("large")
    before = experts.canonical_accuracy(model, tok, skill, 30)
    trained = experts.train_expert(model, tok, skill, steps=40, seed=11)
    after = experts.canonical_accuracy(trained, tok, skill, 30)
    assert before <= 0.1
    assert after >= 0.7
