"""adapter_config.json as peft writes it: what it says, and what no engine here can honour."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from composer.adapters.files import CONFIG
from composer.errors import Problem

AdapterFeature = Literal[
    "rank_pattern", "alpha_pattern", "gate", "two_pass_gate", "per_request_gate"
]
"""What an engine may or may not be able to do beyond plain LoRA: adapters whose modules differ in
rank or scale, and gated adapters, two kinds of which need more than a layer's input."""

MAX_RANK = 4096

_Number = TypeVar("_Number", int, float)

_INERT = frozenset(
    {
        # bookkeeping
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
        "revision", "task_type",
        # training only
        "corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config",
        # tells of a setting that is itself checked
        "megatron_core", "qalora_group_size", "runtime_config",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha",
        "r", "rank_pattern", "target_modules", "use_rslora",
    }
)  # fmt: skip

_RETRAIN = "Train it again without, or merge it into a copy of the base model and serve that."
_UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "use_dora": (
        "DoRA rescales the base weights, which adapters that share a base cannot",
        _RETRAIN,
    ),
    "modules_to_save": (
        "whole modules saved beside the adapter would replace the base's",
        _RETRAIN,
    ),
    "fan_in_fan_out": ("transposed layers (GPT-2's Conv1D) are not supported", _RETRAIN),
    "layer_replication": ("replicated layers change the base model itself", _RETRAIN),
    "trainable_token_indices": ("trained token embeddings would change the shared base", _RETRAIN),
    "target_parameters": ("LoRA on bare parameters is not supported", _RETRAIN),
    "lora_bias": ("a bias on the B factor is not supported", _RETRAIN),
    "use_qalora": ("QALoRA is not supported", _RETRAIN),
    "use_bdlora": ("block-diagonal LoRA is not supported", _RETRAIN),
    "alora_invocation_tokens": ("activated LoRA is not supported", _RETRAIN),
    "arrow_config": ("an Arrow router is not an adapter", "Name the adapters it routes between."),
    "megatron_config": ("Megatron's parallel layers are not supported", _RETRAIN),
    "kasa_config": ("KaSA changes the base weights", _RETRAIN),
    "velora_config": ("VeLoRA is not supported", _RETRAIN),
    "monteclora_config": ("MonteCLoRA samples its weights anew", _RETRAIN),
    "ensure_weight_tying": ("tied adapters on embeddings are not supported", _RETRAIN),
}
_INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A LoRA adapter's settings. `scaling` of a module is alpha / rank, or alpha / √rank with
    rank-stabilised LoRA (arXiv 2312.03732)."""

    base: str | None
    rank: int
    alpha: float
    rank_stabilised: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    rank_pattern: Mapping[str, int]
    raw: Mapping[str, Any]

    @property
    def effective_alpha(self) -> float:
        """The alpha for which alpha / rank is the scaling that is really applied."""
        return self.alpha * math.sqrt(self.rank) if self.rank_stabilised else self.alpha

    def rank_of(self, module: str) -> int:
        """The rank of one module, by peft's rule for `rank_pattern`: the first key that ends
        the module's name, keys being regular expressions."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """What peft multiplies one module's B·A by, `alpha_pattern` by the same rule."""
        alpha: float = _of_pattern(self.raw.get("alpha_pattern") or {}, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def covers(self, module: str) -> bool | None:
        """Whether peft would put factors on `module`; None where only peft can tell (targets
        given as a regular expression, or 'all-linear')."""
        if isinstance(self.targets, str):
            return None
        if _ends(module, self.excluded) or not _ends(module, self.targets):
            return False
        if self.layers is None:
            return True
        index = re.search(r"\.(\d+)\.", module)
        return index is not None and int(index.group(1)) in self.layers

    def canonical(self) -> bytes:
        """The settings that change what the adapter computes, as bytes that do not depend on
        key order, nor on the order of lists (peft writes sets)."""
        kept = {key: value for key, value in self.raw.items() if key not in _INERT and value}
        return json.dumps(_sorted(kept), sort_keys=True, separators=(",", ":")).encode()


def read_lora_config(
    folder: Path, features: Collection[AdapterFeature]
) -> tuple[LoraConfig | None, list[Problem]]:
    """The settings and all that is wrong with them; no settings where they cannot be read."""
    file = folder / CONFIG
    problems: list[Problem] = []

    def refuse(path: str, message: str, remedy: str) -> None:
        problems.append(Problem(file=str(file), path=path, message=message, remedy=remedy))

    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse("", f"it is not readable JSON: {error}", "Save the adapter again with peft.")
        return None, problems
    if not isinstance(raw, dict):
        refuse("", "it is not a JSON object", "Save the adapter again with peft.")
        return None, problems
    kind = raw.get("peft_type")
    if kind != "LORA":
        refuse("peft_type", f"{kind!r} is not LoRA", "Only LoRA adapters are served; train one.")
        return None, problems

    _refuse_unsupported(raw, features, refuse)
    config = _parse(raw, refuse)
    return config, problems


Refuse = Callable[[str, str, str], None]


def _refuse_unsupported(
    raw: Mapping[str, Any], features: Collection[AdapterFeature], refuse: Refuse
) -> None:
    for key, (message, remedy) in _UNSUPPORTED.items():
        if raw.get(key):
            refuse(key, message, remedy)
    if raw.get("bias", "none") != "none":
        refuse("bias", "trained biases would change the shared base", _RETRAIN)
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_MOVE_THE_BASE):
        refuse(
            "init_lora_weights",
            f"{init!r} also moved the base weights",
            "Convert it with peft's `save_pretrained(path_initial_model_for_weight_conversion=…)`.",
        )
    for feature in ("rank_pattern", "alpha_pattern"):
        if raw.get(feature) and feature not in features:
            refuse(
                feature,
                "this server's engine needs one rank and alpha for all modules",
                "Train it again without, or serve it on an engine that can.",
            )
    known = _READ | _INERT | _UNSUPPORTED.keys() | {"bias", "init_lora_weights"}
    for key in raw.keys() - known:
        if raw[key]:
            refuse(
                str(key),
                "this setting is not known here, so the adapter might not compute what it should",
                "Remove it if it matters to training alone.",
            )


def _parse(raw: Mapping[str, Any], refuse: Refuse) -> LoraConfig | None:
    before_rank, before_alpha = raw.get("r"), raw.get("lora_alpha")
    fine = True
    if not _is_rank(before_rank):
        refuse("r", f"the rank is {before_rank!r}", f"Give a whole number from 1 to {MAX_RANK}.")
        fine = False
    if not _is_positive(before_alpha):
        refuse("lora_alpha", f"alpha is {before_alpha!r}", "Give a finite number above 0.")
        fine = False
    targets = _names(raw.get("target_modules"))
    if not targets:
        refuse(
            "target_modules",
            f"the targets are {raw.get('target_modules')!r}",
            'Name the modules that have factors, such as ["q_proj", "v_proj"].',
        )
        fine = False
    rank_pattern = raw.get("rank_pattern") or {}
    if not isinstance(rank_pattern, dict) or not all(
        _is_rank(rank) and _is_regex(pattern) for pattern, rank in rank_pattern.items()
    ):
        refuse("rank_pattern", "it does not map name patterns to ranks", "Save it with peft.")
        fine = False
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    ):
        refuse("layers_to_transform", "it is not a list of layer numbers", "Save it with peft.")
        fine = False
    if not fine:
        return None
    base = raw.get("base_model_name_or_path")
    return LoraConfig(
        base=base if isinstance(base, str) and base else None,
        rank=before_rank,  # type: ignore[arg-type]  # checked above
        alpha=float(before_alpha),  # type: ignore[arg-type]  # checked above
        rank_stabilised=bool(raw.get("use_rslora")),
        targets=targets or (),
        excluded=_names(raw.get("exclude_modules")) or (),
        layers=None if layers is None else frozenset(layers),
        rank_pattern=rank_pattern,
        raw=raw,
    )


def _of_pattern(patterns: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_positive(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]  # mypy loses the narrowing


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _names(value: object) -> tuple[str, ...] | str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def _ends(module: str, names: Iterable[str] | str) -> bool:
    if isinstance(names, str):
        return _is_regex(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted(
            (_sorted(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True)
        )
    return value
