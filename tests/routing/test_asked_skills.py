"""Skills that an LLM names: which of a profile's they become, and a router that reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.routing.artefact import ArtefactError
from composer.routing.asked_skills import AskedSkills, AskedSkillsSettings
from composer.routing.base import Query
from composer.routing.family import BySkills
from composer.routing.learned import LearnedRouter, LearnedSettings
from composer.routing.online import OnlineRouter, OnlineSettings
from composer.types import Chunk, Expert
from router_training.train import train
from tests.router_training.synthetic import KINDS, stamp, table
from tests.routing.helpers import WordEmbedder
from tests.routing.test_llm import Llm, refuse

NAMES = ("algebra", "old poems")
WISE = AskedSkillsSettings(expert="wise")


def asked(**settings: Any) -> AskedSkills:
    made = AskedSkillsSettings(expert="wise", **settings)
    return AskedSkills.build(made, NAMES, WordEmbedder())


async def test_what_samples_agree_on_becomes_the_nearest_skills() -> None:
    said = iter(["poems, algebra", "Poems", "new poems", "algebra", "chess"])
    llm = Llm(lambda _: next(said))
    skills, told = await asked().infer(Query("why?"), llm)
    assert skills == (1, 0)
    assert told["asked"]["keywords"] == ["poems", "algebra"]
    assert told["asked"]["skills"] == ["old poems", "algebra"]
    assert told["asked"]["calls"] == 5
    assert sorted(s.seed for s in llm.sampling if s.seed is not None) == [0, 1, 2, 3, 4]
    assert {s.temperature for s in llm.sampling} == {0.7}
    assert "<<<\nwhy?\n>>>" in llm.questions[0]


async def test_several_keywords_of_one_skill_count_once() -> None:
    skills, _ = await asked(samples=1).infer(Query("?"), Llm(lambda _: "poems, old, algebra"))
    assert skills == (1, 0)


@pytest.mark.parametrize(
    ("llm", "failed"),
    [(None, "not_asked"), (Llm(refuse), "engine_unavailable"), (Llm(lambda _: "42"), "nonsense")],
)
async def test_without_usable_words_there_are_none(llm: Llm | None, failed: str) -> None:
    skills, told = await asked().infer(Query("?"), llm)
    assert skills == ()
    assert told["asked"]["failed"] == failed


async def test_samples_that_failed_agree_on_nothing() -> None:
    answers = iter(["algebra", "", "", "", ""])
    skills, _ = await asked().infer(Query("?"), Llm(lambda _: next(answers)))
    assert skills == ()


class Hanging(Llm):
    """One of its answers never comes."""

    async def __call__(self, expert: str, **asked: Any) -> AsyncGenerator[Chunk, None]:
        if asked["sampling"].seed == 1:
            try:
                await asyncio.Event().wait()
            finally:
                self.closed += 1
        async for chunk in super().__call__(expert, **asked):
            yield chunk


async def test_one_sample_that_hangs_holds_up_nothing() -> None:
    llm = Hanging(lambda _: "algebra")
    async with asyncio.timeout(20):
        skills, told = await asked(timeout_s=600).infer(Query("?"), llm)
    assert skills == (0,)
    assert told["asked"]["unanswered"] == {"late": 1}
    assert "failed" not in told["asked"]
    assert llm.closed == 5  # no call is left behind
    batch = asyncio.ensure_future(asked().infer(Query("?", patient=True), Hanging(lambda _: "x")))
    done, _ = await asyncio.wait([batch], timeout=0.5)
    assert not done
    batch.cancel()


async def test_samples_that_failed_beside_skills_that_are_used_are_no_failure() -> None:
    answers = iter(["algebra", "", "algebra", "algebra", "algebra"])
    skills, told = await asked().infer(Query("?"), Llm(lambda _: next(answers)))
    assert skills == (0,)
    assert told["asked"]["unanswered"] == {"empty": 1}
    assert "failed" not in told["asked"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills") / "router"
    train(table(200), "skills", WordEmbedder().encode, stamp()).artefact().save(folder)
    return folder


def experts() -> list[Expert]:
    return [Expert(id=id_, server="s") for id_ in table(10).experts]


def router(folder: Path, **settings: Any) -> LearnedRouter:
    own = LearnedSettings(artefact=folder, **settings)
    LearnedRouter.check(experts(), own)
    return LearnedRouter.build(experts(), own, WordEmbedder())


async def test_a_learned_router_reads_profiles_at_the_skills_named(folder: Path) -> None:
    one = router(folder, skills=WISE)
    assert one.asked == LearnedRouter.asks(LearnedSettings(artefact=folder, skills=WISE)) == "wise"
    family = one.model.family
    assert isinstance(family, BySkills)
    assert set(family.names) == set(KINDS)
    for number, name in enumerate(family.names):
        llm = Llm(lambda _, name=name: name)  # type: ignore[misc]
        found = await one.score(Query("anything at all"), np.ones(3, np.bool_), llm)
        raw = family.predict_skills(family.weights_of([number]))
        np.testing.assert_allclose(found.quality, one.model.calibration.quality(raw)[0][0])
        assert found.told["asked"]["skills"] == [name]
    text = table(200).text[0]
    alone = await one.score(Query(text), np.ones(3, np.bool_))
    plain = await router(folder).score(Query(text), np.ones(3, np.bool_))
    np.testing.assert_array_equal(alone.quality, plain.quality)
    assert alone.told["asked"]["failed"] == "not_asked"
    assert plain.told == {}
    assert router(folder).asked is None


async def test_experts_may_be_drawn_by_their_scores(folder: Path) -> None:
    text = table(200).text[0]
    plain = await router(folder).score(Query(text), np.ones(3, np.bool_))
    assert plain.exploration is None
    for draw in ("distinct", "with_replacement"):
        found = await router(folder, draw=draw).score(Query(text), np.ones(3, np.bool_))
        np.testing.assert_array_equal(found.quality, plain.quality)  # whatever is drawn
        exploration = found.exploration
        assert exploration is not None
        assert exploration.chances is not None
        assert exploration.chances.sum() == pytest.approx(1)
        assert exploration.replacement == (draw == "with_replacement")


def test_what_does_not_go_together_is_refused_at_check(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "category"
    train(table(120), "category", WordEmbedder().encode, stamp()).artefact().save(other)
    for settings, said in (
        ({"skills": WISE}, "`skills` needs an artefact of the family skills"),
        ({"draw": "distinct"}, "`draw` needs an artefact of the family skills"),
    ):
        with pytest.raises(ArtefactError, match=said):
            router(other, **settings)
    late = [*experts(), Expert(id="late", server="s", description="poems")]
    joining = LearnedSettings(artefact=folder, draw="distinct", unknown="join")
    with pytest.raises(ArtefactError, match="'late' joined without one"):
        LearnedRouter.check(late, joining)
    with pytest.raises(ArtefactError, match="a shadow is compared with plain decisions"):
        router(folder, skills=WISE, shadow={"artefact": other})
    nameless = table(120)
    made_up = tmp_path / "made-up"
    nameless = replace(nameless, category=("",) * 120)
    train(nameless, "skills", WordEmbedder().encode, stamp()).artefact().save(made_up)
    with pytest.raises(ArtefactError, match="were made up and have no names"):
        router(made_up, skills=WISE)
    online = OnlineSettings(base=LearnedSettings(artefact=folder, draw="distinct"))
    with pytest.raises(ValueError, match="cannot `draw` experts"):
        OnlineRouter.check(experts(), online)
    asking = OnlineSettings(base=LearnedSettings(artefact=folder, skills=WISE))
    assert OnlineRouter.asks(asking) == "wise"
