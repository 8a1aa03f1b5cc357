"""experts.yaml and runtime experts → Catalog. Knows no router, strategy or engine but by name."""

from composer.registry.families import (
    ComponentFamily,
    EngineFamily,
    Families,
    RouterFamily,
    StrategyFamily,
)
from composer.registry.fitting import in_words
from composer.registry.gather import RUNTIME
from composer.registry.load import Loaded, RegistryError, load_catalog
from composer.registry.schema import registry_json_schema
from composer.registry.table import catalog_table

__all__ = [
    "RUNTIME",
    "ComponentFamily",
    "EngineFamily",
    "Families",
    "Loaded",
    "RegistryError",
    "RouterFamily",
    "StrategyFamily",
    "catalog_table",
    "in_words",
    "load_catalog",
    "registry_json_schema",
]
