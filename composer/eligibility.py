"""The filter before the router: which experts can honour a request at all. Scores nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from composer.errors import ContextTooLong, RequestError, UnknownModel, Unsupported
from composer.types import Ability, ApiKey, BoolArray, Catalog, Expert, FloatArray, Policy, Request

MOST_CHARS_PER_TOKEN = 16
"""Text that averages more than this is not seen outside of long repeats."""


@dataclass(frozen=True, slots=True)
class Eligibility:
    """A policy's experts as columns, so that filtering 10,000 of them is a few array operations.

    `window` (E,) tokens, `chars_per_token` (E,), `templated` (E,) whether the expert reads a
    filled template instead of the conversation, `able` one (E,) mask per ability and `takes` one
    per extra parameter that any of them takes, all in the order of `experts`.
    """

    experts: tuple[str, ...]
    position: Mapping[str, int]
    window: FloatArray
    chars_per_token: FloatArray
    templated: BoolArray
    able: Mapping[Ability, BoolArray]
    takes: Mapping[str, BoolArray] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: Sequence[Expert]) -> Eligibility:
        ids = tuple(expert.id for expert in experts)
        return cls(
            experts=ids,
            position={expert: i for i, expert in enumerate(ids)},
            window=np.array([e.context_window for e in experts], np.float32),
            chars_per_token=np.array([e.chars_per_token for e in experts], np.float32),
            templated=np.array([e.prompt is not None for e in experts], np.bool_),
            able={
                ability: np.array([ability in e.abilities for e in experts], np.bool_)
                for ability in get_args(Ability)
            },
            takes={
                name: np.array([name in e.parameters for e in experts], np.bool_)
                for name in frozenset().union(*(e.parameters for e in experts))
            },
        )

    def mask(self, request: Request) -> BoolArray:
        """(E,) True where the expert may be asked.

        The prompt's length is estimated from its characters: the exact count is the engine's. So
        the estimate only prefers experts; where it leaves none, those stay that could still fit.
        Raises Unsupported or ContextTooLong, saying which demand left nobody.
        """
        mask = np.ones(len(self.experts), np.bool_)
        for expert in request.exclude:
            if expert in self.position:
                mask[self.position[expert]] = False
        if not mask.any():
            raise Unsupported(
                "every expert of this policy is excluded, by the request or by its key; exclude "
                "fewer, or ask another policy",
                param="composer.exclude",
            )
        for ability in sorted(request.needs):
            mask &= self.able[ability]
            if not mask.any():
                raise Unsupported(
                    f"no expert of this policy offers {ability!r} together with the rest of the "
                    f"request; leave it out or ask another model",
                    param=_FIELD[ability],
                )
        for name in sorted(request.parameters):
            mask &= self.takes.get(name, False)
            if not mask.any():
                raise Unsupported(
                    f"no expert of this policy can honour {name!r} together with the rest of the "
                    f"request; leave it out or ask another model",
                    param=name,
                )
        chars = np.where(self.templated, len(request.text), request.n_chars)  # (E,)
        room = self.window - (request.sampling.max_tokens or 1)
        fits = mask & (chars / self.chars_per_token <= room)
        if not fits.any():
            fits = mask & (chars / MOST_CHARS_PER_TOKEN <= room)
        if not fits.any():
            raise ContextTooLong(
                f"the prompt's {request.n_chars} characters and max_tokens "
                f"{request.sampling.max_tokens or 1} fit no eligible expert's context window "
                f"(the largest has {int(self.window[mask].max())} tokens); shorten the prompt "
                f"or lower max_tokens",
                param="messages" if request.prompt is None else "prompt",
            )
        return fits


def check_exclude(exclude: frozenset[str], experts: Mapping[str, Expert]) -> None:
    """Raises RequestError for an excluded id that no expert of the catalog has: misspelt, it
    would exclude nobody, and the caller would not know."""
    for expert in sorted(exclude - experts.keys()):
        raise RequestError(
            f"there is no expert {expert!r} to exclude; GET /v1/experts lists them",
            param="composer.exclude",
        )


def key_of(name: str, catalog: Catalog) -> ApiKey | None:
    """The caller's key by its name; None for "", whoever needs none or has the service's own.
    Raises Unsupported where it is there no more: whom it excluded and what it was allowed is not
    known then."""
    if not name:
        return None
    key = catalog.keys.get(name)
    if key is None:
        raise Unsupported(
            f"the key {name!r} is no longer known here; send the request with one that is"
        )
    return key


def check_parameters(request: Request, policy: Policy) -> None:
    """Raises Unsupported for a wire field beyond OpenAI's core that the policy does not allow."""
    if refused := sorted(request.parameters - policy.parameters):
        raise Unsupported(
            f"{refused[0]!r} is not allowed for model {policy.id!r}; leave it out, or ask a policy "
            "whose `parameters` name it",
            param=refused[0],
        )


def check_gates(request: Request, policy: Policy, catalog: Catalog) -> None:
    """Raises Unsupported for a wish to see gates where nobody who may answer has one. Of those
    whom a policy chooses among, one without a gate has nothing to tell, and may answer."""
    if request.gates is None:
        return
    adapters = (catalog.experts[expert].adapter for expert in policy.experts)
    if not any(adapter is not None and adapter.gate is not None for adapter in adapters):
        raise Unsupported(
            f"no expert of model {policy.id!r} has a gate; leave it out, or name one that has "
            "(GET /v1/experts tells)",
            param="composer.gates",
        )


def composed_of(excluded: frozenset[str], catalog: Catalog) -> frozenset[str]:
    """Those excluded, and the experts whose adapters are composed of theirs, or mix them by a gate,
    be it one inside a server's model: who wants no answer from an adapter wants none from a part of
    it. Adapters are told by their digests."""
    if not excluded:
        return excluded
    speaking = {expert: catalog.speaking(expert) for expert in catalog.experts}
    out = excluded & speaking.keys()
    while True:
        digests = {digest for id_ in out if (digest := speaking[id_][0])}
        more = {id_ for id_, (_, parts) in speaking.items() if not digests.isdisjoint(parts)}
        if more <= out:
            return excluded | out
        out |= more


def restricted(request: Request, catalog: Catalog) -> Request:
    """The request, which excludes whom its key excludes, too, and what is composed of these.
    Raises UnknownModel where the very
    model that it names is one of these; as `key_of`."""
    key = key_of(request.key, catalog)
    if key is None:
        return replace(request, exclude=composed_of(request.exclude, catalog))
    if request.model in key.exclude:
        raise UnknownModel(
            f"there is no model {request.model!r} for the key {key.id!r}; GET /v1/models lists "
            "those that there are",
            param="model",
        )
    return replace(request, exclude=composed_of(request.exclude | key.exclude, catalog))


_FIELD: Mapping[Ability, str] = {
    "tools": "tools",
    "json": "response_format",
    "vision": "messages",
    "logprobs": "logprobs",
}
