"""`router-training`, as a person uses it: exit statuses, tables, JSON, plain words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from router_training.cli import app
from router_training.console import card_line, gain_line
from router_training.embedding import Embedding
from router_training.progress import Progress
from router_training.vectors import KeptVectors
from tests.router_training.helpers import logged, write_csv
from tests.router_training.intent_tables import intents, write_intents
from tests.router_training.synthetic import table, write_table
from tests.routing.helpers import WordEmbedder

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("short_grids")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(progress: Progress) -> Embedding:
        model = WordEmbedder()
        return Embedding(KeptVectors(model, tmp_path / "vectors", progress), model.encode)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_table(tmp_path / "t.train.csv", table())


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    return write_table(tmp_path / "t.dev.csv", table(120, seed=2))


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_train_evaluate_compare(data: Path, dev: Path, tmp_path: Path) -> None:
    folder = tmp_path / "router"
    status, out, err = run(
        "train", "--router", "category", "--data", data, "--dev", dev, "--out", folder
    )
    assert status == 0, err
    assert "dev: accuracy" in out
    assert re.search(r"dev: accuracy [–\d./ ]+ % within 5 / 10 / 25 / 50 % of the best single", out)
    assert f"3 experts, 300 questions → {folder}" in out
    assert (folder / "manifest.json").is_file()

    file = tmp_path / "deep" / "result.json"
    status, out, err = run("evaluate", "--artefact", folder, "--data", dev, "--json", file)
    assert status == 0, err
    assert "category_best" in out
    assert "without embedding" in out
    written = json.loads(file.read_text())
    assert [a["name"] for a in written["artefacts"]] == ["router"]

    status, out, err = run(
        "compare", "--data", data, "--dev", dev, "--router", "category", "--router", "clusters"
    )
    assert status == 0, err
    assert out.startswith("## t, all: 3 experts")
    assert "| tuned kNN |" in out


def test_a_table_of_intents(tmp_path: Path) -> None:
    data = write_intents(tmp_path / "bank.train.csv", intents())
    dev = write_intents(tmp_path / "bank.dev.csv", intents(60, 20, seed=2))
    folder = tmp_path / "router"
    status, out, err = run(
        "train", "--router", "margin", "--data", data, "--dev", dev, "--out", folder
    )
    assert status == 0, err
    assert "40 questions are out of scope" in err
    assert "dev: in scope" in out
    assert "of what is nobody's is found" in out
    status, out, _ = run("evaluate", "--artefact", folder, "--data", dev, "--json", "-")
    assert status == 0
    scope = json.loads(out)["artefacts"][0]["scope"]
    assert (
        scope["threshold"]
        == json.loads((folder / "manifest.json").read_text())["metrics"]["threshold"]
    )
    assert scope["auroc"] > 0.8
    lines = dev.read_text(encoding="utf-8").splitlines()
    few = write_csv(tmp_path / "few.csv", *(line for line in lines if "travel" not in line))
    assert len(few.read_text(encoding="utf-8").splitlines()) < len(lines)
    status, out, err = run("evaluate", "--artefact", folder, "--data", few, "--json", "-")
    assert status == 0, err
    assert json.loads(out)["artefacts"][0]["avg_acc"] is not None
    page = tmp_path / "page.html"
    status, _, err = run("report", "--artefact", folder, "--data", few, "--out", page)
    assert status == 0, err
    assert "travel" in page.read_text(encoding="utf-8")


def test_a_gain_that_is_not_known_is_no_zero() -> None:
    card = {"avg_acc": 0.5, "ci95": None, "brier": 0.2, "brier_base_rate": 0.2, "ece": None}
    assert "over best single –, " in card_line({**card, "gain_over_best_single": None})
    assert "over best single +0.0, " in card_line({**card, "gain_over_best_single": 0.0})


def test_budgets_without_prices_are_refused_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(60)
    data.cost[3, 1] = np.nan
    file = write_table(tmp_path / "some.csv", data)
    monkeypatch.setattr("router_training.embedding.open_embedding", None)  # not callable
    status, _, err = run(
        "train", "--router", "category", "--data", file, "--out", tmp_path / "r", "--budget", "0.5"
    )
    assert status == 2
    assert (
        "some.csv: budgets need the cost of every outcome, and outcomes of poems have none" in err
    )


def test_questions_trained_on_are_told(data: Path, tmp_path: Path) -> None:
    folder, page = tmp_path / "router", tmp_path / "page.html"
    assert run("train", "--router", "category", "--data", data, "--out", folder)[0] == 0
    told = "300 of 300 judged questions (100.0 %) were trained on (equal but for case, space and"
    status, out, err = run("evaluate", "--artefact", folder, "--data", data)
    assert status == 0, err
    assert f"router: {told} marks): the figures over-state; judge on others" in out
    others = write_table(tmp_path / "others.csv", table(20, seed=2)).read_text().splitlines()
    more = write_csv(tmp_path / "more.csv", *data.read_text().splitlines(), *others[1:])
    status, out, err = run("evaluate", "--artefact", folder, "--data", more)
    assert status == 0, err
    assert "the figures over-state; `--without-trained` leaves those out" in out
    status, out, err = run("evaluate", "--artefact", folder, "--data", more, "--without-trained")
    assert status == 0, err
    assert "marks): they are left out" in out
    status, out, err = run("report", "--artefact", folder, "--data", data, "--out", page)
    assert status == 0, err
    assert f"router: {told}" in out
    assert told in page.read_text(encoding="utf-8")
    status, _, err = run("evaluate", "--artefact", folder, "--data", data, "--without-trained")
    assert status == 2
    assert "all questions to judge on were trained on" in err


def test_a_log_of_single_outcomes_is_told_of(tmp_path: Path) -> None:
    data = write_table(tmp_path / "log.csv", logged(table(90)))
    train = ("train", "--data", data, "--out", tmp_path / "r", "--router")
    status, out, err = run(*train, "best")
    assert (status, out) == (2, "")
    assert "the router 'best': none of the 90 questions" in err
    assert not (tmp_path / "r").exists()
    status, out, err = run(*train, "category")
    assert status == 0, err
    assert "note: no question has known outcomes of two experts" in out
    assert "accuracy –, over best single –, Brier 0." in out
    status, out, err = run("evaluate", "--artefact", tmp_path / "r", "--data", data)
    assert status == 0, err


def test_json_alone_on_standard_output(data: Path, dev: Path, tmp_path: Path) -> None:
    folder = tmp_path / "router"
    common = ("--data", data, "--json", "-")
    status, out, _ = run("train", "--router", "clusters", "--out", folder, *common)
    assert status == 0
    assert json.loads(out)["router"] == "clusters"
    status, out, _ = run("evaluate", "--artefact", folder, *common)
    assert json.loads(out).keys() == {"artefacts", "baselines"}
    status, out, _ = run("compare", "--router", "clusters", "--dev", dev, *common)
    assert json.loads(out)["routers"].keys() == {"clusters", "tuned kNN"}


def test_best_says_what_it_chose_and_why(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.routing.families import FAMILIES

    few = {name: FAMILIES[name] for name in ("neighbours", "category", "margin")}
    monkeypatch.setattr("router_training.train.FAMILIES", few)
    status, out, err = run("train", "--router", "best", "--data", data, "--out", tmp_path / "r")
    assert status == 0, err
    assert "chosen: " in out
    assert "cross-fitted mean quality" in out
    assert "left out: margin, since it is made for tables of intents" in out
    assert "best single expert, " not in out  # which routing beats here


def test_training_says_plainly_that_routing_does_not_pay(tmp_path: Path) -> None:
    data = table(120)
    data.quality[:] = np.array([1.0, 0.0, 0.0])
    file = write_table(tmp_path / "one.csv", data)
    status, out, err = run("train", "--router", "category", "--data", file, "--out", tmp_path / "r")
    assert status == 0, err
    assert (
        "cross-fitted on train: routing does not beat the best single expert, algebra: +0.0 points "
        "of quality (+0.0 to +0.0, 95 %); where cost does not matter, ask that expert alone"
    ) in out


@pytest.mark.parametrize(
    ("gain", "around", "says"),
    [
        (0.02, [0.01, 0.03], None),
        (None, None, None),
        (0.02, [-0.01, 0.05], "routing does not beat the best single expert, a: +2.0 points"),
        (-0.02, [-0.03, -0.01], "routing is worse than the best single expert, a: -2.0 points"),
    ],
)
def test_whether_routing_pays(
    gain: float | None, around: list[float] | None, says: str | None
) -> None:
    line = gain_line({"gain_over_best_single": gain, "gain_ci95": around}, "a")
    assert line is None if says is None else str(line).startswith(says)


def test_pools_and_experts(data: Path, tmp_path: Path) -> None:
    (tmp_path / "pools.json").write_text('{"t": {"pair": ["poems", "algebra"]}}')
    train = ("train", "--router", "category", "--data", data, "--out", tmp_path / "r")
    status, _, err = run(*train, "--pool", "pair")
    assert status == 0, err
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert [e["id"] for e in manifest["experts"]] == ["poems", "algebra"]
    status, out, _ = run(*train, "--experts", "cheap, poems")
    assert status == 0
    assert "2 experts" in out
    for more, said in (
        (("--pool", "trio"), "there is no pool 'trio' of t. There are: pair."),
        (("--pool", "pair", "--experts", "cheap"), "give one of them"),
        (("--experts", "cheap,dear"), "there are no outcomes of dear"),
    ):
        status, out, err = run(*train, *more)
        assert (status, out) == (2, "")
        assert said in err


def test_bad_input_is_told_in_plain_words(data: Path, dev: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "r", tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    empty = tmp_path / "empty.csv"
    empty.write_text("query,score|a,score|b\nhello,2,0\n")
    plain = write_table(tmp_path / "plain.csv", table(60, priced=False))
    train = ("train", "--out", folder, "--router")
    for args, said in (
        ((*train, "foo", "--data", data), "there is no router 'foo'; choose from neighbours"),
        ((*train, "category", "--data", tmp_path / "no.csv"), "there is no such file"),
        ((*train, "category", "--data", empty), "empty.csv:2: score|a: '2' is out of range"),
        ((*train, "category", "--data", plain, "--budget", "0.5"), "budgets need the cost"),
        ((*train, "category", "--data", data, "--budget", "-1"), "budget"),
        ((*train, "category", "--data", data, "--dev-split", "dev"), "--dev-split needs --dev"),
        ((*train, "category", "--data", data, "--split", "dev"), "there is no column split"),
        (("evaluate", "--artefact", other, "--data", dev), "there is no artefact in"),
        (
            ("train", "--router", "category", "--data", data, "--out", other),
            "is there and is no artefact; name another folder",
        ),
    ):
        status, out, err = run(*args)
        assert (status, out) == (2, ""), args
        assert said in err, args
        assert "Traceback" not in err
    assert (other / "thesis.txt").read_text() == "mine"
    assert not folder.exists()


def test_it_is_a_program(tmp_path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["router-training"] == "router_training.cli:main"
    done = subprocess.run(
        [sys.executable, "-m", "router_training", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    for command in ("train", "evaluate", "compare"):
        assert command in done.stdout
