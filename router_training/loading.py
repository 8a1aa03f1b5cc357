"""An artefact in a program of one's own: texts in, scores out. Knows no service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from composer.routing.artefact import Artefact, EmbedderStamp
from composer.routing.model import LearnedModel, Scored, check_embedder
from router_training.vectors import Model

_NOT_TEXTS = "give a list of texts"


class OfflineRouter:
    """`experts` (E,) are in the order of the scores' columns; `curve` of `model.manifest` says what
    a weight on cost reaches."""

    def __init__(self, model: LearnedModel, embedder: Model) -> None:
        self.model = model
        self.experts = model.experts
        self._embedder = embedder

    def score(self, texts: Sequence[str]) -> Scored:
        """(n,) texts → calibrated expected quality, its standard deviation and the expected cost in
        US dollars (None where no price was known), (n, E) each: what the service would say. No
        texts have (0, E). Raises TypeError for a bare string, or for what is no string in it."""
        if isinstance(texts, str | bytes):
            raise TypeError(f"score got one bare {type(texts).__name__}; {_NOT_TEXTS}")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"score got {type(text).__name__} at {row}; {_NOT_TEXTS}")
        if len(texts) == 0:
            one = self.model.score([""], self._embedder.encode)
            return Scored(
                one.quality[:0],
                one.uncertainty[:0],
                None if one.cost is None else one.cost[:0],
                None if one.chances is None else one.chances[:0],
            )
        return self.model.score(texts, self._embedder.encode)


def load_router(folder: str | Path, embedder: Model | None = None) -> OfflineRouter:
    """The artefact that `router-training train --out` wrote; without `embedder` with the one that
    COMPOSER_EMBEDDER names. Raises ArtefactError where it is none or was trained on another
    embedder's vectors, SettingsError where the embedder cannot be had."""
    model = LearnedModel.of(Artefact.load(Path(folder)))
    if embedder is None:
        from router_training.embedding import open_embedding

        embedder = open_embedding().kept
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    check_embedder(model.manifest, stamp, Path(folder))
    return OfflineRouter(model, embedder)
