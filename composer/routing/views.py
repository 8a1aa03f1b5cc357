"""Several ways to look at a query, as features: embedding, question without options, words, pieces
of words, format. Knows no outcome: nothing here is fitted on labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer

from composer.routing.reading import FORMAT, Reading, measured, pieces_of, read, words_of
from composer.routing.state import State, joined_lines, split_lines
from composer.types import FloatArray

View = Literal["embedding", "stem", "words", "chars", "format"]
"""`embedding` (n, d): the query's unit vector. `stem` (n, d): that of the question without its
answer options. `words` (n, v): TF-IDF of words and pairs of words, sparse, unit rows. `chars`
(n, v): the same of pieces of words. `format` (n, f): lengths, shares of digits, signs of code and
of mathematics, standardised, cut at ±4 and divided by √f, so that its rows are about as long as
those of the other views."""

VIEWS: tuple[View, ...] = get_args(View)

Features = Mapping[View, Any]
"""View → (n, …) float32 array, or CSR matrix for those of LEXICAL. Some of the views that were
fitted."""

Encode = Callable[[Sequence[str]], FloatArray]
"""(n,) texts → (n, d) unit rows."""

LEXICAL: Mapping[View, tuple[Callable[[str], list[str]], int]] = {
    "words": (words_of, 30_000),
    "chars": (pieces_of, 60_000),
}
"""Views that count the terms of a text: how it is cut into them, and how many are known."""

NO_WORD = " "
"""The vocabulary of texts without a word in them. No text holds it, so its column is 0."""


def rows_of(features: Features, chosen: npt.NDArray[Any]) -> Features:
    """Some of the queries, by number or mask."""
    return {view: values[chosen] for view, values in features.items()}


def count_of(features: Features) -> int:
    """How many queries these are features of."""
    return int(next(iter(features.values())).shape[0])


@dataclass(frozen=True, slots=True)
class Views:
    """Fitted once, then only read: `transform` is safe from many threads.

    `vectorizers` are of the views in LEXICAL; `centre` and `scale` (f,) are those of `format`,
    empty without it.
    """

    names: tuple[View, ...]
    vectorizers: Mapping[View, TfidfVectorizer]
    centre: FloatArray
    scale: FloatArray

    @classmethod
    def fit(cls, texts: Sequence[str], names: Collection[View] = VIEWS) -> Views:
        """The vocabulary and the scales of these texts; embeddings need no fit. Raises
        ValueError for no texts or a view that there is not."""
        if not texts:
            raise ValueError("there are no texts to fit views on; give at least one")
        if unknown := sorted(set(names) - set(VIEWS)):
            raise ValueError(f"there is no view {unknown[0]!r}; choose from {', '.join(VIEWS)}")
        centre = scale = np.empty(0, np.float32)
        if "format" in names:
            rows = measured([read(text) for text in texts])
            centre, spread = rows.mean(axis=0), rows.std(axis=0)
            scale = np.where(spread > 1e-6, spread, 1).astype(np.float32)
        vectorizers = {view: _fitted(view, texts) for view in LEXICAL if view in names}
        return cls(tuple(v for v in VIEWS if v in names), vectorizers, centre, scale)

    def encoded(self, readings: Sequence[Reading]) -> list[str]:
        """The texts that `of` hands to `encode` for these, each once: for callers whose vectors
        are made elsewhere, say by a shared batch."""
        wanted = [r.whole for r in readings] if "embedding" in self.names else []
        if "stem" in self.names:
            wanted += [r.stem for r in readings]
        return list(dict.fromkeys(wanted))

    def transform(self, texts: Sequence[str], encode: Encode) -> Features:
        """`of` these texts' readings."""
        return self.of([read(text) for text in texts], encode)

    def of(self, readings: Sequence[Reading], encode: Encode) -> Features:
        """The views of (n,) texts. `encode` is called once, or not at all where no view needs it.
        Words that were not seen in fitting are left out; an empty text has no words."""
        features: dict[View, Any] = {}
        if wanted := self.encoded(readings):
            vectors = np.asarray(encode(wanted), np.float32)  # (w, d)
            place = {text: row for row, text in enumerate(wanted)}
        for view in self.names:
            if view == "embedding":
                features[view] = vectors[[place[r.whole] for r in readings]]
            elif view == "stem":
                features[view] = vectors[[place[r.stem] for r in readings]]
            elif view in LEXICAL:
                features[view] = self.vectorizers[view].transform([r.text for r in readings])
            else:
                z = np.clip((measured(readings) - self.centre) / self.scale, -4, 4)  # (n, f)
                features[view] = np.asarray(z / np.float32(np.sqrt(len(FORMAT))), np.float32)
        return features

    def embedding(self) -> Views:
        """With the view `embedding`, which needs no fit."""
        names = {*self.names, "embedding"}
        kept = tuple(view for view in VIEWS if view in names)
        return Views(kept, self.vectorizers, self.centre, self.scale)

    def only(self, names: Collection[View]) -> Views:
        """Some of the views, as they were fitted."""
        kept = tuple(view for view in self.names if view in names)
        empty = np.empty(0, np.float32)
        centre, scale = (self.centre, self.scale) if "format" in kept else (empty, empty)
        vectorizers = {view: fitted for view, fitted in self.vectorizers.items() if view in kept}
        return Views(kept, vectorizers, centre, scale)

    def state(self) -> State:
        arrays: dict[str, npt.NDArray[Any]] = {}
        values: dict[str, Any] = {"names": list(self.names)}
        if "format" in self.names:
            arrays |= {"centre": self.centre, "scale": self.scale}
            values["format"] = [name for name, _ in FORMAT]
        for view, vectorizer in self.vectorizers.items():
            arrays[view] = joined_lines(tuple(vectorizer.get_feature_names_out()))
            arrays[_idf(view)] = np.asarray(vectorizer.idf_, np.float32)
        return State(arrays, values)

    @classmethod
    def restore(cls, state: State) -> Views:
        """The inverse of `state`: transforms the same to the last bit. Raises ValueError where
        the format features have changed since."""
        names = tuple(v for v in VIEWS if v in state.values["names"])
        if "format" in names and state.values["format"] != [name for name, _ in FORMAT]:
            raise ValueError("these views measure other format features; train the router anew")
        vectorizers: dict[View, TfidfVectorizer] = {}
        for view in names:
            if view in LEXICAL:
                known = list(split_lines(state.arrays[view]))
                vectorizers[view] = _vectorizer(view, vocabulary=known)
                vectorizers[view].idf_ = np.asarray(state.arrays[_idf(view)], np.float32)
        empty = np.empty(0, np.float32)
        centre, scale = state.arrays.get("centre", empty), state.arrays.get("scale", empty)
        return cls(names, vectorizers, centre, scale)


def _idf(view: View) -> str:
    return "idf" if view == "words" else f"idf.{view}"  # so named when there was but one


def _vectorizer(view: View, **settings: Any) -> TfidfVectorizer:
    terms_of, _ = LEXICAL[view]
    return TfidfVectorizer(analyzer=terms_of, sublinear_tf=True, dtype=np.float32, **settings)


def _fitted(view: View, texts: Sequence[str]) -> TfidfVectorizer:
    """On a vocabulary of terms that stand in two texts, or in any where there are none such."""
    _, most = LEXICAL[view]
    for least in (2, 1):
        try:
            return _vectorizer(view, min_df=least, max_features=most).fit(texts)
        except ValueError:  # how sklearn says that no term is left
            continue
    return _vectorizer(view, vocabulary=[NO_WORD]).fit(texts)
