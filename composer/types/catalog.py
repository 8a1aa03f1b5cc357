"""What is served: experts, their servers and devices, policies, and the catalog of them all. Knows
no request."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from composer.prompting import PromptSpec
from composer.types.values import Ability, Usage, empty

SAFE_PARAMETERS: frozenset[str] = frozenset(
    {
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "reasoning_effort",
        "verbosity",
    }
)
"""Wire fields that shape an answer and nothing else, which a policy allows unless it says
otherwise. What could reach into other requests or cost without bound (`cache_salt`,
`chat_template`, `priority`, `prompt_logprobs`) has to be allowed by name."""


@dataclass(frozen=True, slots=True)
class MemberShare:
    """One adapter of a composition: what it was called there, its digest, its weight."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Composed:
    """What an adapter was composed of, `subtracted` having been taken out of every member first;
    its weight says nothing. `energy` is the smallest share of a module's squared norm
    that its method's cut and fitting it to the server's rank kept, 1 where nothing was cut."""

    method: str
    members: tuple[MemberShare, ...]
    energy: float = 1.0
    subtracted: MemberShare | None = None

    @property
    def parts(self) -> frozenset[str]:
        """Digests of all whose weights are in it: what was subtracted is, times −1."""
        sources = (*self.members, *filter(None, [self.subtracted]))
        return frozenset(source.digest for source in sources)


@dataclass(frozen=True, slots=True)
class Gated:
    """What a gate mixes, and what it takes. `members` and their `digests` are in the order of its
    weights, `digest` is the gate's own. `passes` 2: a token's weights need a pass of the base alone
    first; `per_request`: they need the request's text as the embedder `embedder` sees it, whose
    digest is `embedder_digest`. `subtracted` is the digest of the adapter that was taken out of
    every member first; "": none was."""

    kind: str
    members: tuple[str, ...]
    digests: tuple[str, ...]
    digest: str = ""
    passes: int = 1
    per_request: bool = False
    embedder: str = ""
    embedder_digest: str = ""
    subtracted: str = ""

    @property
    def parts(self) -> frozenset[str]:
        """As of `Composed`."""
        return frozenset((*self.digests, *filter(None, [self.subtracted])))


@dataclass(frozen=True, slots=True)
class Adapter:
    """A verified LoRA adapter on disk. `digest` is the sha256 of its config and tensors,
    so equal digests mean equal behaviour on the same base. `server_path` is the same folder
    as a server in another container sees it; None: as we see it. `composed` None: it was
    trained. With `gate` the folder is a gated adapter's: several adapters mixed per token, and
    `rank` the sum of theirs."""

    path: Path
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    server_path: str | None = None
    composed: Composed | None = None
    gate: Gated | None = None

    @property
    def parts(self) -> frozenset[str]:
        """Digests of the adapters that this one is made of; none where it was trained."""
        sources = (self.composed, self.gate)
        return frozenset().union(*(source.parts for source in sources if source is not None))


@dataclass(frozen=True, slots=True)
class Cost:
    """Price of a call in US dollars per million tokens."""

    input_per_1m: float
    output_per_1m: float

    def of(self, usage: Usage) -> float:
        """US dollars for these tokens."""
        spent = (
            self.input_per_1m * usage.prompt_tokens + self.output_per_1m * usage.completion_tokens
        )
        return spent / 1e6


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or whatever else has memory for some of the servers placed on it at a time."""

    id: str
    memory_gb: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a server's weights go when it is loaded, and what loading costs, in seconds.

    The seconds are first estimates: what is observed replaces them. `sleep_level` None stops
    the process to make room; 1 or 2 puts it to sleep (vLLM's sleep mode) and wakes it again.
    """

    device: str
    memory_gb: float
    start_s: float = 60.0
    stop_s: float = 5.0
    sleep_level: Literal[1, 2] | None = None
    sleep_s: float = 2.0
    wake_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that runs models. `settings` is the engine's own validated model, so that
    two servers are the same exactly when they compare equal. `placement` None: it is always
    there, and takes no room from others. `gate` is inside its model, so that whoever is served
    there answers through it; None: it has none, as far as its model can be read."""

    id: str
    engine: str
    settings: Any
    placement: Placement | None = None
    gate: Gated | None = None


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """An expert's own values for what a request leaves open; None: none of its own."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """Something that can answer: the server's base model, alone or with one adapter.

    `context_window` is in tokens; `chars_per_token` is the estimate the filter uses before
    any tokenizer is asked. `parameters` are the wire fields beyond OpenAI's core that its
    engine understands (`top_k`, `repetition_penalty` …). `cost` is None where the price is
    unknown.
    """

    id: str
    server: str
    description: str = ""
    skills: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    adapter: Adapter | None = None
    prompt: PromptSpec | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    context_window: int = 4096
    chars_per_token: float = 3.0
    abilities: frozenset[Ability] = frozenset()
    parameters: frozenset[str] = frozenset()
    cost: Cost | None = None
    source: Literal["file", "runtime"] = "file"


@dataclass(frozen=True, slots=True)
class Component:
    """A router or strategy by its registered name, with its own validated settings. `digest`
    stands for the content of the files that they name."""

    name: str
    settings: Any
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Unsure:
    """What a policy does where the best chosen expert's expected quality is `below` its floor:
    say so in the answer (which it does in any case), ask `k` experts, or go to the best by
    quality."""

    below: float
    do: Literal["say", "ask_more", "ask_stronger"] = "say"
    k: int = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """A named way of answering. `experts` are the ids it may use, in catalog order.

    `threshold` is a calibrated quality in [0, 1]: when no expert reaches it, the plan is
    `default_expert` alone. `cost_weight` is λ of `quality − λ·cost`, in quality per
    US dollar per million output tokens. `k` is the number of experts a plan may hold.
    `max_wait_s` bounds the wait of each of its calls for a lease, in seconds; None: the
    process's default. `parameters` are the extra wire fields that its requests may carry.
    `tolerance` is the expected quality that may be given up for an expert that is resident.
    `quality` (share of the best single expert's mean quality, at least cost) or `max_cost` (US
    dollars a request on average) take the place of `cost_weight`, and need a trained router.
    `min_quality`, `top_p`, `null_expert` with `null_margin`, and `unsure`: see `choose`.
    `stay` is the expected quality that may be given up for a conversation to keep its experts.
    """

    id: str
    router: Component
    strategy: Component
    experts: tuple[str, ...]
    default_expert: str | None = None
    threshold: float = 0.0
    cost_weight: float = 0.0
    k: int = 1
    max_wait_s: float | None = None
    parameters: frozenset[str] = SAFE_PARAMETERS
    tolerance: float = 0.0
    quality: float | None = None
    max_cost: float | None = None
    min_quality: float = 0.0
    top_p: float | None = None
    null_expert: str | None = None
    null_margin: float = 0.0
    unsure: Unsure | None = None
    stay: float = 0.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A caller's key with a name, and the experts that must not answer its requests. The key itself
    stands in the environment `variable`; `digest` is its sha256, None while that is not set.
    `admin`: it may also change and watch the service, not only ask it."""

    id: str
    variable: str
    digest: bytes | None
    exclude: frozenset[str]
    admin: bool = False

    def opens(self, given: bytes) -> bool:
        """Whether this is the key. In constant time."""
        if self.digest is None:
            return False
        return hmac.compare_digest(hashlib.sha256(given).digest(), self.digest)


@dataclass(frozen=True, slots=True)
class Catalog:
    """One frozen snapshot. `version` counts up by one per snapshot within a process;
    `digest` is equal for equal content across processes."""

    version: int
    digest: str
    servers: Mapping[str, Server]
    experts: Mapping[str, Expert]
    policies: Mapping[str, Policy]
    default_policy: str = "auto"
    devices: Mapping[str, Device] = field(default_factory=empty)
    keys: Mapping[str, ApiKey] = field(default_factory=empty)

    def speaking(self, expert: str) -> tuple[str, frozenset[str]]:
        """The digest of the adapter that this expert is, "" for a base alone, and those of the
        adapters that speak through it: members of a composition or gate, and a gate inside its
        server's model with the members of that."""
        own = self.experts[expert]
        inside = self.servers[own.server].gate
        parts = own.adapter.parts if own.adapter is not None else frozenset()
        if inside is None:
            return "" if own.adapter is None else own.adapter.digest, parts
        parts |= inside.parts
        if own.adapter is None:
            return inside.digest, parts
        return own.adapter.digest, parts | {inside.digest}

    def revision(self, expert: str) -> str:
        """Equal, across processes, for equal answers as far as the registry says: the engine, which
        model it runs and where, the adapter's content, the prompt template, and the expert's own
        sampling. A model whose weights are replaced in place keeps it."""
        own = self.experts[expert]
        server = self.servers[own.server]
        model = [str(getattr(server.settings, name, None)) for name in _MODEL]
        adapter = None if own.adapter is None else own.adapter.digest
        if server.gate is not None:
            model.append(server.gate.digest)
        said = repr((server.engine, model, adapter, own.prompt, own.sampling))
        return hashlib.sha256(said.encode()).hexdigest()[:16]


_MODEL = ("url", "model", "revision", "served_name", "table")
"""What engines' settings call the model they run, and where."""
