"""An evaluation as one page of HTML that needs nothing else. Measures nothing itself, and knows no
section by what it says."""

from __future__ import annotations

from importlib.resources import files

from router_training.cells import counted
from router_training.criterion import need_decisions
from router_training.errors import TrainingError
from router_training.evaluate import Evaluation
from router_training.page import Section
from router_training.portrait import backdrop_of, portrait_of
from router_training.sections import Drawn, calibration, choices, costs, parts, summary


def report(evaluation: Evaluation, data: str, *, seed: int = 0) -> str:
    """The page. `data` is what the outcomes are called. Raises TrainingError where a package of the
    extra `training` is missing."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise TrainingError(
            "reports need the package jinja2; pip install 'composer[training]'"
        ) from error
    outcomes = evaluation.outcomes
    need_decisions(outcomes, "the report")
    backdrop = backdrop_of(outcomes, evaluation.yardstick, seed=seed)
    drawn = [
        Drawn(judged, portrait_of(outcomes, judged.predicted, judged.expected_cost, seed=seed))
        for judged in evaluation.artefacts
    ]
    sections = [
        summary(evaluation),
        costs(drawn, backdrop),
        parts(drawn, backdrop),
        choices(drawn, backdrop),
        calibration(drawn),
    ]
    source = files("router_training").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    routers = counted(len(drawn), "router")
    return page.from_string(source).render(
        data=data,
        overlaps=[
            f"{d.name}: {told}." for d in drawn if (told := d.judged.overlap.sentence) is not None
        ],
        intro=f"{routers} judged on {len(outcomes):,} questions with outcomes of "
        f"{counted(len(outcomes.experts), 'expert')}, beside what needs no router.",
        sections=[
            {name: getattr(s, name) for name in Section.__slots__} | {"svg": Markup(s.svg)}
            for s in sections
        ],
    )
