"""A catalog as a table for people, as `composer check` prints it."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from composer.types import Catalog, Device, Expert, Gated, Policy


def catalog_table(catalog: Catalog) -> Table:
    """One row per expert; devices and policies below. Digests are given whole, to be pinned."""
    table = Table(
        title=f"catalog {catalog.digest[:19]}…: {len(catalog.experts)} experts on "
        f"{len(catalog.servers)} servers",
        caption="\n".join(
            [
                *(_device(catalog, device) for device in catalog.devices.values()),
                *(_policy(catalog, policy) for policy in catalog.policies.values()),
            ]
        ),
        caption_justify="left",
    )
    table.add_column("expert", no_wrap=True)
    table.add_column("server", no_wrap=True)
    table.add_column("adapter", overflow="fold", min_width=20)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("about", ratio=1)
    for expert in catalog.experts.values():
        table.add_row(
            escape(expert.id),
            escape(expert.server),
            _adapter(expert),
            str(expert.context_window),
            _about(expert),
        )
    return table


def _about(expert: Expert) -> str:
    facts = [f"examples: {len(expert.examples)}"]
    if expert.abilities:
        facts.append(" ".join(sorted(expert.abilities)))
    if expert.cost is not None:
        facts.append(f"${expert.cost.input_per_1m:g} in, ${expert.cost.output_per_1m:g} out")
    if expert.source == "runtime":
        facts.append("added at run time")
    return f"{escape(expert.description)}\n[dim]{'; '.join(facts)}[/]".lstrip("\n")


def _adapter(expert: Expert) -> str:
    if expert.adapter is None:
        return "[dim]none: the base model[/]"
    told = f"rank {expert.adapter.rank} {expert.adapter.digest}"
    if (composed := expert.adapter.composed) is not None:
        shares = " + ".join(f"{one.weight:.3g} {one.name}" for one in composed.members)
        if (general := composed.subtracted) is not None:
            shares = f"({shares}), each less {general.name}"
        cut = f", keeping {composed.energy:.1%}" if composed.energy < 1 else ""
        told += f"\n[dim]{escape(f'{composed.method} of {shares}{cut}')}[/]"
    if (gate := expert.adapter.gate) is not None:
        less = f", each less {_short(gate.subtracted)}" if gate.subtracted else ""
        told += f"\n[dim]{escape(f'{gate.kind} gate of {_members(gate)}{less}')}[/]"
    return told


def _members(gate: Gated) -> str:
    """Each with the beginning of its digest, to be compared with that of the adapter itself."""
    named = zip(gate.members, gate.digests, strict=True)
    return ", ".join(f"{name} ({_short(digest)})" for name, digest in named)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:8]


def _device(catalog: Catalog, device: Device) -> str:
    placed = [
        f"{server.id} ({server.placement.memory_gb:g} GB)"
        for server in catalog.servers.values()
        if server.placement is not None and server.placement.device == device.id
    ]
    room = f"device {device.id}: {device.memory_gb:g} GB"
    return escape(f"{room}, shared by {', '.join(placed)}" if placed else f"{room}, unused")


def _policy(catalog: Catalog, policy: Policy) -> str:
    default = " (default)" if policy.id == catalog.default_policy else ""
    fallback = f", else {policy.default_expert}" if policy.default_expert else ""
    wait = f"; waits {policy.max_wait_s:g} s at most" if policy.max_wait_s is not None else ""
    given_up = f"; gives up {policy.tolerance:g} for who is loaded" if policy.tolerance else ""
    stay = f"; gives up {policy.stay:g} for who answered last" if policy.stay else ""
    return escape(
        f"policy {policy.id}{default}: {policy.router.name} over {len(policy.experts)} experts, "
        f"k {policy.k}, {policy.strategy.name}{fallback}{wait}{given_up}{stay}"
    )
