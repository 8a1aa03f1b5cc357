"""The report: what it says is what was measured, it needs nothing else, and a browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from composer.routing.outcomes import Outcomes
from router_training.cli import app
from router_training.embedding import Embedding
from router_training.evaluate import Evaluation, evaluate
from router_training.plots import BarChart, Bars, Chart, Line, Words
from router_training.portrait import backdrop_of, portrait_of
from router_training.progress import Progress
from router_training.report import report
from router_training.train import train
from router_training.vectors import KeptVectors
from tests.router_training.synthetic import stamp, table, write_table
from tests.routing.helpers import WordEmbedder

pytestmark = pytest.mark.usefixtures("short_grids")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def made(folder: Path, router: str, outcomes: Outcomes | None = None) -> Path:
    data = table() if outcomes is None else outcomes
    train(data, router, WordEmbedder().encode, stamp()).artefact().save(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("routers")
    folders = [made(folder / "one & only", "category"), made(folder / "two", "clusters")]
    return evaluate(folders, table(200, seed=2), WordEmbedder())


@pytest.fixture(scope="module")
def text(evaluation: Evaluation) -> str:
    return report(evaluation, "t <dev>")


class Page(HTMLParser):
    """The elements of a page, whether they are closed, and what stands in its tables."""

    EMPTY = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def test_it_says_what_evaluate_says(evaluation: Evaluation, text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert "Routers on t <dev>" in page.said
    rows = {row[0]: row for row in page.rows if row}
    for judged in evaluation.artefacts:
        card = judged.card
        row = rows[f"{judged.name} ({judged.router})"]
        low, high = card["ci95"]
        accuracy = f"{100 * card['avg_acc']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        assert row[1] == accuracy
        assert row[3] == f"{card['brier']:.3f} ({card['brier_base_rate']:.3f})"
        assert row[5] == f"{1000 * card['mean_cost']:.3g}"
    assert rows["best single: algebra"][1].startswith(
        f"{100 * evaluation.baselines['best_single']['avg_acc']:.1f} %"
    )
    assert {"oracle", "random expert", "maths", "verse", "small talk"} <= rows.keys()


def test_it_needs_nothing_else_and_can_be_read_without_eyes(text: str) -> None:
    assert len(text) < 300_000
    page = Page(text)
    assert not page.all("script")
    assert not page.all("img")
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"] for attrs in page.all("a")}
    assert targets == {"#summary", "#costs", "#parts", "#choices", "#calibration"}
    assert {target.removeprefix("#") for target in targets if target} <= set(ids)
    pictures = page.all("svg")
    assert len(pictures) == 4
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"] or "") > 40
    assert len(page.all("title")) == 1 + len(pictures)
    assert len(page.all("caption")) == len(page.all("table")) >= 5
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    # Colours are the page's, so that both schemes are one picture.
    pictured = text[text.index("<main") :]
    assert not re.search(r"#[0-9a-f]{6}", pictured)
    assert "var(--s1)" in pictured


def test_the_same_page_each_time(evaluation: Evaluation, text: str) -> None:
    assert report(evaluation, "t <dev>") == text


def test_without_costs_there_is_a_reason_instead_of_curves(tmp_path: Path) -> None:
    folder = made(tmp_path / "one", "category")
    unpriced = evaluate([folder], table(100, seed=2, priced=False), WordEmbedder())
    text = report(unpriced, "t")
    assert "Not shown: the data has no costs" in text
    assert len(Page(text).all("svg")) == 3
    some = table(100, seed=2)
    some.cost[:, 1] = np.nan
    text = report(evaluate([folder], some, WordEmbedder()), "t")
    assert "Not shown: costs are missing of 1 of 3 experts: poems" in text
    blind = made(tmp_path / "blind", "category", table(priced=False))
    text = report(evaluate([blind], table(100, seed=2), WordEmbedder()), "t")
    assert "Not shown: no artefact was trained with costs" in text
    both = report(evaluate([folder, blind], table(100, seed=2), WordEmbedder()), "t")
    assert "Without a curve, for want of prices in training: blind." in both


def test_missing_outcomes_leave_out_what_needs_them(tmp_path: Path) -> None:
    folder = made(tmp_path / "one", "category")
    data = table(150, seed=2, missing=0.3)
    result = evaluate([folder], data, WordEmbedder())
    page = Page(report(result, "t"))
    assert page.open == []
    back = backdrop_of(result.outcomes, result.yardstick)
    assert back.mix is None
    assert back.best_single is not None
    asked = result.outcomes.known[:, result.yardstick.best]
    known = result.outcomes.quality[asked, result.yardstick.best]
    assert back.best_single.quality.mean == pytest.approx(float(known.mean()))


def test_portraits_and_scorecards_agree(evaluation: Evaluation) -> None:
    outcomes = evaluation.outcomes
    for judged in evaluation.artefacts:
        portrait = portrait_of(outcomes, judged.predicted, judged.expected_cost)
        assert portrait.at_quality.quality.mean == pytest.approx(judged.card["avg_acc"])
        assert portrait.at_quality.cost == pytest.approx(judged.card["mean_cost"])
        assert sum(portrait.shares.values()) == pytest.approx(1)
        assert portrait.parts.keys() == {"maths", "verse", "small talk"}
        weights = [outcomes.category.count(part) for part in portrait.parts]
        means = [around.mean for around in portrait.parts.values()]
        assert np.average(means, weights=weights) == pytest.approx(judged.card["avg_acc"])
        assert portrait.curve is not None
        costs = [level.cost for level in portrait.curve]
        assert costs == sorted(costs)
        for level in portrait.curve:
            assert level.quality.low <= level.quality.mean <= level.quality.high
        # Between the curve's ends the budgets of the card are on it.
        best = evaluation.baselines["best_single"]["mean_cost"]
        for share, quality in judged.card["budget_acc"].items():
            if quality is not None and costs[0] < float(share) * best < costs[-1]:
                means = [level.quality.mean for level in portrait.curve]
                read = np.interp(float(share) * best, costs, means)
                assert read == pytest.approx(quality, abs=0.02)


def test_pictures_with_odd_names_and_gaps() -> None:
    words = Words("A <b> & $c$", 'It says "so"', "x", "y")
    names = ["$x_1$ & <y>", "a name that is longer than there is room for"]
    svg = BarChart(
        words, names, [Bars("one", [0.5, None], [(0.4, 0.6), None]), Bars("two", [0.1, 1.0])]
    ).svg()
    page = Page(svg)
    assert page.open == []
    assert "$x_1$ & <y>" in page.said
    assert "a name that is longer…" in page.said
    many = [Line(f"line {n}", [0.0, 1.0], [n / 20, 1 - n / 20]) for n in range(12)]
    assert Page(Chart(words, many).svg()).open == []


# --- the command -------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(progress: Progress) -> Embedding:
        model = WordEmbedder()
        return Embedding(KeptVectors(model, tmp_path / "vectors", progress), model.encode)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("offline")
def test_the_command(tmp_path: Path) -> None:
    data = write_table(tmp_path / "t.dev.csv", table(100, seed=2))
    folder = made(tmp_path / "one", "category")
    out = tmp_path / "deep" / "report.html"
    status, said, err = run("report", "--artefact", folder, "--data", data, "--out", out)
    assert status == 0, err
    assert f"1 artefact on 100 questions → {out}" in said
    assert "Routers on t.dev.csv" in out.read_text()
    for args, words in (
        (("--out", tmp_path / "report.pdf"), "name a file that ends in .html"),
        (("--out", out, "--artefact", tmp_path / "nowhere"), "nowhere"),
    ):
        status, _, err = run("report", "--artefact", folder, "--data", data, *args)
        assert status == 2
        assert words in err


# --- a browser ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_it(text: str, tmp_path: Path, width: int) -> None:
    """In a frame as wide as a phone or a screen: nothing is wider than the page, every picture has
    its size, and nothing is complained of."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<!doctype html><iframe width="{width}" height="800" srcdoc="{html.escape(text)}">
        </iframe><pre id="found"></pre><script>
        document.querySelector("iframe").onload = event => {{
          const inside = event.target.contentDocument, root = inside.documentElement;
          const sizes = [...inside.querySelectorAll("figure svg")]
            .map(s => s.getBoundingClientRect()).map(b => [b.width, b.height]);
          const texts = [...inside.querySelectorAll("figure svg text")]
            .map(t => t.getBoundingClientRect().height).filter(h => h > 0);
          found.textContent = JSON.stringify(
            {{wide: root.scrollWidth, room: root.clientWidth, sizes, least: Math.min(...texts)}});
        }};</script>""",
        encoding="utf-8",
    )
    dumped, log = browse("--dump-dom", frame, home=tmp_path)
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped)
    assert found is not None, log
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert seen["wide"] <= seen["room"]
    assert len(seen["sizes"]) == 4
    for across, down in seen["sizes"]:
        assert 0.8 * min(width, 700) < across <= width
        assert down > 100
    assert seen["least"] >= 7  # CSS pixels
    assert "CONSOLE" not in log


def browse(what: str, page: Path, *more: str, home: Path) -> tuple[str, str]:
    assert CHROMIUM is not None
    args = (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    run = subprocess.run(
        [*args, f"--user-data-dir={home / 'profile'}", *more, what, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(home)},
    )
    return run.stdout, run.stderr


@pytest.mark.filterwarnings("error")  # as where a legend leaves no room for the axes
def test_many_artefacts_fit() -> None:
    names = [f"an-artefact-with-a-rather-long-name-{i:02}" for i in range(30)]
    lines = [Line(name, [0.001, 1.0, 100.0], [0.3, 0.5, 0.6]) for name in names]
    words = Words("Many", "Thirty of them.", "US dollars", "mean quality")
    told = Page(Chart(words, lines, scale="log").svg()).said
    assert {"an-artefact-…-long-name-00", "an-artefact-…-long-name-29"} <= set(told)
    assert {"0.01", "1", "100"} <= set(told)
    assert not {"0.02", "0.05", "2", "5"} & set(told)
    assert "0.5" in Page(Chart(words, [Line("a", [0.2, 1], [0.3, 0.5])], scale="log").svg()).said
    assert BarChart(words, ["all"], [Bars(name, [0.5]) for name in names]).svg()
