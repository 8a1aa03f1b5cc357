"""The shape of experts.yaml, of a card's `composer:` block and of a runtime expert: one model each.

Pure shapes and bounds: whether what is named exists is checked where the catalog is made.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from composer.adapters.recipe import RecipeSpec
from composer.prompting import PromptSpec
from composer.types import Ability

ID = r"^[a-z0-9][a-z0-9._/-]{0,63}$"
DIGEST = r"^sha256:[0-9a-f]{64}$"
SERVER_PATH = r"^/"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
PARAMETER = r"^\+?[a-z][a-z0-9_]{0,63}$"

Id = Annotated[str, Field(pattern=ID)]
Text = Annotated[str, Field(min_length=1)]
ServerPath = Annotated[str, Field(pattern=SERVER_PATH)]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HubAdapter(Spec):
    """An adapter on the Hugging Face hub."""

    hub: str = Field(pattern=r"^[\w][\w.-]*/[\w][\w.-]*$", description="Its name, as `org/name`.")
    revision: str = Field(
        min_length=1,
        description="Commit hash, tag or branch; a commit hash stays the same and is not asked "
        "for again.",
    )


class KeySpec(Spec):
    """A caller's own key. Whoever sends it gets no answer from the experts excluded here."""

    key_env: str = Field(
        pattern=VARIABLE,
        description="The environment variable that holds the key: it never stands in this file.",
    )
    exclude: tuple[Text, ...] = Field((), description="Ids of experts that must not answer.")
    admin: bool = Field(
        False,
        strict=True,
        description="Whether it may also add and delete experts, promote routers, and see the "
        "scheduler and the metrics. COMPOSER_API_KEY always may.",
    )


class DeviceSpec(Spec):
    """A GPU, or whatever else has memory for some of the servers placed on it at a time."""

    memory_gb: float = Field(
        gt=0, le=1e6, strict=True, description="Memory for the servers placed on it, in GB."
    )


class PlacementSpec(Spec):
    """Where a server stands among others, and what moving it costs: without one, it is always
    there. The seconds are first estimates, which what is observed replaces."""

    device: Id = Field(description="Id of the device, under `devices`.")
    memory_gb: float = Field(
        gt=0,
        le=1e6,
        strict=True,
        description="What it takes there while it is loaded, caches included, in GB.",
    )
    start_s: float = Field(
        60.0, ge=0, le=86_400, strict=True, description="Seconds that a cold start takes."
    )
    stop_s: float = Field(
        5.0, ge=0, le=86_400, strict=True, description="Seconds that stopping it takes."
    )
    sleep_level: Literal[1, 2] | None = Field(
        None,
        description="Put it to sleep instead of stopping it (vLLM's sleep mode): at 1 its "
        "weights go to main memory, at 2 they are dropped.",
    )
    sleep_s: float = Field(
        2.0, ge=0, le=86_400, strict=True, description="Seconds that falling asleep takes."
    )
    wake_s: float = Field(
        5.0, ge=0, le=86_400, strict=True, description="Seconds that waking up takes."
    )


def _adapter_kind(value: Any) -> str:
    return "hub" if isinstance(value, dict | HubAdapter) else "path"


AdapterSpec = Annotated[
    Annotated[Text, Tag("path")] | Annotated[HubAdapter, Tag("hub")],
    Discriminator(_adapter_kind),
]


def _composition_kind(value: Any) -> str:
    return "file" if isinstance(value, str) else "recipe"


CompositionSpec = Annotated[
    Annotated[Text, Tag("file")] | Annotated[RecipeSpec, Tag("recipe")],
    Discriminator(_composition_kind),
]


class CostSpec(Spec):
    """Price in US dollars per million tokens."""

    input_per_1m: float = Field(
        ge=0, le=1e9, strict=True, description="US dollars per million prompt tokens."
    )
    output_per_1m: float = Field(
        ge=0, le=1e9, strict=True, description="US dollars per million answer tokens."
    )


class SamplingSpec(Spec):
    """What holds where a request leaves it open."""

    max_tokens: int | None = Field(None, ge=1, strict=True, description="Longest answer.")
    temperature: float | None = Field(
        None, ge=0, le=2, strict=True, description="0 always takes the likeliest token."
    )
    top_p: float | None = Field(None, gt=0, le=1, strict=True, description="Nucleus of the draw.")


class CardSpec(Spec):
    """The `composer:` block of a model card, and what an expert in experts.yaml shares with it."""

    description: str = Field("", description="What the expert does, in a sentence or two.")
    skills: tuple[Text, ...] = Field((), description="What it can do, in a few words each.")
    examples: tuple[Text, ...] = Field((), description="Queries that it should be given.")
    examples_from: Text | None = Field(
        None,
        description="File with more examples: one a line, or .jsonl with strings or objects that "
        "have a `text`; relative to the file that names it.",
    )
    prompt: PromptSpec | None = Field(
        None, description="How free wording becomes the prompt that the expert was trained on."
    )
    sampling: SamplingSpec = Field(
        SamplingSpec(), description="The expert's own defaults where a request names none."
    )
    context_window: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        strict=True,
        description="Tokens of prompt and answer together; default: the base model's.",
    )
    chars_per_token: float = Field(
        3.0,
        gt=0,
        le=100,
        strict=True,
        description="For estimating a prompt's tokens before any tokenizer is asked.",
    )
    abilities: frozenset[Ability] | None = Field(
        None,
        description="What it can do beyond text; default: logprobs where its engine has them.",
    )
    cost: CostSpec | None = Field(None, description="Price in US dollars per million tokens.")
    digest: str | None = Field(
        None, pattern=DIGEST, description="The adapter's digest as `composer check` prints it."
    )


class ExpertSpec(CardSpec):
    """A model on a server, alone, with an adapter, or with a composition of adapters."""

    server: Id = Field(description="Id of the server that runs it.")
    adapter: AdapterSpec | None = Field(
        None,
        description="LoRA adapter: a folder, or `{hub: org/name, revision: …}`; without, the "
        "expert is the server's base model.",
    )
    composition: CompositionSpec | None = Field(
        None,
        description="In place of `adapter`: adapters that are composed into one, here or in a "
        "file that says so.",
    )
    gate: Text | None = Field(
        None,
        description="In place of `adapter`: folder of a gated adapter, which mixes several "
        "adapters per token.",
    )
    server_path: ServerPath | None = Field(
        None,
        description="The adapter's folder as the server sees it, where that is another "
        "(its own container); default: by `adapters_from`, else as here. Of a composition: the "
        "folder `compositions` of COMPOSER_CACHE_DIR.",
    )


class AdaptersFrom(Spec):
    """A folder of adapters and gates, each with its card (README.md)."""

    path: Text = Field(
        description="Pattern of the folders of adapters and gates, such as ./adapters/*."
    )
    server: Id = Field(description="Id of the server that runs them.")
    id_prefix: str = Field(
        "", pattern=r"^[a-z0-9._/-]*$", description="Put before the folder's name to make the id."
    )
    server_path: ServerPath | None = Field(
        None,
        description="What the server sees (its own container) in place of the folder before the "
        "pattern's first `*`: /mnt/adapters makes ./adapters/fox into /mnt/adapters/fox there.",
    )


class UnsureSpec(Spec):
    """What happens where no chosen expert is expected to do well enough."""

    below: float = Field(gt=0, le=1, strict=True, description="The floor of expected quality.")
    do: Literal["say", "ask_more", "ask_stronger"] = Field(
        "say",
        description="Answer and say `composer.confident: false`, ask `k` experts, or go to the "
        "best one whatever it costs, unless a spend is aimed at.",
    )
    k: int = Field(3, ge=2, le=1000, strict=True, description="Experts that `ask_more` asks.")


class PolicySpec(Spec):
    """A named way of answering; `router` and `strategy` are checked by their own families."""

    experts: tuple[Text, ...] = Field(
        ("*",),
        min_length=1,
        description="Ids or patterns of the experts it may use: `*`, `math-*`; `!x*` leaves out.",
    )
    default_expert: Id | None = Field(
        None, description="Answers when no expert's score reaches the threshold."
    )
    threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=True,
        description="Calibrated quality below which the default expert answers.",
    )
    cost_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        strict=True,
        description="Quality given up to save one US dollar per million answer tokens.",
    )
    k: int = Field(1, ge=1, le=1000, strict=True, description="How many experts a plan may hold.")
    max_wait_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        strict=True,
        description="Most seconds that a call may wait for its expert, swaps included, before it "
        "is refused (503); default: the service's own.",
    )
    parameters: tuple[Annotated[str, Field(pattern=PARAMETER)], ...] | None = Field(
        None,
        description="Extra fields that requests may carry (top_k …): names replace the default, "
        "which is all that shape an answer and nothing else; names that begin with `+` add to it.",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=True,
        description="Expected quality given up for an expert that is loaded already.",
    )
    quality: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        strict=True,
        description="Share of the best single expert's mean quality to be reached at least cost: "
        "1 is as good as that expert, and the highest is what the router's curve reaches (1, or "
        "more where routing beats that expert); needs a router trained on outcomes with costs.",
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        strict=True,
        description="US dollars that a request may cost on average, all its calls together, for "
        "the best quality; needs a router trained on outcomes with costs.",
    )
    min_quality: float = Field(
        0.0, ge=0, le=1, strict=True, description="Experts expected to do worse are passed over."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        strict=True,
        description="Ask only as many experts, `k` at most, as make it this likely that one of "
        "them is right.",
    )
    null_expert: Id | None = Field(
        None, description="Answers alone where it is nearly as good as the best: the base model."
    )
    null_margin: float = Field(
        0.0, ge=0, le=1, strict=True, description="What `nearly` means, in expected quality."
    )
    unsure: UnsureSpec | None = Field(None, description="What to do where expectations are low.")
    stay: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=True,
        description="Expected quality given up for a conversation to keep the expert it had last.",
    )


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no version number")
    return value


class FileSpec(Spec):
    """experts.yaml from the top. The blocks below are validated one by one, so that an error in
    one does not hide those of the others."""

    version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        description="The version of this file's format, which is 1."
    )
    devices: dict[str, Any] = Field(
        default_factory=dict, description="What servers share by turns, by id."
    )
    servers: dict[str, Any] = Field(description="Processes that run models, by id.")
    experts: dict[str, Any] = Field(default_factory=dict, description="Experts by id.")
    adapters_from: Any = Field((), description="Folders of adapters, each with its card.")
    policies: dict[str, Any] = Field(description="Named ways of answering, by id.")
    keys: dict[str, Any] = Field(
        default_factory=dict,
        description="Callers' keys by name, beside COMPOSER_API_KEY. Where there is any key, "
        "requests need one.",
    )
    default_policy: Id = Field("auto", description="The policy for requests that name none.")
