"""`composer gates`: who spoke where, in the terminal, on a page and as a picture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from composer.cli import app
from composer.commands.gate_views import COLOURS, in_terminal, page, picture
from composer.types import GateTrace, TokenGates
from tests.test_gated_expert import PAIR, QUERY, with_gate, write_both
from tests.tiny import TINY


def token(text: str, upper: float, backwards: float) -> TokenGates:
    shares = {"upper": upper, "backwards": backwards}
    return TokenGates(text, {"all": {name: w for name, w in shares.items() if w}})


TRACE = GateTrace(
    members=("upper", "backwards"),
    prompt=(token("<s>", 0.5, 0.5), token("fox\n", 0.9, 0.1), token("; ", 0.2, 0.8)),
    answers=((token("FOX", 1.0, 0.0), token("\x1b]", 0.0, 0.6), token("&", 0.0, 0.0)),),
    left_out=7,
)
"""The last token was written by the base alone, and the one before it would move the cursor."""


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["gates", *args])
    return result.exit_code, result.stdout, result.stderr


def test_without_colours_runs_stand_behind_their_member() -> None:
    assert [line.plain.rstrip() for line in in_terminal(TRACE, colours=False)] == [
        "all",
        "  prompt: [upper] <s>fox⏎  [backwards] ;",
        "  answer: [upper] FOX [backwards] �] [base] &",
        "   upper  43%   backwards  33%",
        "7 tokens beyond the limit are left out",
    ]


def test_with_colours_each_token_has_its_members() -> None:
    _, prompt, *_ = in_terminal(TRACE, colours=True)
    styles = {prompt.plain[span.start : span.end]: str(span.style) for span in prompt.spans}
    assert styles == {
        "<s>": f"black on {COLOURS[0]}",
        "fox⏎\n": f"bold black on {COLOURS[0]}",
        "; ": f"bold black on {COLOURS[1]}",
    }
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as shown:
        console.print(prompt)
    assert "\x1b[1;30;48;2;230;159;0m" in shown.get()


def test_a_page_fetches_nothing_and_takes_tokens_as_text() -> None:
    text = page("a <b>", TRACE)
    assert "&lt;s&gt;</span>" in text
    assert "<s>" not in text
    assert "a &lt;b&gt;" in text
    assert f'style="background:{COLOURS[0]}e6" title="upper 0.90, backwards 0.10"' in text
    assert 'style="" title="base">&amp;</span>' in text
    assert not any(sign in text for sign in ("http", "src=", "<script", "\x1b"))


def test_a_picture_is_a_png() -> None:
    assert picture("$x$", TRACE)[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture("none", GateTrace((), (), ()))[:4] == b"\x89PNG"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", json.dumps([str(TINY), str(tmp_path)]))
    write_both(tmp_path)
    file = tmp_path / "experts.yaml"
    file.write_text(with_gate(tmp_path))
    return file


def test_the_experts_server_is_loaded_here(registry: Path, tmp_path: Path) -> None:
    files = ["--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "a.png")]
    status, out, err = run(QUERY, "--experts", str(registry), *files, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["expert"], told["members"]) == ("both", list(PAIR))
    assert "".join(one["token"] for one in told["prompt"]) == f"<s>{QUERY}<|answer|>"
    assert "uppercase" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not (tmp_path / "composer.db").exists()


def test_a_name_without_a_gate_is_refused(registry: Path, tmp_path: Path) -> None:
    status, _, err = run("x", "--experts", str(registry), "--model", "reverse")
    assert (status, err.strip()) == (1, "'reverse' is no expert with a gate; those are: both")
    (tmp_path / "both").rename(tmp_path / "aside")
    registry.write_text(with_gate(tmp_path))
    status, _, err = run("x", "--experts", str(registry))
    assert (status, err.strip()) == (
        1,
        "no expert here has a gate; add one with `gate:` to experts.yaml",
    )


@pytest.mark.parametrize(
    "body",
    [
        {"models": []},
        {"data": [{"name": "llama"}]},
        {"data": ["llama"]},
        {"data": [{"id": "b", "adapter": {"gate": {"kind": "x"}}}]},
        [1],
    ],
)
def test_what_answers_but_is_no_such_service_is_told(
    body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=transport))
    status, _, err = run("x", "--url", "http://there")
    assert status == 1
    assert "http://there" in err
    assert "--url" in err


def test_a_running_service_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer k"
        if request.url.path == "/v1/experts":
            data = [{"id": "a", "adapter": None}, {"id": "b", "adapter": {"gate": {"kind": "x"}}}]
            return httpx.Response(200, json={"data": data})
        seen.append(json.loads(request.content))
        if seen[-1]["max_tokens"] > 1000:
            return httpx.Response(400, json={"error": {"message": "too long; ask for less"}})
        tokens = [{"token": "x", "weights": {"all": {"m": 0.9}}}]
        trace = {"members": ["m"], "prompt": tokens, "answers": [tokens], "left_out": 0}
        return httpx.Response(200, json={"composer": {"gates": {"b": trace}}})

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=transport))
    status, out, err = run("x", "--url", "http://there/", "--key", "k", "--groups", "layers")
    assert status == 0, err
    assert "[m] x" in out
    assert (seen[0]["model"], seen[0]["composer"]) == ("b", {"gates": "layers"})
    status, _, err = run("x", "--url", "http://there", "--key", "k", "--max-tokens", "2000")
    assert (status, err.strip()) == (1, "too long; ask for less")
