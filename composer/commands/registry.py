"""`composer check · experts · schema`: the registry as it would be served."""

from __future__ import annotations

import json

from composer.commands.console import ExpertsFile, fail, out, read_settings, say
from composer.errors import ComposerError


def check(experts: ExpertsFile = None) -> None:
    """Print the catalog as a table, or every error at once (exit status 2). Warns of programs and
    keys that are not on this machine; a server's own flags are checked by its start alone."""
    from composer.build import load
    from composer.registry import catalog_table

    try:
        loaded = load(read_settings(experts=experts))
    except ComposerError as error:
        fail(error)
    out.print(catalog_table(loaded.catalog))
    for warning in loaded.warnings:
        say(f"warning: {warning}", "yellow")


def list_experts(experts: ExpertsFile = None) -> None:
    """List expert ids, one a line."""
    from composer.build import load

    try:
        catalog = load(read_settings(experts=experts)).catalog
    except ComposerError as error:
        fail(error)
    for expert in catalog.experts.values():
        print(f"{expert.id}\t{expert.server}\t{expert.description}")


def schema() -> None:
    """Print the JSON schema of experts.yaml, for editors."""
    from composer.build import families
    from composer.registry import registry_json_schema

    print(json.dumps(registry_json_schema(families()), indent=2))
