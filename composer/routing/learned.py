"""Serves what training made: an artefact of any family as a router. Knows nothing of what is in it
but its manifest, and that some families go by skills; fits nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from composer.errors import check_all
from composer.routing.aims import beyond
from composer.routing.artefact import (
    MANIFEST,
    Artefact,
    ArtefactError,
    JoinedStamp,
    Manifest,
    packed_arrays,
    read_manifest,
)
from composer.routing.asked_skills import AskedSkills, AskedSkillsSettings
from composer.routing.base import NO_DEMANDS, Demands, Embedder, Exploration, Query, Scores
from composer.routing.curve import Curve
from composer.routing.families import FAMILIES
from composer.routing.family import BySkills
from composer.routing.model import LearnedModel, Scored, check_embedder
from composer.routing.reading import Reading, read
from composer.routing.views import Encode
from composer.types import Ask, BoolArray, Expert, FloatArray, Tier

EXPLAINED = 5
"""Experts of a decision whose reasons are told."""


class ShadowSettings(BaseModel):
    """Another artefact, tried beside the one that serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artefact: Path = Field(description="Scored off the answers' way; its choices are recorded.")
    explore: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Share of requests spread evenly over all eligible experts: without it nothing "
        "would be known of what only the shadow would choose.",
    )


class LearnedSettings(BaseModel):
    """Which artefact, and what the experts are called in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artefact: Path = Field(description="The folder that `router-training train --out` wrote.")
    names: Mapping[str, str | None] = Field(
        {},
        description="Expert id → its name in the artefact, where the two differ; null for one that "
        "it does not know: its quality is 0, so that it answers as the default expert alone.",
    )
    unknown: Literal["refuse", "join"] = Field(
        "refuse",
        description="What to do with an expert that the artefact does not know: refuse the policy, "
        "or have it join by its examples, description and skills.",
    )
    shadow: ShadowSettings | None = Field(
        None, description="An artefact that may be promoted once it proved better."
    )

    skills: AskedSkillsSettings | None = Field(
        None,
        description="Artefacts of the family `skills`: an LLM names the skills a query asks for, "
        "in place of the embedding.",
    )
    draw: Literal["distinct", "with_replacement"] | None = Field(
        None,
        description="Artefacts of the family `skills`: the policy's k experts are drawn in "
        "proportion to their scores, each once or as often as it is drawn; null: the best k.",
    )

    @property
    def of_shadow(self) -> LearnedSettings | None:
        """What the shadow would be served with."""
        if self.shadow is None:
            return None
        return LearnedSettings(
            artefact=self.shadow.artefact, names=self.names, unknown=self.unknown
        )

    @property
    def exchanged(self) -> LearnedSettings:
        """The shadow serves, and the artefact that served runs in its shadow."""
        if self.shadow is None:
            return self
        shadow = self.shadow.model_copy(update={"artefact": self.artefact})
        return self.model_copy(update={"artefact": self.shadow.artefact, "shadow": shadow})


class LearnedRouter:
    """A policy's experts scored by an artefact. Experts that the policy leaves out, or that are not
    eligible, change nothing for the rest: every expert is scored for itself."""

    name: ClassVar[str] = "learned"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "that of the artefact's family"
    settings: ClassVar[type[BaseModel]] = LearnedSettings
    needs_texts: ClassVar[bool] = False
    path_fields: ClassVar[tuple[str, ...]] = ("artefact", "shadow.artefact")

    def __init__(
        self,
        experts: tuple[str, ...],
        model: LearnedModel,
        columns: list[int],
        embedder: Embedder,
        settings: LearnedSettings,
        shadow: LearnedRouter | None = None,
        skills: AskedSkills | None = None,
    ) -> None:
        self.experts = experts
        self.asked = None if skills is None else skills.expert
        self._skills = skills
        self.model = model
        self._columns = columns
        self._embedder = embedder
        self._settings = settings
        self.artefact = self.digest(LearnedSettings(artefact=settings.artefact))
        self.shadow = shadow
        self.curve = self._curve()

    def _curve(self) -> Curve | None:
        """That of the artefact, which holds for decisions by the scores of the experts that it was
        trained on, together: None where the policy lacks one, has one that joined, or decides by
        skills that are asked for, or draws."""
        whole = sorted(self._columns) == list(range(len(self.model.manifest.experts)))
        curve = self.model.manifest.curve
        if curve is None or not whole or _otherwise_decided(self._settings):
            return None
        names = [stamp.id for stamp in self.model.manifest.experts]
        ids = {names[c]: id_ for c, id_ in zip(self._columns, self.experts, strict=True)}
        points = tuple(
            point
            if point.expert is None
            else point.model_copy(update={"expert": ids[point.expert]})
            for point in curve.points
        )
        return curve.model_copy(update={"points": points})

    @classmethod
    def asks(cls, settings: LearnedSettings) -> str | None:
        return None if settings.skills is None else settings.skills.expert

    @classmethod
    def digest(cls, settings: LearnedSettings) -> str:
        """Of the manifest, which names the arrays by theirs, and of the shadow's."""
        try:
            own = hashlib.sha256((settings.artefact / MANIFEST).read_bytes()).hexdigest()
        except OSError:
            return ""
        shadow = settings.of_shadow
        return own if shadow is None else f"{own}+{cls.digest(shadow)}"

    @classmethod
    def check(
        cls, experts: Sequence[Expert], settings: LearnedSettings, demands: Demands = NO_DEMANDS
    ) -> None:
        """Reads the manifest, and the arrays for their digest alone. Raises ValueError
        (ArtefactError) where the folder is none or damaged, the artefact was fitted on another
        embedder's vectors, an expert is unknown to it (and may not join, or has no text to join
        by), or an aim is demanded that it cannot be held to; Misfits
        where that is so of it and of the shadow, which is checked likewise."""
        both = [each for each in (settings, settings.of_shadow) if each is not None]
        check_all(*(partial(cls._check_own, experts, each, demands) for each in both))

    @classmethod
    def _check_own(
        cls, experts: Sequence[Expert], settings: LearnedSettings, demands: Demands
    ) -> None:
        """But for the shadow."""
        manifest = read_manifest(settings.artefact)
        packed_arrays(settings.artefact, manifest)
        if demands.embedder is not None:
            check_embedder(manifest, demands.embedder, settings.artefact)
        new = _new(manifest.known, experts, settings)
        _check_skills(manifest, settings, new)
        if demands.curve:
            _check_curve(manifest, experts, settings, new, demands.quality)

    @classmethod
    def build(
        cls, experts: Sequence[Expert], settings: LearnedSettings, embedder: Embedder
    ) -> LearnedRouter:
        artefact = Artefact.load(settings.artefact)
        check_embedder(artefact.manifest, embedder, settings.artefact)
        ids = tuple(expert.id for expert in experts)
        model = LearnedModel.of(artefact)
        for name, claims in _new(model.experts, experts, settings).items():
            model = model.joined(name, claims, embedder.encode)
        # Behind all of its own, whom `names` says that it does not know.
        place: dict[str | None, int] = {name: i for i, name in enumerate(model.experts)}
        place[None] = len(place)
        columns = [place[settings.names.get(id_, id_)] for id_ in ids]
        shadow = None
        if (other := settings.of_shadow) is not None:
            shadow = cls.build(experts, other, embedder)
        skills = None
        if settings.skills is not None and isinstance(model.family, BySkills):
            skills = AskedSkills.build(settings.skills, model.family.names, embedder)
        return cls(ids, model, columns, embedder, settings, shadow, skills)

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        readings = [read(query.text)]
        encode = await self._encoder(readings)
        skills, told = await self._asked_skills(query, ask)
        scored = await asyncio.to_thread(self.model.score_read, readings, encode, skills)
        quality = self._of_policy(scored.quality[0], 0)
        uncertainty = self._of_policy(scored.uncertainty[0], 0)
        quality[~eligible] = np.nan
        uncertainty[~eligible] = np.nan
        return Scores(
            self.experts,
            quality,
            uncertainty,
            self._reasons(quality),
            self._cost(scored),
            self._exploration(scored),
            told,
        )

    async def _encoder(self, readings: Sequence[Reading]) -> Encode:
        """Of the texts that are read of these queries, embedded beforehand in one batch with those
        of other requests."""
        wanted = self.model.views.encoded(readings)
        vectors = await asyncio.gather(*(self._embedder.embed(text) for text in wanted))
        known = dict(zip(wanted, vectors, strict=True))
        return lambda texts: np.stack([known[text] for text in texts])

    async def _asked_skills(
        self, query: Query, ask: Ask | None
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """The skills that an LLM named, none where it is not asked, and what is told of that."""
        if self._skills is None:
            return (), {}
        return await self._skills.infer(query, ask)

    def _of_policy(self, row: FloatArray, unknown: float) -> FloatArray:
        """(A,) of the artefact's experts → (E,) of the policy's, `unknown` for those whom `names`
        says that it does not know."""
        return np.asarray(np.append(row, np.float32(unknown))[self._columns])

    def _cost(self, scored: Scored) -> FloatArray | None:
        """(E,), an unknown one's that of the dearest. None where one joined without a price."""
        if scored.cost is None:
            return None
        cost = self._of_policy(scored.cost[0], float(np.nanmax(scored.cost[0])))
        return None if np.isnan(cost).any() else cost

    def _exploration(self, scored: Scored) -> Exploration | None:
        if self._settings.draw is not None and scored.chances is not None:
            chances = self._of_policy(scored.chances[0], 0)
            replacement = self._settings.draw == "with_replacement"
            return Exploration(0.0, chances=chances, replacement=replacement)
        shadow = self._settings.shadow
        return None if shadow is None else Exploration(shadow.explore)

    def _reasons(self, quality: FloatArray) -> Mapping[str, Mapping[str, Any]]:
        """How far the query moves the best few from their mean quality, and what is known of those
        that joined."""
        best = np.argsort(-np.nan_to_num(quality, nan=-np.inf), kind="stable")[:EXPLAINED]
        manifest = self.model.manifest
        stamps = (*manifest.experts, *manifest.joined)
        told: dict[str, dict[str, Any]] = {}
        for i in best:
            if np.isnan(quality[i]) or self._columns[i] == len(stamps):
                continue
            stamp = stamps[self._columns[i]]
            mean = {"family": manifest.family, "mean_quality": round(stamp.quality, 4)}
            if isinstance(stamp, JoinedStamp):
                mean["joined"] = {"outcomes": stamp.outcomes, "claims": stamp.claims}
            told[self.experts[i]] = mean
        return told


def _check_curve(
    manifest: Manifest,
    experts: Sequence[Expert],
    settings: LearnedSettings,
    new: Mapping[str, object],
    quality: float | None,
) -> None:
    """Raises ArtefactError where the artefact has no curve, its curve is not one of these experts
    together and of decisions as they are made here, or it does not reach `quality`."""
    if manifest.curve is None:
        raise ArtefactError(
            "`quality` and `max_cost` need outcomes with costs, and the artefact "
            f"{settings.artefact} was trained without; train it again with prices, or leave "
            "them out"
        )
    if said := _otherwise_decided(settings):
        raise ArtefactError(
            f"`quality` and `max_cost` hold for decisions by scores, and `{said[0]}` makes others; "
            "leave out one of the two"
        )
    names = [settings.names.get(expert.id, expert.id) for expert in experts]
    if None in names:
        raise ArtefactError(
            "`quality` and `max_cost` need the cost of every expert, and `names` says of one "
            "that the artefact does not know it; leave that expert out, or the aim"
        )
    late = [*(stamp.id for stamp in manifest.joined if stamp.id in names), *new]
    if late:
        raise ArtefactError(
            "`quality` and `max_cost` hold for the experts that the artefact was trained on, "
            f"together, and {late[0]!r} joined later; train it again with that one's outcomes, "
            "or leave them out"
        )
    if left := [stamp.id for stamp in manifest.experts if stamp.id not in names]:
        raise ArtefactError(
            "`quality` and `max_cost` hold for all the artefact's experts together, and the "
            f"policy leaves out {left[0]!r}; train one for the policy's experts, or leave "
            "them out"
        )
    if quality is not None and (refused := beyond(manifest.curve, quality)) is not None:
        raise ArtefactError(refused)


def _otherwise_decided(settings: LearnedSettings) -> list[str]:
    """The settings by which decisions are not those that the artefact's measures tell of."""
    return [name for name in ("skills", "draw") if getattr(settings, name) is not None]


def _check_skills(manifest: Manifest, settings: LearnedSettings, new: Mapping[str, object]) -> None:
    """Raises ArtefactError where an LLM is to name skills, or experts are to be drawn, and this
    artefact, a shadow beside it or an expert that joins does not allow that."""
    said = _otherwise_decided(settings)
    if not said:
        return
    kind: Any = FAMILIES.get(manifest.family)
    if not hasattr(kind, "predict_skills"):
        raise ArtefactError(
            f"`{said[0]}` needs an artefact of the family skills, and {settings.artefact} is one "
            f"of {manifest.family}; train it with `--router skills`, or leave the setting out"
        )
    if settings.shadow is not None:
        raise ArtefactError(
            f"a shadow is compared with plain decisions, and `{said[0]}` makes others; leave out "
            "one of the two"
        )
    if settings.draw is not None and (late := [*(s.id for s in manifest.joined), *new]):
        raise ArtefactError(
            f"`draw` needs a profile of every expert, and {late[0]!r} joined without one; train "
            "the artefact again with that one's outcomes, or leave `draw` out"
        )
    names = manifest.values.get("family", {}).get("names", ())
    if settings.skills is not None and not kind.named(names):
        raise ArtefactError(
            f"the skills of {settings.artefact} were made up and have no names that an LLM could "
            "mean; train it on categories or with `--skills`, or leave `skills` out"
        )


def _new(
    known: Sequence[str], experts: Sequence[Expert], settings: LearnedSettings
) -> dict[str, tuple[str, ...]]:
    """By name, what the experts say of themselves that the artefact does not know. Raises
    ArtefactError where they may not join, or one of them says nothing."""
    new: dict[str, tuple[str, ...]] = {}
    for expert in experts:
        name = settings.names.get(expert.id, expert.id)
        if name is None or name in known:
            continue
        if settings.unknown == "refuse":
            some = ", ".join(sorted(known)[:8]) + (", …" if len(known) > 8 else "")
            raise ArtefactError(
                f"the artefact {settings.artefact} knows nothing of {name!r} (it knows {some}); "
                "train it again with that expert's outcomes, leave the expert out of the policy, "
                "give its name there in `names` (null: it answers as the default expert alone), or "
                "let it join (`unknown: join`)"
            )
        new[name] = claims_of(expert)
        if not new[name]:
            raise ArtefactError(
                f"the artefact {settings.artefact} knows nothing of {name!r}, which says nothing "
                "of itself to join by; give it `examples` or a `description`"
            )
    return new


def claims_of(expert: Expert) -> tuple[str, ...]:
    """The texts by which an expert joins: what it says it is for, each once."""
    texts = (*expert.examples, expert.description, *expert.skills)
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
