"""`router-training weights`: what is learnt of a few questions, and the recipe that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from composer.adapters.compose import compose
from composer.adapters.factors import read_lora
from composer.adapters.recipe import read_recipe
from router_training.cli import app
from router_training.errors import TrainingError
from router_training.gates.base import Base
from router_training.gates.loading import base_in, members_in
from router_training.gates.questions import Question
from router_training.weights import Way, learn
from tests.tiny import TINY

SKILLS = ("uppercase", "reverse")
FOLDERS = [TINY / "experts" / "large" / skill for skill in SKILLS]
WORDS = ("fox", "garden", "winter", "lamp")
QUESTIONS = [Question(f"uppercase {word}", word.upper()) for word in WORDS]


@pytest.fixture(scope="module")
def base() -> Base:
    return base_in(TINY / "bases" / "large")


@pytest.mark.parametrize("way", ["lorahub", "soups"])
def test_the_adapter_that_knows_the_task_gets_the_weight(base: Base, way: Way) -> None:
    members = members_in([str(folder) for folder in FOLDERS])
    settings = {"evaluations": 16} if way == "lorahub" else {"epochs": 6, "learning_rate": 0.3}
    learnt = learn(way, base, members, QUESTIONS, **settings)  # type: ignore[arg-type]
    assert learnt.loss < learnt.loss_even < learnt.loss_base
    assert learnt.weights[0] > learnt.weights[1]
    assert bool(learnt.modules) == (way == "soups")
    for own in learnt.modules.values():
        assert sum(own) == pytest.approx(1, abs=1e-4)


def test_the_recipe_that_is_written_is_what_was_learnt(tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": q.prompt, "answer": q.answer}) + "\n" for q in QUESTIONS)
    )
    recipe = tmp_path / "recipes" / "mine.yaml"
    words = ["weights", "soups", "--base", str(TINY / "bases" / "large"), "--data", str(data)]
    for folder in FOLDERS:
        words += ["--adapter", str(folder)]
    done = CliRunner().invoke(app, [*words, "--out", str(recipe), "--json", "-"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    made = compose(read_recipe(recipe), tmp_path / "out")
    members = [read_lora(folder).modules for folder in FOLDERS]
    for module, factors in read_lora(made.folder).modules.items():
        parts = zip(told["modules"][module], members, strict=True)
        want = sum((w * m[module].delta() for w, m in parts), torch.zeros(()))
        assert (factors.delta() - want).norm() / want.norm() < 4e-3  # bfloat16 on disk


def test_one_adapter_has_no_weights_to_learn(base: Base) -> None:
    with pytest.raises(TrainingError, match="two adapters or more"):
        learn("lorahub", base, members_in([str(FOLDERS[0])]), QUESTIONS)
