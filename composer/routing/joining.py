"""A new expert beside those an artefact was trained on: its expected quality from what is said of
it and from a few outcomes. Numbers only: knows no registry, no file and no family.

The known experts are taken for draws from the population that the new one comes from: a Gaussian
process whose mean and covariance over queries are theirs (Schwaighofer, Tresp & Yu, "Learning
Gaussian process kernels via hierarchical Bayes", NIPS 2004). With the known experts' expected
quality q(x) (E,) and their mean m(x),

    quality(x) = m(x) + b + a · (q(x) − m(x)) + g(x)

    b ~ N(0, offset²)             how much better or worse it is throughout
    a ~ N(0, follow² / E · I)     whom of the known it resembles
    g ~ GP(0, own² · k)           what none of them tells, k nearness of vectors (`_near`)

so without an outcome it is as good as they are on average, and every outcome moves it there, on
like questions, and throughout, as far as these widths allow. An example or description is a claim:
it counts as an outcome there, as good as the known experts are at what each of them is best at, and
says nothing of b. The widths are learnt by leaving each known expert out in turn (`JoinPrior.fit`).
It reads the others' scores and changes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt

from composer.routing.outcomes import Outcomes
from composer.routing.state import State, packed, part_of
from composer.types import FloatArray

Float64 = npt.NDArray[np.float64]

MAX_OUTCOMES = 1000
"""Of one expert. The cost of joining grows with their cube, that of a score with them; with so many
the expert can be trained with the others."""

SAMPLE, EXPERTS = 128, 12
"""Questions of each known expert, and such experts, from which the widths are learnt."""

GAMMA = 0.3
"""From 0.3 to 4 it makes no difference on the tables of generalists; specialists (clinc150's
domains, on training rows) are found by their examples more often the smaller it is."""

FORTE = 0.1
"""Share of the questions that counts as what an expert is best at."""

TRIED = (0.1, 1.0, 0.1, 0.4)
"""Widths before any data: offset, follow, own and noise, about those of the shared tables."""

LOOSE = 1.5
"""Standard deviation of the logarithm of their squares."""


@dataclass(frozen=True, slots=True)
class JoinPrior:
    """The widths above; `noise` is the standard deviation of one outcome about its expectation.
    `best` is how good an expert is taken to be at what it is said to be for: the known experts'
    mean outcome on the questions (a share of FORTE) where each is expected to be furthest above the
    others; `doubt` is its standard deviation among them."""

    offset: float
    follow: float
    own: float
    noise: float
    best: float
    doubt: float = 0.0
    gamma: float = GAMMA

    @classmethod
    def fit(
        cls, quality: FloatArray, outcomes: Outcomes, vectors: FloatArray, seed: int = 0
    ) -> JoinPrior:
        """`quality` (n, E) is calibrated and of questions that its maker had not seen, `vectors`
        (n, d) are theirs, unit rows. The widths are the most likely ones for the outcomes of every
        expert, seen from the others (type II maximum a posteriori, with a loose prior). One known
        expert says nothing of a population: then the prior's own."""
        from scipy.optimize import minimize

        best, doubt = _fortes(quality, outcomes)
        start = np.log(np.square(TRIED))
        parts = _left_out(quality, outcomes, vectors, seed)
        if not parts:
            return cls.default(best, doubt)

        def loss(theta: Float64) -> tuple[float, Float64]:
            scale = np.exp(theta)
            off = (theta - start) / LOOSE
            total, slope = float(off @ off) / 2, off / LOOSE
            for rest, grams in parts:
                c = np.einsum("t,tij->ij", scale, grams)
                inverse = np.linalg.inv(c)
                alpha = inverse @ rest
                total += float(rest @ alpha + np.linalg.slogdet(c)[1]) / 2
                spare = inverse - np.outer(alpha, alpha)
                slope = slope + scale * np.einsum("ij,tij->t", spare, grams) / 2
            return total, slope

        bounds = [(at - 4 * LOOSE, at + 4 * LOOSE) for at in start]
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
        offset, follow, own, noise = np.exp(found / 2)
        return cls(float(offset), float(follow), float(own), float(noise), best, doubt)

    @classmethod
    def default(cls, best: float, doubt: float = 0.0) -> JoinPrior:
        """For an artefact that has learnt none."""
        return cls(*TRIED, best=best, doubt=doubt)

    def state(self) -> State:
        return State({}, asdict(self))

    @classmethod
    def restore(cls, state: State) -> JoinPrior:
        return cls(**{one.name: float(state.values[one.name]) for one in fields(cls)})


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is known of a new expert: `vectors` (p, d) of texts, the known experts' expected
    `quality` there (p, E), and its `outcome` (p,) in [0, 1]. Where `claimed` (p,), nobody has seen
    it: the text is an example or description, and the outcome what an expert is taken to reach
    there. p may be 0."""

    vectors: FloatArray
    quality: FloatArray
    outcome: FloatArray
    claimed: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        prior: JoinPrior,
        claims: tuple[FloatArray, FloatArray],
        seen: tuple[FloatArray, FloatArray, FloatArray],
    ) -> Evidence:
        """`claims` are vectors (c, d) and quality (c, E) of what is said of it, `seen` those of its
        outcomes and these, (s, d), (s, E) and (s,)."""
        claimed = np.repeat([True, False], [len(claims[0]), len(seen[0])])
        outcome = np.where(claimed, prior.best, 0).astype(np.float32)
        outcome[~claimed] = seen[2]
        return cls(
            np.concatenate([claims[0], seen[0]]).astype(np.float32),
            np.concatenate([claims[1], seen[1]]).astype(np.float32),
            outcome,
            claimed,
        )

    def state(self) -> State:
        return State({one.name: getattr(self, one.name) for one in fields(self)}, {})

    @classmethod
    def restore(cls, state: State) -> Evidence:
        return cls(*(state.arrays[one.name] for one in fields(cls)))


class Joined:
    """One expert that joined. Only read: safe from many threads."""

    def __init__(self, evidence: Evidence, prior: JoinPrior) -> None:
        self.evidence, self.prior = evidence, prior
        quality = evidence.quality.astype(np.float64)
        self._mean = quality.mean(axis=1)  # (p,)
        self._linear = _linear(quality, prior)  # (p, 1 + E)
        self._linear[evidence.claimed, 0] = 0
        gram = self._linear @ self._linear.T + prior.own**2 * _near(
            evidence.vectors, evidence.vectors, prior.gamma
        )
        gram[np.diag_indices_from(gram)] += prior.noise**2
        # All claims are the same expert's, so they are too high or too low together.
        gram += prior.doubt**2 * np.outer(evidence.claimed, evidence.claimed)
        self._root = np.linalg.cholesky(gram)
        rest = evidence.outcome.astype(np.float64) - self._mean
        self._alpha = np.linalg.solve(self._root.T, np.linalg.solve(self._root, rest))

    def predict(self, quality: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The known experts' quality (n, E) and the queries' vectors (n, d) → its expected quality
        in [0, 1] and the standard deviation of that, both (n,)."""
        from scipy.linalg import solve_triangular

        known = quality.astype(np.float64)
        linear = _linear(known, self.prior)
        own = self.prior.own**2
        cross = linear @ self._linear.T + own * _near(
            vectors, self.evidence.vectors, self.prior.gamma
        )  # (n, p)
        expected = known.mean(axis=1) + cross @ self._alpha
        told = solve_triangular(self._root, cross.T, lower=True)  # (p, n)
        variance = (linear**2).sum(axis=1) + own - (told**2).sum(axis=0)
        return (
            np.asarray(np.clip(expected, 0, 1), np.float32),
            np.asarray(np.sqrt(np.maximum(variance, 0)), np.float32),
        )

    def resemblance(self) -> FloatArray:
        """(E,) the expected a: whose strengths and weaknesses it shares, below 0 for the
        opposite."""
        n_experts = self.evidence.quality.shape[1]
        scale = self.prior.follow / np.sqrt(n_experts)
        return np.asarray(scale * (self._linear[:, 1:].T @ self._alpha), np.float32)

    def level(self, means: FloatArray) -> float:
        """Its expected mean quality, given the known experts' (E,): theirs, and how far above them
        it is expected to be where it was seen; where it was not, what it shares with some of them
        counts alone."""
        known = means.astype(np.float64)[None]
        seen = ~self.evidence.claimed
        if seen.any():
            there = self.evidence.quality[seen]
            expected, _ = self.predict(there, self.evidence.vectors[seen])
            lift = float(np.mean(expected - there.mean(axis=1), dtype=np.float64))
        else:
            lift = float((_linear(known, self.prior) @ self._linear.T @ self._alpha)[0])
        return float(np.clip(known.mean() + lift, 0, 1))


def _linear(quality: Float64, prior: JoinPrior) -> Float64:
    """(p, 1 + E) features whose products are the covariance of b + a · (q − m)."""
    off = quality - quality.mean(axis=1, keepdims=True)
    follow = prior.follow / np.sqrt(quality.shape[1]) * off
    return np.hstack([np.full((len(quality), 1), prior.offset), follow])


def _near(x: FloatArray, z: FloatArray, gamma: float) -> Float64:
    """(n, p) k of unit rows: exp(−gamma ‖x − z‖²) without its constant part, which is b's to tell.
    What is left of its series in the cosine has no negative coefficient, so it is a kernel."""
    cosine = np.clip(x.astype(np.float64) @ z.astype(np.float64).T, -1, 1)
    near: Float64 = np.expm1(2 * gamma * cosine) / np.expm1(2 * gamma)
    return near


def _fortes(quality: FloatArray, outcomes: Outcomes) -> tuple[float, float]:
    """Mean and standard deviation over the experts of what each reaches where it is expected to
    lead most."""
    n, n_experts = quality.shape
    lead = quality - (quality.sum(axis=1, keepdims=True) - quality) / max(n_experts - 1, 1)
    count = max(1, round(FORTE * n))
    reached = []
    for e in range(n_experts):
        rows = np.argsort(-lead[:, e], kind="stable")[:count]
        known = outcomes.quality[rows, e]
        if not np.isnan(known).all():
            reached.append(float(np.nanmean(known, dtype=np.float64)))
    return float(np.mean(reached)), float(np.std(reached))


def _left_out(
    quality: FloatArray, outcomes: Outcomes, vectors: FloatArray, seed: int
) -> list[tuple[Float64, Float64]]:
    """For each expert, seen from the others: its outcomes less their mean (p,), and of each width
    the covariance that it stands for (4, p, p)."""
    rng = np.random.default_rng(seed)
    parts = []
    n_experts = quality.shape[1]
    if n_experts < 2:
        return []
    unit = JoinPrior(1.0, 1.0, 1.0, 1.0, best=0.0)
    for e in np.sort(rng.permutation(n_experts)[:EXPERTS]):
        known = np.flatnonzero(outcomes.known[:, e])
        rows = np.sort(rng.permutation(known)[:SAMPLE])
        if not len(rows):
            continue
        others = np.delete(quality[rows], e, axis=1).astype(np.float64)
        follow = _linear(others, unit)[:, 1:]
        grams = np.stack(
            [
                np.ones((len(rows), len(rows))),
                follow @ follow.T,
                _near(vectors[rows], vectors[rows], GAMMA),
                np.eye(len(rows)),
            ]
        )
        rest = outcomes.quality[rows, e].astype(np.float64) - others.mean(axis=1)
        parts.append((rest, grams))
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Newcomers:
    """The experts that joined, in their order, and the prior they joined by. Each is scored from
    those trained on alone, so another one's coming or going changes nothing for it."""

    prior: JoinPrior
    experts: Mapping[str, Joined]

    def scores(self, quality: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The known experts' quality (n, E) and vectors (n, d) → expected quality and its standard
        deviation, both (n, J)."""
        said = [expert.predict(quality, vectors) for expert in self.experts.values()]
        return np.stack([q for q, _ in said], axis=1), np.stack([u for _, u in said], axis=1)

    def and_(self, id: str, evidence: Evidence) -> Newcomers:
        """With this one, in the place of one of its name."""
        return Newcomers(self.prior, {**self.experts, id: Joined(evidence, self.prior)})

    def without(self, id: str) -> Newcomers:
        return Newcomers(self.prior, {k: v for k, v in self.experts.items() if k != id})

    def state(self) -> State:
        return packed({str(i): j.evidence.state() for i, j in enumerate(self.experts.values())})

    @classmethod
    def restore(cls, prior: JoinPrior, experts: Sequence[str], state: State) -> Newcomers:
        """The inverse of `state`: scores the same to the last bit."""
        return cls(
            prior,
            {
                id_: Joined(Evidence.restore(part_of(state, str(i))), prior)
                for i, id_ in enumerate(experts)
            },
        )
