"""An artefact as what it computes: texts in, scores out, and how another expert joins it. Knows no
family by name but through `families.FAMILIES`, no policy and no request; fits nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer.routing.artefact import Artefact, ArtefactError, JoinedStamp, Manifest
from composer.routing.base import Vectors
from composer.routing.costs import CostModel
from composer.routing.families import FAMILIES
from composer.routing.family import BySkills, Family, Predicted, State, predicted
from composer.routing.joining import Evidence, JoinPrior, Newcomers
from composer.routing.outcome_calibration import OutcomeCalibration
from composer.routing.reading import Reading
from composer.routing.trained import TrainedQueries
from composer.routing.views import Encode, Features, Views
from composer.types import FloatArray

LIKE = 3
"""Known experts that are named as those whom one that joined resembles."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """(n, E) each, in the order of the artefact's experts: calibrated expected quality, its
    standard deviation, and expected US dollars of the call, None where no price was known, NaN
    for an expert that joined without one. `chances`: the probabilities of a draw, 0 of those that
    joined; None of a family that draws nobody."""

    quality: FloatArray
    uncertainty: FloatArray
    cost: FloatArray | None
    chances: FloatArray | None = None


class LearnedModel:
    """Views, family, calibration and costs in a row: texts in, scores out; experts that joined are
    scored from the scores of the others. Only read."""

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        family: Family,
        calibration: OutcomeCalibration,
        costs: CostModel | None,
        newcomers: Newcomers | None = None,
        trained: TrainedQueries | None = None,
    ) -> None:
        """Without `newcomers` nobody has joined, and who does joins by the prior's defaults.
        Without `trained` it is not known what it was trained on."""
        self.manifest = manifest
        self.experts = manifest.known
        self.views = views
        self.family = family
        self.calibration = calibration
        self.costs = costs
        if newcomers is None:
            best = max(expert.quality for expert in manifest.experts)
            newcomers = Newcomers(JoinPrior.default(best), {})
        self.newcomers = newcomers
        self.trained = trained

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
                _newcomers(artefact),
                TrainedQueries.restore(states["trained"]) if "trained" in states else None,
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
        states["joining"] = self.newcomers.prior.state()
        if self.newcomers.experts:
            states["joined"] = self.newcomers.state()
        if self.trained is not None:
            states["trained"] = self.trained.state()
        return Artefact(self.manifest, states)

    def score(self, texts: Sequence[str], encode: Encode) -> Scored:
        return self.score_features(self.views.transform(texts, encode))

    def score_read(
        self, readings: Sequence[Reading], encode: Encode, skills: Sequence[int] = ()
    ) -> Scored:
        """As `score`, of texts that were read before. `skills`: what a single text asks for, where
        somebody else than the family has inferred it."""
        return self.score_features(self.views.of(readings, encode), skills)

    def score_features(self, features: Features, skills: Sequence[int] = ()) -> Scored:
        chances = None
        if isinstance(self.family, BySkills):
            weight = self.family.weights_of(skills) if skills else self.family.weights(features)
            said = Predicted(self.family.predict_skills(weight), None)
            chances = self.family.chances(weight)
        else:
            said = predicted(self.family, features)
        quality, uncertainty = self.calibration.quality(said.quality, said.signs)
        cost = None if self.costs is None else self.costs.predict(features)
        if self.newcomers.experts:
            new, doubt = self.newcomers.scores(quality, features["embedding"])
            quality = np.hstack([quality, new])
            uncertainty = np.hstack([uncertainty, doubt])
            cost = None if cost is None else np.hstack([cost, self._new_costs(cost)])
            chances = None if chances is None else np.hstack([chances, np.zeros_like(new)])
        return Scored(quality, uncertainty, cost, chances)

    def _new_costs(self, cost: FloatArray) -> FloatArray:
        """(n, J) from the others' (n, E): a question that is long for them is long for it."""
        assert self.costs is not None
        usual = np.where(self.costs.mean > 0, self.costs.mean, 1)
        ratio = (cost / usual).mean(axis=1)  # (n,)
        mean = [np.nan if stamp.cost is None else stamp.cost for stamp in self.manifest.joined]
        return np.asarray(np.outer(ratio, mean), np.float32)

    # --- joining ----------------------------------------------------------------------------

    def joined(
        self,
        id: str,
        claims: Sequence[str],
        encode: Encode,
        *,
        texts: Sequence[str] = (),
        outcome: FloatArray | None = None,
        cost: float | None = None,
    ) -> LearnedModel:
        """With another expert, known by what is said of it (`claims`: examples, a description) and
        by outcomes (n,) in [0, 1] on `texts`, or anew where it joined before. `cost` is its mean
        cost there in US dollars. Nobody else's scores change. Raises ArtefactError for an expert
        that it was trained on."""
        if id in {stamp.id for stamp in self.manifest.experts}:
            raise ArtefactError(
                f"the artefact was trained on outcomes of {id!r}; train it again with the new ones"
            )
        views = self.views.embedding()
        known = len(self.manifest.experts)

        def seen(some: Sequence[str]) -> tuple[FloatArray, FloatArray]:
            features = views.transform(some, encode)
            return features["embedding"], self.score_features(features).quality[:, :known]

        dim = self.manifest.embedder.dim
        nothing = np.empty((0, dim), np.float32), np.empty((0, known), np.float32)
        said = seen(claims) if claims else nothing
        tried = seen(texts) if texts else nothing
        observed = np.empty(0, np.float32) if outcome is None else outcome
        evidence = Evidence.of(self.newcomers.prior, said, (*tried, observed))
        newcomers = self.newcomers.and_(id, evidence)
        means = np.array([stamp.quality for stamp in self.manifest.experts], np.float32)
        shares = newcomers.experts[id].resemblance()
        nearest = [i for i in np.argsort(-shares, kind="stable")[:LIKE] if shares[i] > 0]
        stamp = JoinedStamp(
            id=id,
            like={self.experts[i]: round(float(shares[i]), 4) for i in nearest},
            quality=newcomers.experts[id].level(means),
            cost=cost,
            outcomes=len(texts),
            claims=len(claims),
        )
        of = {one.id: one for one in self.manifest.joined} | {id: stamp}
        manifest = self.manifest.model_copy(update={"joined": tuple(of.values())})
        trained = None if self.trained is None else self.trained.also(texts)
        return LearnedModel(
            manifest, views, self.family, self.calibration, self.costs, newcomers, trained
        )

    def without(self, id: str) -> LearnedModel:
        """Without one that joined. Raises ArtefactError where it did not."""
        if id not in self.newcomers.experts:
            raise ArtefactError(f"{id!r} did not join this artefact; name one that did")
        left = tuple(stamp for stamp in self.manifest.joined if stamp.id != id)
        manifest = self.manifest.model_copy(update={"joined": left})
        newcomers = self.newcomers.without(id)
        return LearnedModel(
            manifest,
            self.views,
            self.family,
            self.calibration,
            self.costs,
            newcomers,
            self.trained,
        )


def check_embedder(manifest: Manifest, embedder: Vectors, folder: Path) -> None:
    """Raises ArtefactError where the artefact was fitted on another embedder's vectors."""
    asked = manifest.embedder
    if asked.digest != embedder.digest:
        raise ArtefactError(
            f"{folder} was trained on vectors of {asked.id} ({asked.digest[:12]}), and this "
            f"service embeds with {embedder.id} ({embedder.digest[:12]}); set COMPOSER_EMBEDDER, "
            "or train it again"
        )


def _newcomers(artefact: Artefact) -> Newcomers | None:
    """None for an artefact from before experts could join."""
    manifest, states = artefact.manifest, artefact.states
    if "joining" not in states:
        return None
    prior = JoinPrior.restore(states["joining"])
    ids = [stamp.id for stamp in manifest.joined]
    return Newcomers.restore(prior, ids, states["joined"] if ids else State({}, {}))
