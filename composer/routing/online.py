"""A router that goes on learning while it serves: a base router's scores, corrected by what
feedback says. Its numbers are `learners.py`; where feedback comes from is not its business."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from composer.errors import check_all
from composer.routing.base import (
    NO_DEMANDS,
    Demands,
    Embedder,
    Exploration,
    Query,
    Router,
    Scores,
)
from composer.routing.curve import Curve
from composer.routing.learned import LearnedRouter, LearnedSettings
from composer.routing.learners import BanditLearner, FullLearner, Learner, Observed
from composer.routing.neighbours import NeighboursRouter, NeighboursSettings
from composer.routing.state import State
from composer.types import Ask, BoolArray, Expert, FloatArray, Tier


class OnlineSettings(BaseModel):
    """What is learnt, from what, and how much is tried out for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: LearnedSettings | NeighboursSettings = Field(
        NeighboursSettings(),
        description="The router that is corrected: `{artefact: DIR}` is a trained one, anything "
        "else the settings of `neighbours`.",
    )
    feedback: Literal["bandit", "full"] = Field(
        "bandit",
        description="bandit: only the expert that answered is known to be good or bad, so others "
        "are tried where they may be better. full: each feedback says of (nearly) every expert "
        "whether it was right, in its label `experts: {id: score}`.",
    )
    exploration: float = Field(
        0.2,
        ge=0,
        le=1,
        description="bandit: the part of its uncertainty that the expert is drawn with. 1 is "
        "Thompson sampling, which tries out much; 0 takes the best, but for the floor.",
    )
    floor: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Share of requests spread evenly over all eligible experts, whatever their "
        "scores.",
    )
    dim: int = Field(
        32,
        ge=1,
        le=512,
        description="Numbers of a query's embedding that the correction reads (a random "
        "projection). They are kept with each decision, also where content is not.",
    )
    half_life: float = Field(
        1000,
        gt=0,
        description="bandit: outcomes after which a past one counts half.",
    )
    noise: float = Field(0.5, gt=0, description="bandit: standard deviation of an outcome.")
    prior: float = Field(
        0.05, gt=0, description="bandit: how far the base is expected to be off, as its weights."
    )
    rate: float = Field(0.1, gt=0, description="full: length of a gradient step.")
    decay: float = Field(0.003, ge=0, description="full: what draws a correction back to none.")
    seed: int = 0


class OnlineRouter:
    """Scores as the base router, corrected. The learner is swapped whole, so a request sees one
    state of it; used from one event loop."""

    name: ClassVar[str] = "online"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "Russac et al. 2019 (arXiv:1909.09146), drawn as by Chapelle & Li 2011; DriftMoE "
        "(arXiv:2507.18464)"
    )
    settings: ClassVar[type[BaseModel]] = OnlineSettings
    needs_texts: ClassVar[bool] = False
    path_fields: ClassVar[tuple[str, ...]] = ("base.artefact",)

    def __init__(self, base: Router, settings: OnlineSettings, embedder: Embedder) -> None:
        self.experts = base.experts
        self.asked = base.asked
        self.base = base
        self._settings = settings
        self._embedder = embedder
        self._projection = _projection(embedder.dim, settings)  # (d, m − 1)
        self.learner: BanditLearner | FullLearner = self._new()
        # A kept state fits this router only where this is the same.
        self.fingerprint = _fingerprint(settings, embedder)

    @property
    def curve(self) -> Curve | None:
        """None: what a weight on cost reaches changes with what is learnt."""
        return None

    @classmethod
    def asks(cls, settings: OnlineSettings) -> str | None:
        return _base(settings).asks(settings.base)

    @classmethod
    def digest(cls, settings: OnlineSettings) -> str:
        return _base(settings).digest(settings.base)

    @classmethod
    def check(
        cls, experts: Sequence[Expert], settings: OnlineSettings, demands: Demands = NO_DEMANDS
    ) -> None:
        family, base = _base(settings), settings.base
        if isinstance(base, LearnedSettings):
            base = base.model_copy(update={"shadow": None, "draw": None})
        alone = replace(demands, curve=False, quality=None)
        check_all(
            partial(_check_aims, demands),
            partial(_check_shadow, settings),
            partial(_check_draw, settings),
            partial(family.check, experts, base, alone),
        )

    @classmethod
    def build(
        cls, experts: Sequence[Expert], settings: OnlineSettings, embedder: Embedder
    ) -> OnlineRouter:
        base = _base(settings).build(experts, settings.base, embedder)
        return cls(base, settings, embedder)

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        scoring = asyncio.create_task(self.base.score(query, eligible, ask))
        try:
            vector = await self._embedder.embed(query.text)
            scored = await scoring
        except BaseException:
            scoring.cancel()  # it may be asking an LLM, for a request that has ended
            await asyncio.gather(scoring, return_exceptions=True)
            raise
        context, learner = self.context(vector), self.learner
        quality, spread = learner.quality(context, scored.quality)
        quality[~eligible] = np.nan
        uncertainty = scored.uncertainty if spread is None else spread
        told = {
            expert: {**why, "base": round(float(scored.quality[column]), 4), "seen": learner.seen}
            for column, expert in enumerate(self.experts)
            if (why := scored.reasons.get(expert)) is not None
        }
        learning = {
            "context": [round(float(x), 5) for x in context],
            "base": {
                expert: round(float(q), 5)
                for expert, q in zip(self.experts, scored.quality, strict=True)
                if not np.isnan(q)
            },
        }
        drawn = 0.0 if spread is None else self._settings.exploration
        exploration = Exploration(self._settings.floor, drawn, learning)
        return Scores(
            self.experts, quality, uncertainty, told, scored.cost, exploration, scored.told
        )

    def context(self, vector: FloatArray) -> FloatArray:
        """(d,) → (m,): a constant, and the projected vector."""
        projected = vector if self._projection is None else vector @ self._projection
        return np.concatenate([[1.0], projected]).astype(np.float32)

    # --- learning ---------------------------------------------------------------------------

    def observed(self, learning: Mapping[str, Any], outcomes: Mapping[str, float]) -> Observed:
        """What a decision noted (`Plan.learning`) with the outcomes (id → score in [0, 1]) that
        became known since. Experts that there are no more are left out. Raises ValueError for a
        note of another kind of context."""
        context = np.asarray(learning.get("context", ()), np.float32)
        if context.shape != (self.width,):
            raise ValueError(
                f"the decision noted {context.size} numbers and this router reads {self.width}"
            )
        noted = learning.get("base", {})
        base = np.array([noted.get(e, np.nan) for e in self.experts], np.float32)
        outcome = np.array([outcomes.get(e, np.nan) for e in self.experts], np.float32)
        return Observed(context, base, outcome)

    @property
    def width(self) -> int:
        """m, the numbers of a context."""
        d = self._embedder.dim if self._projection is None else self._projection.shape[1]
        return d + 1

    def after(self, observed: Sequence[Observed]) -> Learner:
        """The learner as these make it, not yet in use. Any thread."""
        return self.learner.learned(observed)

    def use(self, learner: Learner) -> None:
        """From now on decisions are made by this learner, one of `after`."""
        assert isinstance(learner, BanditLearner | FullLearner)
        self.learner = learner

    def packed(self, learner: Learner) -> bytes:
        """The learner for the store: arrays as safetensors, all else as JSON in its header."""
        state = learner.state()
        return save_arrays(dict(state.arrays), {"values": json.dumps(state.values)})

    def unpacked(self, data: bytes) -> Learner:
        """The inverse of `packed`, for the experts that there are now. Raises ValueError for what
        is no state of this router."""
        length = int.from_bytes(data[:8], "little")
        try:
            values = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["values"])
            return self._new().restored(State(load_arrays(data), values))
        except (KeyError, TypeError, IndexError, SafetensorError) as error:
            raise ValueError(f"not a state of an online router: {error}") from error

    def _new(self) -> BanditLearner | FullLearner:
        s = self._settings
        if s.feedback == "full":
            return FullLearner.new(self.experts, self.width, rate=s.rate, decay=s.decay)
        return BanditLearner.new(
            self.experts, self.width, half_life=s.half_life, noise=s.noise, prior=s.prior
        )


def _base(settings: OnlineSettings) -> type[Router]:
    return LearnedRouter if isinstance(settings.base, LearnedSettings) else NeighboursRouter


def _check_aims(demands: Demands) -> None:
    if demands.curve:
        raise ValueError(
            "`quality` and `max_cost` hold for a router that stays as it was trained, and "
            "`online` goes on learning; use `cost_weight`, or the router `learned`"
        )


def _check_shadow(settings: OnlineSettings) -> None:
    if isinstance(settings.base, LearnedSettings) and settings.base.shadow is not None:
        raise ValueError(
            "the base of `online` cannot have a `shadow`: its choices are not those that "
            "are made; leave it out, or use the router `learned`"
        )


def _check_draw(settings: OnlineSettings) -> None:
    if isinstance(settings.base, LearnedSettings) and settings.base.draw is not None:
        raise ValueError(
            "the base of `online` cannot `draw` experts: who is tried is its own to say; leave "
            "it out, or use the router `learned`"
        )


def _fingerprint(settings: OnlineSettings, embedder: Embedder) -> str:
    """Of all that a correction depends on: what is corrected, too, by its settings and by what its
    artefact holds, wherever that lies."""
    own = settings.model_dump(mode="json", include={"feedback", "dim", "seed"})
    family, base = _base(settings), settings.base.model_dump(mode="json", exclude={"artefact"})
    told = [own, embedder.digest, family.name, base, family.digest(settings.base)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _projection(d: int, settings: OnlineSettings) -> FloatArray | None:
    """(d, dim) that keeps lengths on average (Johnson & Lindenstrauss 1984); None: all of d."""
    if settings.dim >= d:
        return None
    drawn = np.random.default_rng(settings.seed).standard_normal((d, settings.dim))
    return np.asarray(drawn / np.sqrt(settings.dim), np.float32)
