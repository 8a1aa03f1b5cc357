"""What a router is: text in, one calibrated expected quality per expert out. It does not choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel

from composer.routing.curve import Curve
from composer.types import Ask, BoolArray, Expert, FloatArray, Tier, empty


@dataclass(frozen=True, slots=True)
class Query:
    """What can be read of a request. `text` is the caller's last words, untouched, and all that a
    router reads; `earlier` are their turns before it, oldest first, of which `conversation` makes
    queries that need none. `for_llm` is what an LLM that the router asks reads in the place of
    `text`, where that differs. `patient`: nobody waits for the decision (a batch), so that LLM may
    take its time."""

    text: str
    earlier: tuple[str, ...] = ()
    patient: bool = False
    for_llm: str | None = None

    @property
    def asked(self) -> str:
        """What an LLM reads."""
        return self.text if self.for_llm is None else self.for_llm


@dataclass(frozen=True, slots=True)
class Exploration:
    """How the router wants to try experts out: `floor` is the share of requests spread evenly over
    all eligible ones; the rest is drawn by quality and `thompson` times its uncertainty, in [0, 1],
    so that 0 takes the best. `chances` (E,), where there are any, take the place of both: a plan's
    experts are drawn by them, each once or, with `replacement`, as often as it is drawn. `learning`
    is what it must read again to learn from the outcome; it is recorded with the decision and not
    shown."""

    floor: float
    thompson: float = 0.0
    learning: Mapping[str, Any] = field(default_factory=empty)
    chances: FloatArray | None = None
    replacement: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """One row per expert, in the router's own order `experts`.

    `quality` (E,) is the calibrated probability that the expert answers well, NaN where it
    was not eligible; `uncertainty` (E,) its standard deviation. `reasons` holds, for the
    best few experts only, what the router saw (say `{"similarity": 0.83, "nearest": "…"}`).
    `cost` (E,) is expected US dollars of the call, None where the router does not know.
    `exploration` None: the best is always taken. `told` is what holds for all experts together and
    is shown among the plan's reasons, such as what an LLM was asked.
    """

    experts: tuple[str, ...]
    quality: FloatArray
    uncertainty: FloatArray
    reasons: Mapping[str, Mapping[str, Any]]
    cost: FloatArray | None = None
    exploration: Exploration | None = None
    told: Mapping[str, Any] = field(default_factory=empty)


@runtime_checkable
class Embedder(Protocol):
    """Texts to unit vectors. `id` and `digest` name the model: an artefact can refuse another."""

    id: str
    digest: str
    dim: int

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """(n,) texts → (n, d) float32 rows of length 1. Blocks; for offline use."""
        ...

    async def embed(self, text: str) -> FloatArray:
        """One text → (d,). Cached; concurrent callers share one batch off the event loop."""
        ...


class Vectors(Protocol):
    """An embedder as far as it needs not be loaded for: `digest` is of its files."""

    @property
    def id(self) -> str: ...

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Demands:
    """What a policy and the service demand of a router. `curve`: the policy aims at a quality or a
    spend; `quality`: the share that it aims at. `embedder` is what the service embeds with, None
    where that is not known."""

    curve: bool = False
    quality: float | None = None
    embedder: Vectors | None = None


NO_DEMANDS = Demands()


class Router(Protocol):
    """Built once per catalog and policy, then only read: safe for concurrent requests.

    `needs_texts`: it finds experts by their descriptions, skills and examples. `path_fields` are
    the settings that name files."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    paper: ClassVar[str]
    settings: ClassVar[type[BaseModel]]
    needs_texts: ClassVar[bool]
    path_fields: ClassVar[tuple[str, ...]]
    experts: tuple[str, ...]

    @classmethod
    def asks(cls, settings: Any) -> str | None:
        """The expert whose LLM it asks about each query, whether it is one of those scored or not;
        None where it needs none."""
        ...

    @classmethod
    def check(cls, experts: Sequence[Expert], settings: Any, demands: Demands = NO_DEMANDS) -> None:
        """Raises ValueError ("what is wrong; the remedy") when the experts cannot be scored this
        way, or a demand cannot be met. Quick: `composer check` asks it for every policy."""
        ...

    @classmethod
    def digest(cls, settings: Any) -> str:
        """Stands for the content of the files that the settings name; "" without any, or where
        they cannot be read. Quick."""
        ...

    @classmethod
    def build(cls, experts: Sequence[Expert], settings: Any, embedder: Embedder) -> Router:
        """Blocks (embeds the experts' texts): run it off the event loop. Raises as `check`."""
        ...

    @property
    def asked(self) -> str | None:
        """As `asks` said of its settings."""
        ...

    @property
    def curve(self) -> Curve | None:
        """What each weight on cost reaches on average, where that was measured."""
        ...

    async def score(self, query: Query, eligible: BoolArray, ask: Ask | None = None) -> Scores:
        """`eligible` (E,) in the order of `experts`; at least one is True. `ask` calls the expert
        `asked` on behalf of the request, whose timings and cost the call counts in; None where no
        engine runs, the request excludes that expert, or it is not there. Without an answer it can
        use a router decides as well as it can, and says so in `told`: it never fails for that."""
        ...
