"""A base model with its LoRA adapters in this process: load, forward, forget.

Knows nothing of calls, sampling or threads; whoever owns it calls it from one thread.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from composer.adapters.files import WEIGHTS
from composer.adapters.gates.files import read_gate
from composer.adapters.gates.groups import grouped
from composer.adapters.gates.prior import prior
from composer.adapters.lora_config import read_lora_config
from composer.adapters.tensors import RawTensor, read_tensors
from composer.adapters.verify import adapter_digest
from composer.engines.gated import MixedGates, Use
from composer.engines.lora import BASE, MixedLora
from composer.errors import ComposerError, EngineError, EngineUnavailable
from composer.types import Adapter, Call

if TYPE_CHECKING:
    from composer.engines.local import EmbeddedSettings

log = logging.getLogger(__name__)

_TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types that adapters are verified to have."""

CACHED_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types whose whole state is keys and values per token, which rows can be cut out of."""

LOADING = threading.Lock()
"""transformers and peft patch their own modules and torch's while they build a model. Two loads at
once in one process have left them patched for good: tied weights no longer tied, tensors without
data. So has a load beside one that assigns parameters, which are then registered without data."""


class Output(NamedTuple):
    """Of a forward: `logits` (rows, vocab) after the last column, in float32 at least; `gates` the
    mean weights (new, G, E) of each row that asked for them, empty where none did; `weights` the
    means over its tokens, by module, of each row that is to be weighed."""

    logits: Tensor
    gates: Sequence[Tensor | None] = ()
    weights: Mapping[int, Mapping[str, tuple[float, ...]]] = MappingProxyType({})


class LocalModel:
    """Tokenizer, base model, and the adapters loaded so far, plain and gated, known by digest."""

    def __init__(self, settings: EmbeddedSettings) -> None:
        """Blocks for seconds to minutes. Raises EngineUnavailable with the remedy."""
        disable_progress_bar()  # type: ignore[no-untyped-call]  # of a load that takes milliseconds; a service writes a log
        self.device = torch.device(settings.device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                settings.model, revision=settings.revision
            )
            with LOADING:
                base: Any = AutoModelForCausalLM.from_pretrained(
                    settings.model,
                    revision=settings.revision,
                    dtype=getattr(torch, settings.dtype),
                    use_safetensors=True,
                )
            self._base: torch.nn.Module = base.to(self.device)
        except Exception as error:  # a hub, a file system, a parser and a device driver may fail
            raise EngineUnavailable(
                f"the base model {settings.model!r} cannot be loaded ({error}); `model` must be a "
                "folder with config, tokenizer and safetensors weights, or a hub name this "
                "machine can reach, and `device` one it has"
            ) from error
        self._base.eval().requires_grad_(False)
        config = base.config.get_text_config(decoder=True)
        unknown = set(getattr(config, "layer_types", None) or ()) - CACHED_LAYERS
        if unknown:
            raise EngineUnavailable(
                f"{settings.model!r} has layers of type {', '.join(sorted(unknown))}, which the "
                "embedded engine cannot batch; serve it with vLLM"
            )
        self.context = min(
            settings.context_window or config.max_position_embeddings,
            config.max_position_embeddings,
        )
        self.end_ids = _end_ids(base.generation_config, self.tokenizer)
        self._peft: PeftModel | None = None
        self._names: dict[str, str] = {}
        self._dtype = getattr(torch, settings.dtype)
        self._lora = MixedLora(self._dtype)
        self._gates = MixedGates()
        self._pieces: dict[int, str] = {}

    # --- adapters ------------------------------------------------------------------------

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._names) | frozenset(self._gates.digests)

    def load(self, adapters: Collection[Adapter]) -> None:
        """All of them or, on EngineError, none."""
        added: list[str] = []
        try:
            for adapter in adapters:
                if adapter.digest not in self.digests:
                    if adapter.gate is None:
                        self._load(adapter)
                    else:
                        self._load_gate(adapter)
                    added.append(adapter.digest)
        except EngineError:
            self._delete(added)
            raise
        finally:
            self._attach()

    def forget(self, keep: Collection[Adapter]) -> None:
        kept = {adapter.digest for adapter in keep}
        self._delete([digest for digest in self.digests if digest not in kept])
        self._attach()

    def _attach(self) -> None:
        self._lora.attach(self._base, tuple(self._names.values()))
        self._gates.attach(self._base)

    def _load(self, adapter: Adapter) -> None:
        name = adapter_name(adapter.digest)
        try:
            config, tensors = _read(adapter)
            weights = {key: _to_torch(raw, self.device) for key, raw in tensors.items()}
            with LOADING:
                if self._peft is None:
                    self._peft = PeftModel(
                        self._base,
                        config,
                        name,
                        autocast_adapter_dtype=False,
                        low_cpu_mem_usage=True,
                    )
                else:
                    self._peft.add_adapter(
                        name, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True
                    )
                result: Any = set_peft_model_state_dict(
                    self._peft, weights, adapter_name=name, low_cpu_mem_usage=True
                )
            self._peft.eval()
            tuner: Any = self._peft.base_model
            tuner.set_adapter([])  # none is active by itself: rows name theirs
            # The base's own keys are missing too, and so are the other adapters'.
            missing = [key for key in result.missing_keys if name in key]
            odd = [*missing, *result.unexpected_keys]
            if odd:
                raise ValueError(f"its tensors do not match its config: {', '.join(odd[:4])}")
        except Exception as error:  # peft raises whatever its many readers raise
            self._remove(name)
            raise EngineError(
                f"adapter {adapter.path} cannot be loaded onto this base: {error}"
            ) from error
        self._names[adapter.digest] = name

    def _load_gate(self, adapter: Adapter) -> None:
        try:
            gate = read_gate(adapter.path)
            if gate.manifest.digest != adapter.digest:
                raise ValueError(
                    f"it changed on disk since it was checked (its digest is "
                    f"{gate.manifest.digest}, it was {adapter.digest}); restore its files, or "
                    "reload the registry, which checks it again"
                )
            for name, layer in gate.layers.items():
                module: Any = self._base.get_submodule(name)
                found = tuple(
                    getattr(module, size, None) for size in ("out_features", "in_features")
                )
                made = (layer.stacked.b.shape[0], layer.stacked.a.shape[1])
                if found != made:
                    raise ValueError(f"{name} is no linear layer of {made}")
            self._gates.add(adapter.digest, gate.to(self.device, self._dtype))
        except (ComposerError, AttributeError, ValueError, RuntimeError) as error:
            raise EngineError(
                f"gate {adapter.path} cannot be loaded onto this base: {error}"
            ) from error

    def _delete(self, digests: Collection[str]) -> None:
        for digest in digests:
            if digest in self._names:
                self._remove(self._names.pop(digest))
            else:
                self._gates.drop(digest)

    def _remove(self, name: str) -> None:
        """Takes an adapter out of every module, also one that is only half in."""
        for module in self._base.modules():
            if isinstance(module, LoraLayer):
                module.delete_adapter(name)
        if self._peft is not None:
            self._peft.peft_config.pop(name, None)
            if not self._peft.peft_config:
                self._base = self._peft.unload()
                self._peft = None

    # --- forward -------------------------------------------------------------------------

    def use_of(self, call: Call) -> Use:
        """What the rows of this call run on. Raises EngineError where its adapter is not loaded, or
        its gate needs of the request what the call does not bring."""
        if call.adapter is None:
            return Use()
        digest = call.adapter.digest
        if digest not in self.digests:
            raise EngineError(f"the adapter of expert {call.expert!r} is not loaded")
        if digest in self._names:
            return Use(digest)
        gate = self._gates.gate(digest)
        known = None
        if gate.manifest.per_request:
            if call.embedding is None:
                raise EngineError(
                    f"the gate of expert {call.expert!r} reads the request's text, and the call "
                    "came without its embedding"
                )
            try:
                known = prior(gate, call.embedding)
            except ValueError as error:
                raise EngineError(f"expert {call.expert!r}: {error}") from error
        groups = None if call.gates is None else grouped(frozenset(gate.layers), call.gates)
        return Use(digest, known, groups, call.weigh)

    def members(self, digest: str) -> tuple[str, ...]:
        """Of a gated adapter, in the order of its weights."""
        return self._gates.gate(digest).members

    def two_pass(self, digest: str | None) -> bool:
        return self._gates.two_pass(digest)

    def forward(
        self,
        ids: Tensor,
        *,
        lengths: Tensor,
        positions: Tensor,
        cache: DynamicCache,
        uses: Sequence[Use],
        hidden: Tensor | None = None,
    ) -> Output:
        """ids and positions (rows, new), right-aligned; `lengths` (rows,) is each row's tokens in
        cache and `ids` together; `uses` what each row runs on; `hidden` (n, new, d_model), of the
        rows whose gate takes two passes, is what `hidden` gave for them. Extends the cache."""
        names = [
            BASE
            if use.adapter is None or use.adapter in self._gates.digests
            else self._names[use.adapter]
            for use in uses
        ]
        self._lora.assign(names, self.device)
        self._gates.assign(uses, _real(ids.shape[1], lengths), hidden, self.device)
        output = self._base(
            **self._inputs(ids, lengths, positions, cache), use_cache=True, logits_to_keep=1
        )
        weights = {row: self._gates.means(row) for row, use in enumerate(uses) if use.weigh}
        return Output(output.logits[:, -1].float(), self._gates.traces(), weights)

    def hidden(
        self, ids: Tensor, *, lengths: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """As `forward` with every row on the base alone: the last hidden states, after the final
        norm, (rows, new, d_model) in the model's dtype."""
        uses = [Use()] * len(ids)
        self._lora.assign([BASE] * len(ids), self.device)
        self._gates.assign(uses, _real(ids.shape[1], lengths), None, self.device)
        base: Any = self._base
        output = base.get_decoder()(**self._inputs(ids, lengths, positions, cache), use_cache=True)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _inputs(
        self, ids: Tensor, lengths: Tensor, positions: Tensor, cache: DynamicCache
    ) -> dict[str, Any]:
        width = cache.get_seq_length() + ids.shape[1]
        return {
            "input_ids": ids,
            "attention_mask": _real(width, lengths),
            "position_ids": positions,
            "past_key_values": cache,
        }

    # --- text ----------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(  # type: ignore[no-any-return]
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def piece(self, token: int) -> str:
        """A token's text as it stands within a line, leading space included."""
        if token not in self._pieces:
            anchor = self.tokenizer.encode("a", add_special_tokens=False)
            text = self.tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
            start = self.tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
            self._pieces[token] = text[len(start) :]
        return self._pieces[token]


def _real(width: int, lengths: Tensor) -> Tensor:
    """(rows, width) False at padding, of right-aligned rows of these lengths, or of longer ones'
    last `width` columns."""
    return torch.arange(width, device=lengths.device) >= width - lengths[:, None]


def adapter_name(digest: str) -> str:
    """The digest as a name that torch's module dictionaries take: no dots, no method names."""
    return "digest_" + re.sub(r"[^0-9A-Za-z]", "", digest)


def _read(adapter: Adapter) -> tuple[LoraConfig, dict[str, RawTensor]]:
    """What peft is to load: read once, and the very bytes that were verified.

    Raises ValueError when they are not (the catalog may have checked them long ago), and what
    reading raises.
    """
    # What the config's problems are was asked when it was verified; an equal digest answers it.
    config, problems = read_lora_config(adapter.path, ())
    tensors = read_tensors(adapter.path / WEIGHTS)
    if config is None:
        raise ValueError("; ".join(map(str, problems)))
    found = adapter_digest(config, tensors)
    if found != adapter.digest:
        raise ValueError(
            f"it changed on disk since it was checked (its digest is {found}, it was "
            f"{adapter.digest}); restore its files, or reload the registry, which checks it again"
        )
    settings = {key: value for key, value in config.raw.items() if key != "runtime_config"}
    made: LoraConfig = LoraConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
    made.inference_mode = True
    return made, tensors


def _to_torch(raw: RawTensor, device: torch.device) -> Tensor:
    """In float32, as peft holds adapters of half precision too."""
    flat = torch.frombuffer(raw.data, dtype=_TORCH_DTYPE[raw.dtype])
    return flat.reshape(raw.shape).to(device, torch.float32)


def _end_ids(generation: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    """Chat models often end turns with another token than the tokenizer's own."""
    named = generation.eos_token_id if generation is not None else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
