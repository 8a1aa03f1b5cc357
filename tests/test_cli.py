"""The command line, as a person uses it: exit statuses, tables, JSON."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from composer.build import _embedder_files
from composer.cli import app
from composer.encoders import ModelFiles
from composer.routing.artefact import ARRAYS, MANIFEST, EmbedderStamp
from composer.routing.outcomes import Outcomes
from composer.settings import Settings
from router_training.train import train
from tests.routing.helpers import WordEmbedder
from tests.tiny import TINY, registry

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


def test_check_prints_the_catalog() -> None:
    status, out, err = run("check")
    assert status == 0, err
    assert "uppercase" in out
    assert "policy auto (default)" in out


def test_check_prints_every_error_at_once_and_exits_with_2(tmp_path: Path) -> None:
    file = tmp_path / "experts.yaml"
    file.write_text(
        "version: 1\n"
        "servers:\n"
        "  s: {engine: embeded}\n"
        "experts:\n"
        "  e: {server: s, adaptor: ./x}\n"
        "policies:\n"
        "  auto: {router: {name: neighbors}, strategy: {name: single}}\n"
    )
    status, out, err = run("check", str(file))
    assert status == 2
    assert out == ""
    for line, wrong, meant in (
        (3, "embeded", "embedded"),
        (5, "adaptor", "adapter"),
        (7, "neighbors", "neighbours"),
    ):
        [found] = [said for said in err.splitlines() if said.startswith(f"{file}:{line}:")]
        assert wrong in found
        assert meant in found
    assert err.splitlines()[-1].startswith("3 problem(s)")


VLLM = """\
version: 1
servers:
  ours: {engine: vllm, model: %(base)s, model_name: composer/tiny-large, context_window: 512,
         launch: {python: ./no/python}}
  theirs: {engine: openai, url: "http://127.0.0.1:9/v1", model: m, api_key_env: CHECKED_KEY}
experts:
  plain: {server: ours, description: anything}
  other: {server: theirs, description: something, context_window: 512}
policies:
  auto: {router: {name: neighbours}, strategy: {name: single}, experts: ["*"]}
"""


def test_check_warns_of_what_is_not_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHECKED_KEY", raising=False)
    file = tmp_path / "experts.yaml"
    file.write_text(VLLM % {"base": ROOT / "examples/tiny/bases/large"})
    status, out, err = run("check", str(file))
    assert status == 0
    assert "plain" in out
    program, key = err.splitlines()
    assert program == (
        f"warning: {file}:4: servers.ours.launch.python: there is no program "
        f"{tmp_path}/no/python on this machine. Install it there, or correct the path."
    )
    assert key.startswith(f"warning: {file}:5: servers.theirs.api_key_env: ")
    assert "'CHECKED_KEY' is not set" in key


def test_check_refuses_adapters_on_a_vllm_that_is_started_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", json.dumps([str(ROOT / "examples")]))
    file = tmp_path / "experts.yaml"
    skill = ROOT / "examples/tiny/experts/large/reverse"
    text = VLLM % {"base": ROOT / "examples/tiny/bases/large"}
    file.write_text(
        text.replace("policies:", f"  back: {{server: ours, adapter: {skill}}}\npolicies:")
    )
    status, _, err = run("check", str(file))
    assert status == 2
    assert err.splitlines()[0] == (
        f"{file}:9: experts.back.adapter: server 'ours' is started without adapters. Give the "
        "server `max_loras`, the adapters in one batch, or remove the adapter."
    )
    file.write_text(file.read_text().replace("launch:", "max_loras: 2, launch:"))
    status, _, err = run("check", str(file))
    assert status == 0, err


def test_check_of_no_file_says_so(tmp_path: Path) -> None:
    status, _, err = run("check", str(tmp_path / "none.yaml"))
    assert status == 2
    assert "there is no such file" in err


def test_experts_lists_ids() -> None:
    status, out, _ = run("experts")
    assert status == 0
    assert "uppercase\ttiny-large\t" in out


def test_route_as_json_gives_scores_plan_and_time() -> None:
    status, out, err = run("route", "please write fox in capital letters", "--json")
    assert status == 0, err
    decision = json.loads(out)
    assert decision["plan"]["choices"] == [{"expert": "uppercase", "weight": 1.0}]
    assert decision["plan"]["strategy"] == "single"
    assert max(decision["scores"], key=decision["scores"].get) == "uppercase"
    assert decision["decision_ms"] > 0


def test_route_says_who_answers_below_the_threshold() -> None:
    status, out, err = run("route", "tell me something funny about politicians in 1832")
    assert status == 0, err
    assert "policy auto → base (single; the best quality is below the threshold of 0.1;" in out


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:90"), ("::", "http://[::1]:90"), ("box", "http://box:90")],
)
def test_where_the_own_service_is_found(host: str, url: str) -> None:
    assert Settings(host=host, port=90).url == url


def test_settings_that_are_wrong_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", "./examples")
    assert run("check")[0] == 1
    assert "write COMPOSER_ADAPTER_ROOTS as a JSON list" in run("check")[2]
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", '["./examples"]')
    monkeypatch.setenv("COMPOSER_PORT", "99999")
    assert "COMPOSER_PORT: Input should be less than or equal to 65535" in run("check")[2]


def test_route_says_that_the_router_s_llm_was_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(registry("uppercase", "reverse"))
    config["experts"]["wise"] = {"server": "tiny"}
    config["policies"]["auto"]["router"] = {"name": "llm", "expert": "wise"}
    config["policies"]["auto"]["experts"] = ["*", "!wise"]
    file = tmp_path / "experts.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", json.dumps([str(TINY)]))
    status, out, err = run("route", "spell fox backwards", "--experts", str(file))
    assert status == 0, err
    assert "policy auto → reverse" in out
    assert "asks 'wise' first; no engine runs here" in err


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry whose policy goes by an artefact beside it, fitted on another embedder."""
    n = 24
    blank = ("",) * n
    outcomes = Outcomes(
        ("reverse", "uppercase"),
        tuple(f"question {i}" for i in range(n)),
        np.eye(2, dtype=np.float32)[np.arange(n) % 2],
        np.full((n, 2), np.nan, np.float32),
        blank,
        blank,
        np.arange(n),
    )
    words = WordEmbedder()
    stamp = EmbedderStamp(id=words.id, digest=words.digest, dim=words.dim)
    train(outcomes, "clusters", words.encode, stamp).artefact().save(tmp_path / "router")
    config = yaml.safe_load(registry("uppercase", "reverse"))
    config["policies"]["auto"]["router"] = {"name": "learned", "artefact": "./router"}
    file = tmp_path / "experts.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("COMPOSER_ADAPTER_ROOTS", json.dumps([str(TINY)]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("COMPOSER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("COMPOSER_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("COMPOSER_DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/composer.db")
    return file


def test_check_takes_an_artefact_of_the_embedder_that_the_settings_name(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the embedder's files; no model is loaded."""
    stamp = json.loads((trained.parent / "router" / MANIFEST).read_text())["embedder"]
    files = ModelFiles(stamp["id"], trained.parent, stamp["digest"])
    monkeypatch.setattr("composer.build.find_model", lambda name: files)
    _embedder_files.cache_clear()
    try:
        assert run("check", str(trained))[0] == 0
    finally:
        _embedder_files.cache_clear()


def test_check_tells_all_at_once_where_there_is_no_default_policy(trained: Path) -> None:
    config = yaml.safe_load(trained.read_text())
    config["policies"]["other"] = config["policies"].pop("auto")
    trained.write_text(yaml.safe_dump(config))
    status, _, err = run("check", str(trained))
    assert status == 2
    assert "there is no policy 'auto', for requests that name none" in err
    assert "policies.other.router: " in err
    assert "was trained on vectors of words" in err
    assert "2 problem(s)" in err


@pytest.mark.parametrize("online", [False, True])
def test_check_tells_what_is_wrong_with_a_shadow_beside_what_is_wrong_with_the_artefact(
    trained: Path, online: bool
) -> None:
    config = yaml.safe_load(trained.read_text())
    router = {"artefact": "gone", "shadow": {"artefact": "nowhere"}}
    config["policies"]["auto"]["router"] = (
        {"name": "online", "base": router} if online else {"name": "learned", **router}
    )
    trained.write_text(yaml.safe_dump(config))
    status, _, err = run("check", str(trained))
    assert status == 2
    wrong = "cannot have a `shadow`" if online else f"no artefact in {trained.parent / 'nowhere'}"
    assert wrong in err
    assert f"no artefact in {trained.parent / 'gone'}" in err
    assert "2 problem(s); nothing was changed." in err


@pytest.mark.parametrize("harm", ["torn", "missing"])
def test_check_refuses_a_damaged_artefact(trained: Path, harm: str) -> None:
    arrays = trained.parent / "router" / ARRAYS
    if harm == "torn":
        arrays.write_bytes(arrays.read_bytes()[:-9])
    else:
        arrays.unlink()
    status, out, err = run("check", str(trained))
    assert (status, out) == (2, "")
    told, counted = err.splitlines()
    assert told.startswith(f"{trained}:")
    assert f": policies.auto.router: {arrays} " in told
    assert "Copy the whole folder" in told
    assert counted == "1 problem(s); nothing was changed."


@pytest.mark.parametrize(
    "command",
    [("check",), pytest.param(("serve",), marks=pytest.mark.slow), ("route", "say", "--experts")],
)
def test_an_artefact_of_another_embedder_is_told_in_a_sentence(
    trained: Path, command: tuple[str, ...]
) -> None:
    status, out, err = run(*command, str(trained))
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert "catalog version" not in err  # it is told before any server is started
    [told] = [line for line in err.splitlines() if line.startswith(f"{trained}:")]
    assert "policies.auto.router: " in told
    assert "was trained on vectors of words (words), and this service embeds with " in told
    assert told.endswith(". Set COMPOSER_EMBEDDER, or train it again.")


def test_route_with_an_unknown_policy_names_it() -> None:
    status, _, err = run("route", "hello", "--policy", "nobody")
    assert status == 1
    assert "'nobody'" in err


def test_the_schema_that_editors_use_is_in_step() -> None:
    status, out, _ = run("schema")
    assert status == 0
    committed = (ROOT / "examples" / "experts.schema.json").read_text()
    assert json.loads(out) == json.loads(committed), "run `make schema`"


STATUS: dict[str, Any] = {
    "artefact": "0123456789abcdef",
    "shadow": "ba9876543210fedc",
    "better": True,
    "always_better": False,
    "comparison": {
        "requests": 40, "new": 0.8, "old": 0.6, "new_ips": 0.79, "new_snips": None,
        "difference": 0.2, "low": 0.01, "high": 0.39, "effective": 12.3, "unsupported": 0.0,
        "always_low": -0.3,
    },
    "series_ended": False,
    "promotion": None,
    "left_out": 0,
}  # fmt: skip


def test_promote_shows_does_and_undoes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, Any]] = []

    def answer(method: str, url: str, json: Any, status: int = 200) -> httpx.Response:
        seen.append((method, url, json))
        refused = {"error": {"message": "not better; wait"}}
        body = {"policy": "a b", **STATUS} if status == 200 else refused
        return httpx.Response(status, json=body, request=httpx.Request(method, url))

    monkeypatch.setattr(httpx, "get", lambda url, **_: answer("GET", url, None))
    monkeypatch.setattr(httpx, "post", lambda url, json, **_: answer("POST", url, json))
    for options in ([], ["--do"], ["--undo"]):
        code, out, _ = run("promote", "a b", "--url", "http://there:1/", "--json", *options)
        assert (code, json.loads(out)) == (0, {"policy": "a b", **STATUS})
    where = "http://there:1/v1/policies/a%20b/promotion"
    actions = [("POST", where, {"action": action}) for action in ("promote", "undo")]
    assert seen == [("GET", where, None), *actions]
    monkeypatch.setenv("COMPOSER_PORT", "8123")
    assert run("promote", "a b", "--do", "--any-look")[0] == 0
    own = "http://127.0.0.1:8123/v1/policies/a%20b/promotion"
    assert seen[-1] == ("POST", own, {"action": "promote", "any_look": True})
    code, out, _ = run("promote", "a b")
    assert code == 0
    assert "0123456789ab serves, ba9876543210 in shadow" in out
    assert "+0.200 (+0.010 to +0.390)" in out
    assert "40 judged requests, worth 12 equally weighted ones" in out
    assert "yes by this look alone, no however often one looks (at least -0.300)" in out
    assert "late feedback" not in out
    monkeypatch.setitem(STATUS, "series_ended", True)
    assert "which are full: late feedback alone moves it" in run("promote", "a b")[1]
    assert run("promote", "a b", "--any-look")[0] == 2
    monkeypatch.setattr(httpx, "post", lambda url, json, **_: answer("POST", url, json, 409))
    code, _, err = run("promote", "auto", "--do")
    assert (code, err.strip()) == (1, "not better; wait")
    assert run("promote", "auto", "--do", "--undo")[0] == 2


def test_promote_without_a_service_says_so() -> None:
    code, _, err = run("promote", "auto", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "no service answers at http://127.0.0.1:1" in err
