"""An expert joins an artefact: everybody else stays as they were to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from composer.routing.artefact import ArtefactError
from composer.routing.base import Demands, Query
from composer.routing.joining import MAX_OUTCOMES
from composer.routing.learned import LearnedRouter, LearnedSettings
from composer.routing.model import LearnedModel
from composer.routing.outcomes import Outcomes
from router_training import load_router
from router_training.cli import app
from router_training.embedding import Embedding
from router_training.errors import TrainingError
from router_training.joining import join
from router_training.progress import Progress
from router_training.train import train
from router_training.vectors import KeptVectors
from tests.router_training.synthetic import stamp, table, write_table
from tests.routing.helpers import WordEmbedder, expert

EMBEDDER = WordEmbedder()
ENCODE = EMBEDDER.encode
TEXTS = table(60, seed=9).text
EXAMPLES = ("sonnet rhyme stanza ballad", "elegy couplet haiku metre", "rhyme haiku ballad elegy")

pytestmark = pytest.mark.usefixtures("short_grids")


@pytest.fixture(scope="module")
def model() -> LearnedModel:
    """Knows `algebra` and `cheap`, and not `poems`."""
    return train(table().of(["algebra", "cheap"]), "category", ENCODE, stamp())


@pytest.mark.parametrize("outcomes", [0, 4, 64])
def test_everybody_elses_scores_stay_the_same_to_the_last_bit(
    model: LearnedModel, outcomes: int, tmp_path: Path
) -> None:
    some = table(outcomes, seed=3) if outcomes else None
    joined = join(model, "poems", ENCODE, claims=EXAMPLES, outcomes=some)
    before, after = model.score(TEXTS, ENCODE), joined.score(TEXTS, ENCODE)
    assert joined.experts == ("algebra", "cheap", "poems")
    for name in ("quality", "uncertainty", "cost"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name)[:, :2])
    joined.artefact().save(tmp_path / "new")
    loaded = load_router(tmp_path / "new", EMBEDDER)
    np.testing.assert_array_equal(loaded.score(TEXTS).quality, after.quality)
    gone = loaded.model.without("poems")
    assert gone.manifest.experts == model.manifest.experts
    np.testing.assert_array_equal(gone.score(TEXTS, ENCODE).quality, before.quality)
    (said,) = joined.manifest.joined
    assert (said.outcomes, said.claims) == (outcomes, 3)
    assert (said.cost is None) == (outcomes == 0)


WORDS = {
    "cooking": "oven butter flour simmer roast whisk dough pan",
    "sailing": "mast anchor rudder harbour keel tide knot deck",
    "chess": "rook bishop castle gambit pawn checkmate opening queen",
    "law": "court statute appeal verdict clause plaintiff tort judge",
    "poems": "sonnet rhyme stanza ballad metre elegy couplet haiku",
}


def specialists(n: int, kinds: Sequence[str], seed: int = 0) -> Outcomes:
    """Questions of these kinds, each of which the expert of its name alone can answer."""
    rng = np.random.default_rng(seed)
    of = [kinds[i] for i in rng.integers(len(kinds), size=n)]
    text = tuple(" ".join(rng.choice(WORDS[kind].split(), 4, replace=False)) for kind in of)
    right = np.array([[kind == expert for expert in WORDS] for kind in of], np.float32)
    nothing = np.full_like(right, np.nan)
    category, group = tuple(of), np.arange(n)
    return Outcomes(tuple(WORDS), text, right, nothing, category, ("words",) * n, group)


def test_it_is_found_for_what_it_says_it_is_for() -> None:
    """The others are good at what they are for, and nobody has seen a question of its kind."""
    known = [kind for kind in WORDS if kind != "poems"]
    model = train(specialists(300, known).of(known), "kernel", ENCODE, stamp())
    joined = join(model, "poems", ENCODE, claims=EXAMPLES)
    judged = specialists(300, list(WORDS), seed=5)
    chosen = joined.score(judged.text, ENCODE).quality.argmax(axis=1)
    own = judged.quality[:, -1] == 1
    assert (chosen[own] == 4).mean() > 0.8
    assert (chosen[~own] == 4).mean() < 0.1


def test_outcomes_overrule_what_is_claimed(model: LearnedModel) -> None:
    bad = table(64, seed=3)
    bad.quality[:, 1] = 0
    joined = join(model, "poems", ENCODE, claims=EXAMPLES, outcomes=bad)
    assert joined.manifest.joined[0].quality < 0.15
    assert joined.score(TEXTS, ENCODE).quality[:, 2].mean() < 0.2


def test_the_cost_of_one_that_joined_follows_the_others(model: LearnedModel) -> None:
    some = table(64, seed=3)
    joined = join(model, "poems", ENCODE, outcomes=some)
    cost = joined.score(TEXTS, ENCODE).cost
    assert cost is not None
    assert cost[:, 2].mean() == pytest.approx(float(some.cost[:, 1].mean()), rel=0.2)
    assert np.corrcoef(cost[:, 2], cost[:, 0])[0, 1] > 0.9


def test_joining_again_takes_the_place_of_what_was_known(model: LearnedModel) -> None:
    once = join(model, "poems", ENCODE, claims=EXAMPLES)
    twice = join(once, "poems", ENCODE, outcomes=table(16, seed=3))
    assert twice.experts == once.experts
    direct = join(model, "poems", ENCODE, outcomes=table(16, seed=3))
    np.testing.assert_array_equal(
        twice.score(TEXTS, ENCODE).quality, direct.score(TEXTS, ENCODE).quality
    )


def test_what_cannot_join_is_refused(model: LearnedModel) -> None:
    with pytest.raises(ArtefactError, match="trained on outcomes of 'algebra'"):
        join(model, "algebra", ENCODE, claims=EXAMPLES)
    with pytest.raises(TrainingError, match="nothing is said of 'poems'"):
        join(model, "poems", ENCODE)
    with pytest.raises(TrainingError, match="train the artefact again"):
        join(model, "poems", ENCODE, outcomes=table(MAX_OUTCOMES + 1))
    with pytest.raises(ArtefactError, match="'poems' did not join"):
        model.without("poems")


# --- served -------------------------------------------------------------------------------

KNOWN = [expert("algebra"), expert("cheap")]
POEMS = expert("team/poems", *EXAMPLES, description="Writes verse.")


@pytest.fixture
def folder(model: LearnedModel, tmp_path: Path) -> Path:
    model.artefact().save(tmp_path / "router")
    return tmp_path / "router"


def settings(folder: Path, **fields: Any) -> LearnedSettings:
    return LearnedSettings(artefact=folder, **{"unknown": "join", **fields})


def test_an_unknown_expert_is_refused_unless_it_may_join(folder: Path) -> None:
    with pytest.raises(ArtefactError, match="or let it join"):
        LearnedRouter.check([*KNOWN, POEMS], settings(folder, unknown="refuse"))
    with pytest.raises(ArtefactError, match="says nothing of itself"):
        LearnedRouter.check([*KNOWN, expert("mute")], settings(folder))
    LearnedRouter.check([*KNOWN, POEMS], settings(folder))


def test_the_curve_is_that_of_those_trained_together(folder: Path) -> None:
    LearnedRouter.check(KNOWN, settings(folder), Demands(curve=True))
    with pytest.raises(ArtefactError, match="'team/poems' joined later"):
        LearnedRouter.check([*KNOWN, POEMS], settings(folder), Demands(curve=True))
    assert LearnedRouter.build(KNOWN, settings(folder), EMBEDDER).curve is not None
    assert LearnedRouter.build([*KNOWN, POEMS], settings(folder), EMBEDDER).curve is None


async def test_an_expert_of_the_policy_joins_by_its_texts(folder: Path) -> None:
    before = LearnedRouter.build(KNOWN, settings(folder), EMBEDDER)
    after = LearnedRouter.build([POEMS, *KNOWN], settings(folder), EMBEDDER)
    everybody = np.ones(3, np.bool_)
    above = []
    for text in (*TEXTS[:5], "haiku ballad rhyme"):
        old = await before.score(Query(text), everybody[:2])
        new = await after.score(Query(text), everybody)
        np.testing.assert_array_equal(new.quality[1:], old.quality)
        assert new.cost is None
        assert new.reasons["team/poems"]["joined"] == {"outcomes": 0, "claims": 4}
        above.append(new.quality[0] - old.quality.mean())
    assert above[-1] == max(above) > 0.03


async def test_who_joined_offline_needs_no_texts_to_be_served(
    model: LearnedModel, tmp_path: Path
) -> None:
    joined = join(model, "poems", ENCODE, outcomes=table(16, seed=3))
    joined.artefact().save(tmp_path / "new")
    given = settings(tmp_path / "new", unknown="refuse", names={"team/poems": "poems"})
    mute = expert("team/poems")
    LearnedRouter.check([*KNOWN, mute], given)
    with pytest.raises(ArtefactError, match="'poems' joined later"):
        LearnedRouter.check([*KNOWN, mute], given, Demands(curve=True))
    router = LearnedRouter.build([*KNOWN, mute], given, EMBEDDER)
    scores = await router.score(Query(TEXTS[0]), np.ones(3, np.bool_))
    expected = joined.score([TEXTS[0]], ENCODE).quality[0]
    np.testing.assert_array_equal(scores.quality, expected)
    assert scores.cost is not None


# --- the command --------------------------------------------------------------------------


REGISTRY = """\
version: 1
servers: {s: {engine: openai, url: "http://127.0.0.1:9/v1", model: m}}
experts:
  poems: {server: s, context_window: 512, description: verse, examples: [sonnet rhyme stanza]}
  mute: {server: s, context_window: 512}
policies: {auto: {router: {name: neighbours}, strategy: {name: single}, experts: [poems]}}
"""


@pytest.fixture
def _words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(progress: Progress) -> Embedding:
        return Embedding(KeptVectors(EMBEDDER, tmp_path / "vectors", progress), ENCODE)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("_words")
def test_join_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    data = write_table(tmp_path / "t.csv", table(16, seed=3))
    (tmp_path / "experts.yaml").write_text(REGISTRY)
    new = tmp_path / "new"
    status, out, err = run(
        "join", "--artefact", folder, "--expert", "poems", "--data", data, "--out", new,
        "--registry", tmp_path / "experts.yaml", "--example", "haiku ballad",
    )  # fmt: skip
    assert status == 0, err
    assert "poems joined 2 experts by 16 outcomes and 3 texts" in out
    assert "cannot aim at `quality` or `max_cost`" in out
    assert load_router(new, EMBEDDER).experts == ("algebra", "cheap", "poems")
    assert load_router(folder, EMBEDDER).experts == ("algebra", "cheap")
    before, after = (load_router(one, EMBEDDER).model.trained for one in (folder, new))
    assert before is not None
    assert after is not None
    assert after.hold(table(16, seed=3).text).all()
    assert len(after.digests) == len(before.digests) + 16
    assert set(before.digests.tolist()) < set(after.digests.tolist())
    status, out, err = run(
        "join", "--artefact", folder, "--expert", "late", "--out", tmp_path / "late",
        "--example", "nothing of the kind",
    )  # fmt: skip
    assert status == 0, err
    assert "(0.00)" not in out
    status, _, err = run("evaluate", "--artefact", new, "--data", data)
    assert status == 0, err


@pytest.mark.usefixtures("_words")
@pytest.mark.parametrize(
    ("expert_id", "says"),
    [
        ("mute", "says nothing of 'mute'"),
        ("nobody", "has no expert 'nobody'"),
        ("algebra", "has no expert 'algebra'"),
    ],
)
def test_what_the_registry_does_not_say(
    folder: Path, tmp_path: Path, expert_id: str, says: str
) -> None:
    (tmp_path / "experts.yaml").write_text(REGISTRY)
    status, _, err = run(
        "join", "--artefact", folder, "--expert", expert_id, "--out", tmp_path / "new",
        "--registry", tmp_path / "experts.yaml",
    )  # fmt: skip
    assert status == 2
    assert says in err
    assert not (tmp_path / "new").exists()
