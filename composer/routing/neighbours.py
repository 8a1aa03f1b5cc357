"""The retrieval router: an expert is as good for a query as its own texts are near to it.
Knows nothing of engines, requests or catalogs; it needs no labelled outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from composer.routing.base import NO_DEMANDS, Demands, Embedder, Query, Scores
from composer.routing.calibrate import Calibration, Evidence, evidence
from composer.routing.index import FlatIndex, Index, Rows, build_index
from composer.routing.metric import IntArray, apply_metric, fit_metric
from composer.types import Ask, BoolArray, Expert, FloatArray, Tier

Source = Literal["examples", "description", "skills", "name"]

EXPLAINED = 5
"""Experts of a decision whose nearest text is looked up."""

FOLDS = 5
HELD_OUT = 2_000
"""Rows the calibration asks as if they were queries; more change it in the third decimal."""

HELD_OUT_PRODUCTS = 100_000_000
"""Inner products that asking them may take; a registry so large that this bounds them asks rows
of one fold only, because every fold makes metric and index anew."""


class NeighboursSettings(BaseModel):
    """How a query's similarity to an expert's texts becomes the expert's quality.

    The defaults were chosen on training and dev rows of clinc150 and banking77, with registries of
    8 to 150 experts and 3 to 100 rows each. They route best at every size but the smallest (up to
    five rows an expert), where plain centroids are half a point better:
    `benchmarks/results/retrieval.md`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[Source, ...] = Field(
        ("examples", "description", "skills"),
        min_length=1,
        description="Which of an expert's texts are its rows.",
    )
    aggregate: Literal["blend", "max", "top_m", "centroid"] = Field(
        "blend",
        description="An expert's similarity: of its nearest row (max), the mean of its m nearest "
        "(top_m), of the mean of all (centroid), or top_m of rows pulled to their centroid.",
    )
    m: int = Field(2, ge=1, description="Rows that top_m and blend average.")
    pull: float = Field(0.35, ge=0, le=1, description="The centroid's share in blend.")
    metric: Literal["discriminant", "cosine"] = Field(
        "discriminant",
        description="Plain cosine, or one that weighs directions by what tells experts apart.",
    )
    strength: float = Field(
        0.5, ge=0, le=1, description="How far the discriminant metric departs from the cosine."
    )
    index: Literal["auto", "flat", "ivf"] = Field(
        "auto", description="auto: exact up to 100,000 rows, above that inverted lists."
    )
    unseen_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of queries that no expert fits, which quality is calibrated for.",
    )
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Texts:
    """The rows' texts, one expert's side by side: expert e owns `start[e]` to `start[e + 1]`."""

    text: tuple[str, ...]
    source: tuple[Source, ...]
    start: IntArray

    @classmethod
    def of(cls, experts: Sequence[Expert], sources: Sequence[Source]) -> Texts:
        """Texts that an expert has twice count once; experts may have none."""
        rows: list[tuple[str, Source]] = []
        start = [0]
        for expert in experts:
            own: dict[str, Source] = {}
            for source in sources:
                for text in _texts(expert, source):
                    if text.strip():
                        own.setdefault(text.strip(), source)
            rows += own.items()
            start.append(len(rows))
        return cls(tuple(t for t, _ in rows), tuple(s for _, s in rows), np.array(start, np.int64))


def _texts(expert: Expert, source: Source) -> Sequence[str]:
    match source:
        case "examples":
            return expert.examples
        case "description":
            return (expert.description,)
        case "skills":
            return expert.skills
        case "name":
            return (expert.id.replace("-", " ").replace("_", " "),)


class NeighboursRouter:
    """score = mean of the m largest inner products of the query with the expert's rows, each row
    drawn to its expert's centroid: r ← (1 − pull)·r + pull·c, both of length 1. `pull` 0 and m 1
    is PHATGOOSE's retrieval baseline, `pull` 1 nearest centroid. Quality is calibrated on the
    registry's own rows, held out fold by fold (`calibrate.py`).

    Every expert is scored whoever is eligible, so leaving one out changes nothing for the rest.
    """

    name: ClassVar[str] = "neighbours"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = (
        "retrieval baseline of PHATGOOSE (Muqeeth et al. 2024); metric: nonparametric discriminant "
        "analysis (Fukunaga & Mantock 1983) with Ledoit-Wolf shrinkage (2004)"
    )
    settings: ClassVar[type[BaseModel]] = NeighboursSettings
    needs_texts: ClassVar[bool] = True
    path_fields: ClassVar[tuple[str, ...]] = ()
    curve: ClassVar[None] = None
    asked: ClassVar[None] = None

    def __init__(
        self,
        experts: tuple[str, ...],
        texts: Texts,
        w: FloatArray,
        index: Index,
        shown: IntArray | None,
        calibration: Calibration,
        embedder: Embedder | None,
    ) -> None:
        self.experts = experts
        self.index = index
        self.calibration = calibration
        self._texts = texts
        self.metric = w
        self._shown = shown
        self._embedder = embedder

    @classmethod
    def build(
        cls, experts: Sequence[Expert], settings: NeighboursSettings, embedder: Embedder
    ) -> NeighboursRouter:
        """Blocks: embeds the texts (those embedded before cost nothing), fits metric and
        calibration. Raises ValueError as `check`."""
        cls.check(experts, settings)
        texts = Texts.of(experts, settings.sources)
        rows = embedder.encode(texts.text)
        ids = tuple(expert.id for expert in experts)
        return cls.of_rows(ids, texts, rows, settings, embedder)

    @classmethod
    def asks(cls, settings: NeighboursSettings) -> None:
        return None

    @classmethod
    def digest(cls, settings: NeighboursSettings) -> str:
        return ""

    @classmethod
    def check(
        cls,
        experts: Sequence[Expert],
        settings: NeighboursSettings,
        demands: Demands = NO_DEMANDS,
    ) -> None:
        """Raises ValueError when none of several experts has a text of the sources, or a curve is
        needed, which only outcomes give."""
        if demands.curve:
            raise ValueError(
                "`quality` and `max_cost` need a router trained on outcomes, and this one is not; "
                "train one with `router-training train` and name its artefact here, or leave "
                "them out"
            )
        if len(experts) > 1 and not Texts.of(experts, settings.sources).text:
            raise ValueError(
                f"none of the experts has any of {', '.join(settings.sources)} to be found by; "
                "add examples or a description, or name other `sources` in the router's settings"
            )

    @classmethod
    def of_rows(
        cls,
        experts: tuple[str, ...],
        texts: Texts,
        rows: FloatArray,
        settings: NeighboursSettings,
        embedder: Embedder | None = None,
    ) -> NeighboursRouter:
        """From rows (n, d) embedded already, in the order of `texts`. Without an embedder only
        `score_embeddings` can be asked."""
        owner = np.repeat(np.arange(len(experts)), np.diff(texts.start))
        w = _metric(rows, owner, settings)
        prepared, shown = _prepare(apply_metric(rows, w), texts.start, settings)
        index = build_index(prepared, settings.index, settings.seed)
        calibration = Calibration.fit(
            _held_out(rows, owner, texts, settings), unseen_share=settings.unseen_share
        )
        return cls(experts, texts, w, index, shown, calibration, embedder)

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        if self._embedder is None:
            raise ValueError(
                "this router was built from rows; it has no embedder to read text with"
            )
        vector = await self._embedder.embed(query.text)
        return await asyncio.to_thread(self._score_one, vector, eligible)

    def similarities(self, x: FloatArray, eligible: BoolArray | None = None) -> FloatArray:
        """(n, d) embeddings → (n, E) similarity in the router's own metric, uncalibrated."""
        return self.index.similarity(apply_metric(x, self.metric), eligible)

    def score_embeddings(self, x: FloatArray) -> FloatArray:
        """(n, d) embeddings → (n, E) quality. Whole arrays; the way offline evaluation asks."""
        return self.calibration.quality(self.similarities(x))[0]

    def _score_one(self, vector: FloatArray, eligible: BoolArray) -> Scores:
        mapped = apply_metric(vector[None], self.metric)  # (1, d)
        similarity = self.index.similarity(mapped, eligible)  # (1, E)
        quality, uncertainty = (row[0] for row in self.calibration.quality(similarity))
        quality[~eligible] = np.nan
        uncertainty[~eligible] = np.nan
        n_shown = min(EXPLAINED, int(eligible.sum()))
        ranked = np.where(eligible, similarity[0], -np.inf)
        best = np.argpartition(-ranked, n_shown - 1)[:n_shown]
        best = best[np.argsort(-ranked[best], kind="stable")]
        return Scores(
            experts=self.experts,
            quality=quality,
            uncertainty=uncertainty,
            reasons=self._explain(mapped[0], similarity[0], best),
        )

    def _explain(
        self, query: FloatArray, similarity: FloatArray, best: IntArray
    ) -> Mapping[str, Mapping[str, Any]]:
        reasons: dict[str, Mapping[str, Any]] = {}
        for expert, near in zip(best, self.index.nearest(query, best.tolist()), strict=True):
            why: dict[str, Any] = {"similarity": round(float(similarity[expert]), 4)}
            if near is not None:
                row = int(self._texts.start[expert]) + near.row
                if self._shown is not None:
                    row = int(self._shown[expert])
                why |= {"nearest": self._texts.text[row], "source": self._texts.source[row]}
            reasons[self.experts[expert]] = why
        return reasons


def _metric(rows: FloatArray, owner: IntArray, settings: NeighboursSettings) -> FloatArray:
    if settings.metric == "cosine" or len(rows) == 0:
        return np.eye(rows.shape[1], dtype=np.float32)
    return fit_metric(rows, owner, strength=settings.strength, seed=settings.seed)


def _prepare(
    mapped: FloatArray, start: IntArray, settings: NeighboursSettings
) -> tuple[Rows, IntArray | None]:
    """Rows as the aggregate wants them in the index. For centroids, which are no texts, also
    (E,) the row nearest to each."""
    pull = {"blend": settings.pull, "centroid": 1.0}.get(settings.aggregate, 0.0)
    m = settings.m if settings.aggregate in ("blend", "top_m") else 1
    if pull == 0.0 or len(mapped) == 0:
        return Rows(mapped, mapped, start, m), None
    count = np.diff(start)
    filled = np.flatnonzero(count)
    centroid = np.add.reduceat(mapped, start[:-1][filled])  # (f, d)
    centroid /= np.maximum(np.linalg.norm(centroid, axis=1, keepdims=True), 1e-12)
    spread = np.repeat(centroid, count[filled], axis=0)  # (n, d)
    if pull < 1.0:
        drawn = np.asarray((1 - pull) * mapped + pull * spread, np.float32)
        return Rows(drawn, mapped, start, m), None
    near = (mapped * spread).sum(axis=1)
    shown = np.zeros(len(count), np.int64)
    shown[filled] = [start[e] + near[start[e] : start[e + 1]].argmax() for e in filled]
    one_each = np.concatenate([[0], np.cumsum(count > 0)])
    return Rows(centroid, mapped[shown[filled]], one_each, 1), shown


def _held_out(
    rows: FloatArray, owner: IntArray, texts: Texts, settings: NeighboursSettings
) -> list[Evidence]:
    """The registry's rows asked as queries of a router that has not seen them.

    Each expert's rows are dealt into folds; metric and index are made anew without one fold, and
    rows of it are the queries. An expert's only row stays in, for others to be mistaken for it.
    A text that several experts have is right for each of them.
    """
    n_experts = len(texts.start) - 1
    count = np.diff(texts.start)
    rng = np.random.default_rng(settings.seed)
    fold = np.full(len(rows), -1)
    # Dealt from a random fold on, so that experts of few rows do not all fall into the first.
    position = np.arange(len(rows)) - texts.start[owner]
    fold[count[owner] > 1] = (position + rng.integers(FOLDS, size=n_experts)[owner])[
        count[owner] > 1
    ] % FOLDS
    # Equal texts go together: one of them in the index would find itself.
    _, first, same_text = np.unique(np.array(texts.text), return_index=True, return_inverse=True)
    fold = fold[first][same_text]
    candidates = np.flatnonzero(fold >= 0)
    asked = np.zeros(len(rows), np.bool_)
    n_asked = HELD_OUT_PRODUCTS // max(len(rows), 1)
    if n_asked < HELD_OUT:
        candidates = np.flatnonzero(fold == 0)
    asked[rng.permutation(candidates)[: min(n_asked, HELD_OUT)]] = True

    found = []
    for k in range(FOLDS):
        queries = np.flatnonzero(asked & (fold == k))
        kept = fold != k
        if not len(queries):
            continue
        start = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=n_experts))])
        w = _metric(rows[kept], owner[kept], settings)
        prepared, _ = _prepare(apply_metric(rows[kept], w), start, settings)
        similarity = FlatIndex(prepared).similarity(apply_metric(rows[queries], w))
        right = np.zeros((len(queries), n_experts), np.bool_)
        query, row = np.nonzero(same_text[queries][:, None] == same_text[None, :])
        right[query, owner[row]] = True
        found.append(evidence(similarity, right))
    return found
