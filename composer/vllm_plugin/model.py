"""The model classes: any decoder of vLLM's with a gate in its linear layers, made when it is asked
for by name. Knows nothing of how its folder came to be (`composer/adapters/gates/vllm_folder.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import is_pp_missing_parameter

from composer.adapters.base_model import GATE_BLOCK
from composer.adapters.gates.files import TENSORS, Manifest
from composer.adapters.gates.vllm_folder import FOLDER, PREFIX
from composer.vllm_plugin import check_version, vllm_version
from composer.vllm_plugin.linear import Gated, attach

_SOURCE = "gated_adapter."
"""Put before the names of the gate's tensors, so that they are no other's."""


def __getattr__(name: str) -> type[nn.Module]:
    """`Architecture@version`, as the plugin registered it."""
    architecture, at, _ = name.partition("@")
    if not at:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version(vllm_version())
    return gated_class(architecture)


@cache
def gated_class(architecture: str) -> type[nn.Module]:
    base: Any = ModelRegistry.models[architecture].load_model_cls()
    return type(PREFIX + architecture, (GatedModel, base), {"__module__": __name__})


class GatedModel:
    """Put before a model class of vLLM's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        manifest = manifest_of(vllm_config.model_config.hf_config.to_dict())
        if vllm_config.quant_config is not None:
            raise ValueError(
                "a gate on a quantised model was never tested; serve it without `quantization`"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        self.gated = _attached(model, manifest)
        self.absent = {
            module
            for module in manifest.modules
            if is_pp_missing_parameter(f"{module}.weight", model)
        }
        # Beside the weights their index would have vLLM pass over it in silence.
        self.secondary_weights = [
            DefaultModelLoader.Source(
                vllm_config.model_config.model,
                vllm_config.model_config.revision,
                subfolder=FOLDER,
                prefix=_SOURCE,
                fall_back_to_pt=False,
                allow_patterns_overrides=[TENSORS],
            )
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base model's, from which the gate's are taken out. Raises ValueError where a tensor
        of the gate's did not arrive, for without it the base model alone would answer."""
        homes = {module: (name, gated) for name, gated in self.gated for module in gated.modules}
        arrived: set[str] = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if not name.startswith(_SOURCE):
                    yield name, tensor
                    continue
                module, of_layer, part = name.removeprefix(_SOURCE).partition(".gate.")
                if not of_layer:  # of the gate as a whole: for kinds that are not served here
                    continue
                if module in homes:
                    homes[module][1].load(module, part, tensor)
                elif module not in self.absent:
                    raise ValueError(f"{name} is of no gated layer; compose the folder again")
                arrived.add(f"{module}.{part}")

        loaded = set(super().load_weights(others()) or ())  # type: ignore[misc]
        wanted = {f"{module}.{part}" for module in homes for part in ("a", "b", "rows")}
        if missing := sorted(wanted - arrived):
            raise ValueError(
                f"{len(missing)} of the gate's tensors did not arrive, {missing[0]} first; compose "
                f"the folder again, and load it with the default --load-format ({FOLDER}/{TENSORS} "
                "is beside the weights, and other formats pass over it)"
            )
        return loaded | {f"{name}.{own}" for name, gated in self.gated for own in gated.names}


def manifest_of(config: Mapping[str, Any]) -> Manifest:
    """What config.json says of the gate. Raises ValueError with the remedy."""
    block = config.get(GATE_BLOCK)
    if block is None:
        raise ValueError(
            f"config.json has no {GATE_BLOCK!r}; make the folder with `composer compose --gate`"
        )
    try:
        return Manifest.model_validate(block)
    except ValidationError as error:
        raise ValueError(
            f"config.json, {GATE_BLOCK}: {error.errors()[0]['msg']}; compose the folder again, "
            "with the composer that this plugin is of"
        ) from error


def _attached(model: Any, manifest: Manifest) -> list[tuple[str, Gated]]:
    """Every layer that has a gate, by its name in the model."""
    layers = dict(model.named_modules())
    packing: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    homes: dict[str, dict[str, Any]] = {}
    packed: dict[str, list[str]] = {}
    for module, gate in manifest.modules.items():
        if is_pp_missing_parameter(f"{module}.weight", model):
            continue
        home, names = _home(module, layers, packing)
        homes.setdefault(home, {})[module] = gate
        packed[home] = names
    told = (manifest.normalise, manifest.selection)
    return [
        (name, attach(name, layers[name], packed[name], gates, *told))
        for name, gates in homes.items()
    ]


def _home(
    module: str, layers: Mapping[str, nn.Module], packing: Mapping[str, list[str]]
) -> tuple[str, list[str]]:
    """The layer that a module of the checkpoint is, or is packed into, and what that packs."""
    if module in layers:
        return module, []
    parent, _, last = module.rpartition(".")
    for packed, names in packing.items():
        name = f"{parent}.{packed}" if parent else packed
        if last in names and name in layers:
            return name, list(names)
    raise ValueError(
        f"the gate has a module {module!r}, which this architecture has no linear layer for in "
        "vLLM; make the gate without it"
    )
