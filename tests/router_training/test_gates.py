"""Training gates on a small model: what moves, what stays, and what is said of bad data."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from composer.adapters.factors import read_lora
from composer.adapters.files import WEIGHTS
from composer.adapters.gates.files import Gate, read_gate, write_gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer
from examples.tiny import experts
from examples.tiny.modeling import ANSWER
from examples.tiny.tasks import SKILLS
from router_training.cli import app
from router_training.errors import DataError, TrainingError
from router_training.gates.base import Base, Bench
from router_training.gates.batches import IGNORED, batches, encoded, padded
from router_training.gates.kinds import KINDS
from router_training.gates.loading import base_in
from router_training.gates.making import add, embeds_to_join, embeds_to_make, make, publish, remove
from router_training.gates.questions import Question, Questions, read_questions
from router_training.gates.softmax import imbalance

QUICK = {"steps": 3, "tokens": 200}


@cache
def base() -> Base:
    return base_in(experts.base_folder("small"))


@cache
def members(names: Sequence[str] = ("uppercase", "plural", "sort-digits")) -> dict[str, Any]:
    return {name: read_lora(experts.expert_folder("small", name)) for name in names}


@cache
def questions(n: int = 20, names: Sequence[str] = ("uppercase", "plural", "sort-digits")) -> Any:
    items = [item for name in names for item in SKILLS[name].sample("train", n, 0)]
    return Questions("here.csv", tuple(Question(i.prompt, i.answer, i.skill) for i in items))


def embed(texts: Sequence[str]) -> Any:
    """The first letter's direction."""
    out = np.zeros((len(texts), 26), np.float32)
    out[range(len(texts)), [ord(text[0]) - 97 for text in texts]] = 1
    return out


def bench(**changed: Any) -> Bench:
    return replace(
        Bench(members(), base(), questions(), encode=embed, embedder="first-letter"), **changed
    )


def digest(gate: Gate, folder: Path) -> str:
    folder.mkdir()
    return write_gate(folder, gate)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_made_written_and_read(kind: str, tmp_path: Path) -> None:
    chosen = KINDS[kind]
    before = {name: p.clone() for name, p in base().model.named_parameters()}
    gate = make(kind, bench(), QUICK if chosen.trained else {})
    assert gate.manifest.kind == kind
    assert gate.members == tuple(members())
    publish(gate, tmp_path / "gate")
    again = read_gate(tmp_path / "gate")
    assert again.manifest.paper
    assert embeds_to_join(tmp_path / "gate") == embeds_to_make(kind, {})
    assert chosen.trained == ("data" in again.manifest.report)
    same = make(kind, bench(), QUICK if chosen.trained else {})
    assert digest(same, tmp_path / "same") == again.manifest.digest
    for name, parameter in base().model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in base().model.modules())


@pytest.mark.parametrize("kind", sorted(name for name, kind in KINDS.items() if kind.trained))
def test_training_lowers_the_loss_and_a_seed_changes_it(kind: str) -> None:
    some = {"steps": 10, "tokens": 200, "learning_rate": 0.02}
    gate = make(kind, bench(), some)
    members_told = gate.manifest.report.get("members", {"all": gate.manifest.report})
    assert isinstance(members_told, dict)
    falls = [told["first_loss"] - told["last_loss"] for told in members_told.values()]  # type: ignore
    assert sum(falls) > 0
    other = make(kind, bench(seed=1), some)
    assert other.manifest.report != gate.manifest.report


@pytest.mark.parametrize("kind", ["arrow", "phatgoose", "glider"])
def test_a_member_joins_by_its_own_training_alone(kind: str, tmp_path: Path) -> None:
    first, last = ("uppercase", "plural"), "sort-digits"
    settings = QUICK if KINDS[kind].trained else {}
    some = bench(members=members(first), questions=questions(20, first))
    publish(make(kind, some, settings), tmp_path / "two")
    two = read_gate(tmp_path / "two")
    new = bench(members=members((last,)), questions=questions(20, (last,)))
    three = add(tmp_path / "two", new)
    assert three.members == (*first, last)
    for module, layer in two.layers.items():
        grown = three.layers[module]
        assert torch.equal(grown.projection.rows[:2], layer.projection.rows)
        assert torch.equal(grown.stacked.a[:16], layer.stacked.a)
        assert torch.equal(grown.stacked.b[:, :16], layer.stacked.b)
        assert grown.projection.rows[2].any()
    publish(three, tmp_path / "three")
    left = remove(tmp_path / "three", [last])
    assert digest(left, tmp_path / "left") == two.manifest.digest


def test_phatgoose_joined_is_phatgoose_made_at_once(tmp_path: Path) -> None:
    two = ("uppercase", "plural")
    some = bench(members=members(two), questions=questions(20, two))
    publish(make("phatgoose", some, QUICK), tmp_path / "two")
    grown = add(tmp_path / "two", bench(members=members(("sort-digits",))))
    assert digest(grown, tmp_path / "a") == digest(
        make("phatgoose", bench(), QUICK), tmp_path / "b"
    )


@pytest.mark.parametrize("kind", ["fixed", "softmax", "xlora"])
def test_members_weighed_against_each_other_take_nobody_in(kind: str, tmp_path: Path) -> None:
    some = bench(members=members(("uppercase", "plural")),
                 questions=questions(20, ("uppercase", "plural")))  # fmt: skip
    publish(make(kind, some, QUICK if KINDS[kind].trained else {}), tmp_path / "two")
    with pytest.raises(TrainingError, match="again"):
        add(tmp_path / "two", bench(members=members(("sort-digits",))))


def test_x_lora_that_is_sure_is_that_adapter() -> None:
    gate = make("xlora", bench(), QUICK)
    ids = torch.arange(30).reshape(2, 15) % 90
    for at, name in enumerate(gate.members):
        sure = torch.zeros(3)
        sure[at] = 200.0

        def weigh(module: str, layer: GatedLayer, x: Tensor, sure: Tensor = sure) -> Tensor:
            features = torch.zeros(*x.shape[:-1], layer.projection.rows.shape[1])
            return layer.weights(features, sure)

        adapter, _ = experts.load_expert("small", name)
        with torch.no_grad(), Installed(base().model, gate.layers, weigh):
            ours = base().model(input_ids=ids).logits
            assert torch.allclose(ours, adapter(input_ids=ids).logits, atol=1e-4)


def test_a_gate_may_null_select_and_leave_modules_alone() -> None:
    how = {"null": True, "top_k": 2, "tsallis": {"q": 1.5, "above": 0.4}, "balance": 0.1,
           "modules": ["mlp"], "selections": {"layers.2": {"top_k": 3, "null": True}}}  # fmt: skip
    gate = make("softmax", bench(), {**QUICK, **how})
    assert all("mlp" in module for module in gate.layers)
    for module, layer in gate.layers.items():
        assert layer.projection.rows.shape[0] == 4
        assert layer.selection.top_k == (3 if "layers.2" in module else 2)


def test_a_softmax_gate_may_be_trained_with_what_is_known_of_the_request() -> None:
    gate = make("softmax", bench(), {**QUICK, "gamma": 5, "null": True})
    assert gate.manifest.per_request
    assert gate.manifest.settings["gamma"] == 5
    rows = gate.tensors["prior.rows"]
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert rows.argmax(1).tolist() == [ord(c) - 97 for c in "ups"]  # the prompts' first letters
    plain = make("softmax", bench(), {**QUICK, "null": True})
    assert not plain.manifest.per_request
    assert plain.manifest.report["first_loss"] != gate.manifest.report["first_loss"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokns": 3}, "settings of softmax: .*tokens"),
        ({"modules": ["nowhere"]}, "no module of the members has 'nowhere'"),
        ({"selections": {"mlp": {"null": True}}}, "disagree about `null`"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0"),
        ({"top_k": 1}, "nothing is learnt"),
        ({"top_k": 2, "selections": {"mlp": {"top_k": 1}}}, "nothing is learnt"),
        ({"temperature": float("inf")}, "temperature: Input should be a finite number"),
        ({"tsallis": {"q": 2, "above": 0.7}, "top_k": 1}, "set `above` below 0.667"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        make("softmax", bench(), settings)


def test_one_kept_weight_is_learnt_where_the_switch_may_fire() -> None:
    gate = make("softmax", bench(), {**QUICK, "top_k": 1, "tsallis": {"q": 2, "above": 0.1}})
    assert gate.manifest.selection.top_k == 1
    with pytest.raises(TrainingError, match="nothing is learnt"):
        make("xlora", bench(), {**QUICK, "top_k": 1})
    with pytest.raises(TrainingError, match="no entropy of 3 shares is above 2"):
        make("phatgoose", bench(), {**QUICK, "tsallis": {"above": 2}})


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"arrow"}))
def test_a_general_adapter_is_subtracted_or_refused(kind: str, tmp_path: Path) -> None:
    general = members()["plural"]
    with pytest.raises(TrainingError, match="compose --subtract"):
        make(kind, bench(general=general), QUICK if KINDS[kind].trained else {})
    if kind == "fixed":
        publish(make(kind, bench(), {}), tmp_path / "gate")
        with pytest.raises(TrainingError, match="compose --subtract"):
            add(tmp_path / "gate", bench(general=general))
    gate = make("arrow", bench(general=general), {})
    assert gate.manifest.settings["general"] == general.digest


def test_who_joins_glider_is_told_by_the_same_embedder_and_in_words_if_given(
    tmp_path: Path,
) -> None:
    two, last = ("uppercase", "plural"), ("sort-digits",)
    some = bench(members=members(two), questions=questions(20, two), embedder_digest="sha256:a")
    publish(make("glider", some, QUICK), tmp_path / "two")
    new = bench(members=members(last), questions=questions(20, last), embedder_digest="sha256:a")
    with pytest.raises(TrainingError, match="sha256:b"):
        add(tmp_path / "two", replace(new, embedder_digest="sha256:b"))
    with pytest.raises(TrainingError, match="'plural', who does not join"):
        add(tmp_path / "two", replace(new, instructions={"plural": "zebra"}))
    grown = add(tmp_path / "two", replace(new, instructions={"sort-digits": "zebra"}))
    assert grown.tensors["prior.rows"].argmax(1).tolist() == [ord(c) - 97 for c in "upz"]
    publish(make("phatgoose", some, QUICK), tmp_path / "plain")
    with pytest.raises(TrainingError, match="reads no instructions"):
        add(tmp_path / "plain", replace(new, instructions={"sort-digits": "zebra"}))


def test_a_gate_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make("arrow", bench(), {}), tmp_path / "gate")
    before = read_gate(tmp_path / "gate").manifest.digest
    other = make("arrow", bench(), {"top_k": 1})
    real, moves = os.replace, []

    def failing(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise OSError(5, "input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="input/output"):
        publish(other, tmp_path / "gate")
    monkeypatch.undo()
    assert read_gate(tmp_path / "gate").manifest.digest == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["gate"]
    assert publish(other, tmp_path / "gate") == read_gate(tmp_path / "gate").manifest.digest


def test_what_is_missing_is_named() -> None:
    for changed, told in [
        ({"questions": None}, "--data"),
        ({"base": None}, "--base"),
        ({"questions": questions(20, ("uppercase", "plural"))}, "no question of 'sort-digits'"),
        ({"members": members(("uppercase",))}, "'plural', 'sort-digits', which the gate has no"),
    ]:
        with pytest.raises(TrainingError, match=told):
            make("phatgoose", bench(**changed), QUICK)
    with pytest.raises(TrainingError, match="use kind softmax"):
        make("phatgoose", bench(), {**QUICK, "null": True})
    with pytest.raises(TrainingError, match="COMPOSER_EMBEDDER"):
        make("glider", bench(encode=None), QUICK)
    with pytest.raises(TrainingError, match="one of arrow, fixed"):
        make("magic", bench(), {})


def test_balance_is_one_where_all_are_used_alike_and_e_where_one_is() -> None:
    chosen, real = Selection(top_k=1), torch.ones(2, 2, dtype=torch.bool)
    turns = 50 * torch.eye(4).reshape(2, 2, 4)
    assert imbalance(turns, chosen.weights(turns), chosen, real) == pytest.approx(1, abs=1e-5)
    one = 50 * torch.eye(4)[[0, 0, 0, 0]].reshape(2, 2, 4)
    assert imbalance(one, chosen.weights(one), chosen, real) == pytest.approx(4, abs=1e-5)
    # Over the batch, not a sequence: two sequences of one member each are balanced together.
    pairs = 50 * torch.eye(2)[torch.tensor([[0, 0], [1, 1]])]
    assert imbalance(pairs, chosen.weights(pairs), chosen, real) == pytest.approx(1, abs=1e-5)
    padding = torch.tensor([[True, True], [False, False]])
    assert imbalance(pairs, chosen.weights(pairs), chosen, padding) == pytest.approx(2, abs=1e-5)


def test_only_the_answer_and_its_end_are_learnt() -> None:
    tokenizer = base().tokenizer
    rows = encoded(tokenizer, [Question("uppercase fox", "FOX")])
    assert rows[0][0] == tokenizer(f"uppercase fox{ANSWER}FOX</s>")["input_ids"]
    batch = padded([*rows, *encoded(tokenizer, [Question("uppercase a", "A")])], [0, 1], 0)
    learnt = batch.labels[0][batch.labels[0] != IGNORED]
    assert tokenizer.decode(learnt) == "FOX</s>"
    assert batch.real.sum(1).tolist() == [len(rows[0][0]), len(rows[0][0]) - 4]
    with pytest.raises(TrainingError, match="shorten it"):
        encoded(tokenizer, [Question("uppercase fox", "FOX")], longest=5)


def test_batches_hold_every_row_once_a_round_within_their_size() -> None:
    rows = [([1] * n, 1) for n in range(2, 12)]
    stream = batches(rows, 24, seed=3, pad=0)
    seen = 0
    while seen < len(rows):
        batch = next(stream)
        seen += len(batch.ids)
        assert batch.ids.numel() <= 24
    assert seen == len(rows)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,answer\na,b\nc,\n", r":3: .*answer.*there is nothing.*Write the text"),
        ("question,answer\na,b\n", "no column 'prompt'"),
        ("prompt,answer\n", "there are no rows"),
        ("prompt,answer\na,b,c\n", r":2: .*3 cells under 2 columns"),
    ],
)
def test_bad_data_is_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=told):
        read_questions(file)


@pytest.mark.parametrize("kind", ["arrow", "fixed"])
def test_members_are_verified_as_the_registry_does(kind: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(experts.expert_folder("small", "plural"), odd)
    tensors = load_file(odd / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, odd / WEIGHTS)
    words = ["gates", "make", kind, "--adapter", f"broken={odd}", "--out", str(tmp_path / "gate")]
    for folder, told in ((odd, "it holds NaN"), (tmp_path / "none", "there is no such folder")):
        words[4] = f"broken={folder}"
        refused = CliRunner().invoke(app, words)
        assert (refused.exit_code, refused.exception.__class__) == (2, SystemExit)
        assert f"'broken': {told}" in refused.output
    assert not (tmp_path / "gate").exists()


def test_the_command_line_makes_extends_and_cuts(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "answer", "skill"])
        writer.writerows([q.prompt, q.answer, q.expert] for q in questions().rows)
    folder = {name: str(experts.expert_folder("small", name)) for name in members()}
    trained = ["--base", str(experts.base_folder("small")), "--data"]
    two = tmp_path / "two.csv"
    two.write_text("".join(x for x in data.open() if "sort-digits" not in x))
    adapters = ["--adapter", folder["uppercase"], "--adapter", f"s={folder['plural']}"]
    two.write_text(two.read_text().replace(",plural\n", ",s\n"))

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["gates", *args])

    made = run("make", "phatgoose", *adapters, *trained, str(two), "--out", str(tmp_path / "a"),
               "--set", "steps=2", "--set", "tokens=100")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "phatgoose over 2 members in 21 modules, top_k 2" in made.output
    grown = run("add", str(tmp_path / "a"), "--adapter", folder["sort-digits"], *trained, str(data),
                "--out", str(tmp_path / "b"), "--json", "-")  # fmt: skip
    assert grown.exit_code == 0, grown.output
    told = json.loads(grown.stdout)
    assert [m["name"] for m in told["members"]] == ["uppercase", "s", "sort-digits"]
    cut = run(
        "remove", str(tmp_path / "b"), "--member", "sort-digits", "--out", str(tmp_path / "c")
    )
    assert cut.exit_code == 0, cut.output
    assert read_gate(tmp_path / "c").manifest.digest == read_gate(tmp_path / "a").manifest.digest
    for args, said in [
        (["make", "magic", *adapters, "--out", str(tmp_path / "d")], "one of arrow"),
        (["make", "softmax", *adapters, "--out", str(tmp_path / "d")], "--data"),
        (["make", "arrow", *adapters, "--out", str(tmp_path)], "holds other files"),
        (["make", "arrow", *adapters, "--set", "k=1", "--out", "x"], "settings of arrow: top_k"),
        (["make", "arrow", *adapters, "--set", "top_k", "--out", "x"], "not NAME=VALUE"),
        (["make", "arrow", *adapters, "--set", "top_k=9", "--out", "x"], "there are 2 members"),
        (
            ["make", "fixed", *adapters, "--set", "weights=nan,1", "--out", "x"],
            "'weights=[0.7, 0.3]'",
        ),
        (["remove", str(tmp_path / "a"), "--member", "x", "--out", "x"], "is no member"),
        (
            [
                "add",
                str(tmp_path / "a"),
                "--adapter",
                folder["sort-digits"],
                *trained,
                str(data),
                "--instruction",
                "sort-digits=sort",
                "--out",
                "x",
            ],
            "reads no instructions",
        ),
        (
            [
                "add",
                str(tmp_path / "a"),
                "--adapter",
                folder["sort-digits"],
                "--instruction",
                "sort",
                "--out",
                "x",
            ],
            "write NAME=TEXT",
        ),
    ]:
        refused = run(*args)
        assert refused.exit_code == 2, (args, refused.output)
        assert said in refused.output
