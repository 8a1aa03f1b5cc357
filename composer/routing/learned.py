"""Serves what training made: an artefact of any family as a router. Knows no family by name but
through `families.FAMILIES`, and fits nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from composer.routing.artefact import (
    MANIFEST,
    Artefact,
    ArtefactError,
    EmbedderStamp,
    Manifest,
    read_manifest,
)
from composer.routing.base import Embedder, Exploration, Query, Scores
from composer.routing.costs import CostModel
from composer.routing.curve import Curve
from composer.routing.families import FAMILIES
from composer.routing.family import Family, State, predicted
from composer.routing.outcome_calibration import OutcomeCalibration
from composer.routing.reading import Reading, read
from composer.routing.views import Encode, Features, Views
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
    shadow: ShadowSettings | None = Field(
        None, description="An artefact that may be promoted once it proved better."
    )

    @property
    def of_shadow(self) -> LearnedSettings | None:
        """What the shadow would be served with."""
        if self.shadow is None:
            return None
        return LearnedSettings(artefact=self.shadow.artefact, names=self.names)

    @property
    def exchanged(self) -> LearnedSettings:
        """The shadow serves, and the artefact that served runs in its shadow."""
        if self.shadow is None:
            return self
        shadow = self.shadow.model_copy(update={"artefact": self.artefact})
        return self.model_copy(update={"artefact": self.shadow.artefact, "shadow": shadow})


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """(n, E) each, in the order of the artefact's experts: calibrated expected quality, its
    standard deviation, and expected US dollars of the call, None where no price was known."""

    quality: FloatArray
    uncertainty: FloatArray
    cost: FloatArray | None


class LearnedModel:
    """Views, family, calibration and costs in a row: texts in, scores out. Only read."""

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        family: Family,
        calibration: OutcomeCalibration,
        costs: CostModel | None,
    ) -> None:
        self.manifest = manifest
        self.experts = tuple(expert.id for expert in manifest.experts)
        self.views = views
        self.family = family
        self.calibration = calibration
        self.costs = costs

    @classmethod
    def of(cls, artefact: Artefact) -> LearnedModel:
        """Raises ArtefactError for a family that this program does not know, or settings or
        arrays that the family cannot be restored from."""
        manifest, states = artefact.manifest, artefact.states
        kind = FAMILIES.get(manifest.family)
        if kind is None:
            known = ", ".join(sorted(FAMILIES))
            raise ArtefactError(
                f"the artefact's family {manifest.family!r} is not known here (known: {known}); "
                "train it again, or update this program"
            )
        try:
            settings = kind.settings.model_validate(manifest.settings)
            return cls(
                manifest,
                Views.restore(states["views"]),
                kind.restore(states["family"], settings),
                OutcomeCalibration.restore(states["calibration"]),
                CostModel.restore(states["costs"]) if "costs" in states else None,
            )
        except (KeyError, ValueError) as error:
            raise ArtefactError(
                f"the artefact's {manifest.family} cannot be restored ({error}); train it again"
            ) from error

    def artefact(self) -> Artefact:
        states: dict[Any, State] = {
            "views": self.views.state(),
            "family": self.family.state(),
            "calibration": self.calibration.state(),
        }
        if self.costs is not None:
            states["costs"] = self.costs.state()
        return Artefact(self.manifest, states)

    def score(self, texts: Sequence[str], encode: Encode) -> Scored:
        return self.score_features(self.views.transform(texts, encode))

    def score_read(self, readings: Sequence[Reading], encode: Encode) -> Scored:
        """As `score`, of texts that were read before."""
        return self.score_features(self.views.of(readings, encode))

    def score_features(self, features: Features) -> Scored:
        said = predicted(self.family, features)
        quality, uncertainty = self.calibration.quality(said.quality, said.signs)
        cost = None if self.costs is None else self.costs.predict(features)
        return Scored(quality, uncertainty, cost)


class LearnedRouter:
    """A policy's experts scored by an artefact. Experts that the policy leaves out, or that are not
    eligible, change nothing for the rest: every expert is scored for itself."""

    name: ClassVar[str] = "learned"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "that of the artefact's family"
    settings: ClassVar[type[BaseModel]] = LearnedSettings
    needs_texts: ClassVar[bool] = False
    path_fields: ClassVar[tuple[str, ...]] = ("artefact", "shadow.artefact")
    asked: str | None = None

    def __init__(
        self,
        experts: tuple[str, ...],
        model: LearnedModel,
        columns: list[int],
        embedder: Embedder,
        settings: LearnedSettings,
        shadow: LearnedRouter | None = None,
    ) -> None:
        self.experts = experts
        self.model = model
        self._columns = columns
        self._embedder = embedder
        self._settings = settings
        self.artefact = self.digest(LearnedSettings(artefact=settings.artefact))
        self.shadow = shadow

    @property
    def curve(self) -> Curve | None:
        """That of the artefact, which holds for all its experts together: None where the policy
        has only some of them."""
        whole = sorted(self._columns) == list(range(len(self.model.experts)))
        return self.model.manifest.curve if whole else None

    @classmethod
    def asks(cls, settings: LearnedSettings) -> str | None:
        return None

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
        cls, experts: Sequence[Expert], settings: LearnedSettings, *, needs_curve: bool = False
    ) -> None:
        """Reads the manifest only. Raises ValueError (ArtefactError) where an expert is unknown to
        the artefact, the folder is none, or a curve is needed that it does not have."""
        manifest = read_manifest(settings.artefact)
        columns = _columns(manifest, experts, settings)
        if (shadow := settings.of_shadow) is not None:
            cls.check(experts, shadow, needs_curve=needs_curve)
        if not needs_curve:
            return
        if manifest.curve is None:
            raise ArtefactError(
                "`quality` and `max_cost` need outcomes with costs, and the artefact "
                f"{settings.artefact} was trained without; train it again with prices, or leave "
                "them out"
            )
        if len(manifest.experts) in columns:
            raise ArtefactError(
                "`quality` and `max_cost` need the cost of every expert, and `names` says of one "
                "that the artefact does not know it; leave that expert out, or the aim"
            )
        if left := [e.id for i, e in enumerate(manifest.experts) if i not in columns]:
            raise ArtefactError(
                "`quality` and `max_cost` hold for all the artefact's experts together, and the "
                f"policy leaves out {left[0]!r}; train one for the policy's experts, or leave "
                "them out"
            )

    @classmethod
    def build(
        cls, experts: Sequence[Expert], settings: LearnedSettings, embedder: Embedder
    ) -> LearnedRouter:
        artefact = Artefact.load(settings.artefact)
        columns = _columns(artefact.manifest, experts, settings)
        check_embedder(artefact.manifest, embedder, settings.artefact)
        ids = tuple(expert.id for expert in experts)
        model = LearnedModel.of(artefact)
        shadow = None
        if (other := settings.of_shadow) is not None:
            shadow = cls.build(experts, other, embedder)
        return cls(ids, model, columns, embedder, settings, shadow)

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        readings = [read(query.text)]
        wanted = self.model.views.encoded(readings)
        vectors = await asyncio.gather(*(self._embedder.embed(text) for text in wanted))
        known = dict(zip(wanted, vectors, strict=True))

        def encode(texts: Sequence[str]) -> FloatArray:
            return np.stack([known[text] for text in texts])

        scored = await asyncio.to_thread(self.model.score_read, readings, encode)
        # One more column, for those whom the artefact does not know.
        quality = np.append(scored.quality[0], np.float32(0))[self._columns]
        uncertainty = np.append(scored.uncertainty[0], np.float32(0))[self._columns]
        quality[~eligible] = np.nan
        uncertainty[~eligible] = np.nan
        cost = None
        if scored.cost is not None:
            cost = np.append(scored.cost[0], scored.cost[0].max())[self._columns]
        tried = self._settings.shadow
        exploration = None if tried is None else Exploration(tried.explore, thompson=False)
        return Scores(self.experts, quality, uncertainty, self._reasons(quality), cost, exploration)

    def _reasons(self, quality: FloatArray) -> Mapping[str, Mapping[str, Any]]:
        """How far the query moves the best few from their mean quality."""
        best = np.argsort(-np.nan_to_num(quality, nan=-np.inf), kind="stable")[:EXPLAINED]
        stamps = self.model.manifest.experts
        return {
            self.experts[i]: {
                "family": self.model.manifest.family,
                "mean_quality": round(stamps[self._columns[i]].quality, 4),
            }
            for i in best
            if not np.isnan(quality[i]) and self._columns[i] < len(stamps)
        }


def check_embedder(manifest: Manifest, embedder: Embedder | EmbedderStamp, folder: Path) -> None:
    """Raises ArtefactError where the artefact was fitted on another embedder's vectors."""
    asked = manifest.embedder
    if (asked.digest, asked.dim) != (embedder.digest, embedder.dim):
        raise ArtefactError(
            f"{folder} was trained on vectors of {asked.id} ({asked.digest[:12]}), and this "
            f"service embeds with {embedder.id} ({embedder.digest[:12]}); set COMPOSER_EMBEDDER, "
            "or train it again"
        )


def _columns(manifest: Manifest, experts: Sequence[Expert], settings: LearnedSettings) -> list[int]:
    """Where each expert stands in the artefact, behind all of its own where `names` says that it
    is unknown there."""
    place: dict[str | None, int] = {s.id: column for column, s in enumerate(manifest.experts)}
    place[None] = len(place)
    names = [settings.names.get(expert.id, expert.id) for expert in experts]
    if unknown := sorted(name for name in set(names) - place.keys() if name is not None):
        theirs = sorted(stamp.id for stamp in manifest.experts)
        known = ", ".join(theirs[:8]) + (", …" if len(theirs) > 8 else "")
        raise ArtefactError(
            f"the artefact {settings.artefact} knows nothing of {unknown[0]!r} (it knows {known}); "
            "train it again with that expert's outcomes, leave the expert out of the policy, or "
            "give its name there in `names`"
        )
    return [place[name] for name in names]
