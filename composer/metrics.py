"""Prometheus metrics of one service. Counts nothing that the scheduler counts already.

What the scheduler knows is read from it when Prometheus asks, so that nothing is added to the
way of a call and there is one truth; requests are counted as they end. Each service has a
registry of its own. Labels are bounded: servers and devices are an operator's few; experts
(there may be thousands) are named only while calls wait for them; requests that name an expert
count under the policy `EXPERT`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from composer.outcome import Outcome
from composer.scheduling.base import Scheduler

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

EXPERT = "(expert)"
"""The policy label of requests that name one expert."""

NONE = "(none)"
"""The policy label of requests that were refused before a policy was found."""

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """`answered` is told of each request's end; `render` is the body of GET /metrics."""

    def __init__(
        self,
        scheduler: Scheduler,
        policies: Callable[[], Collection[str]] = tuple,
        totals: Mapping[str, tuple[str, Callable[[], int]]] | None = None,
    ) -> None:
        """`policies` are the ids of the present catalog's; `totals` are counts that others keep,
        by name: what each counts, and how it is read."""
        self.registry = CollectorRegistry()
        self._policies = policies
        self._requests = Counter(
            "composer_requests",
            "Requests that ended, by policy and status (ok, error, cancelled).",
            ("policy", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "composer_request_seconds",
            "From a request's arrival to its end, of those that were answered.",
            ("policy",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "composer_first_token_seconds",
            "From a request's arrival to its first chunk.",
            ("policy",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "composer_tokens",
            "Tokens of answers, by policy and kind (prompt, completion).",
            ("policy", "kind"),
            registry=self.registry,
        )
        self.registry.register(_Scheduling(scheduler))
        self.registry.register(_Totals(totals or {}))

    def answered(self, outcome: Outcome) -> None:
        """Once per request, when it has ended."""
        policy = self._policy(outcome)
        timings, usage = outcome.timings, outcome.usage
        self._requests.labels(policy, outcome.status).inc()
        if outcome.status == "ok":
            self._seconds.labels(policy).observe(timings.total_ms / 1000)
        if timings.first_token_ms is not None:
            self._first_token.labels(policy).observe(timings.first_token_ms / 1000)
        self._tokens.labels(policy, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(policy, "completion").inc(usage.completion_tokens)

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)

    def _policy(self, outcome: Outcome) -> str:
        known = self._policies()
        if outcome.plan is None:
            return outcome.request.model if outcome.request.model in known else NONE
        return outcome.plan.policy if outcome.plan.policy in known else EXPERT


class _Totals(Collector):
    """Counts that somebody else keeps, read when asked for."""

    def __init__(self, totals: Mapping[str, tuple[str, Callable[[], int]]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        for name, (what, read) in self._totals.items():
            yield CounterMetricFamily(f"composer_{name}", what, value=read())


class _Scheduling(Collector):
    """What the scheduler knows, read when asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def describe(self) -> list[Metric]:
        """Nothing in advance: the registry asks nobody while the service is being built."""
        return []

    def collect(self) -> Iterator[Metric]:
        devices: Mapping[str, Any] = self._scheduler.snapshot()["devices"]
        yield from _of_devices(devices)
        yield from _of_calls(devices)


def _of_devices(devices: Mapping[str, Any]) -> Iterator[Metric]:
    swaps = _counter("swaps", "Loads and unloads that ended.", "device", "model", "move")
    seconds = _counter("swap_seconds", "Time they took.", "device", "model", "move")
    losses = _counter("server_losses", "Servers that died under calls.", "device", "model")
    faults = _counter("policy_faults", "Decisions that could not be.", "device")
    resident = _gauge("resident", "1 for a server that is on its device.", "device", "server")
    memory = _gauge("device_memory_gb", "What a device may hold.", "device")
    used = _gauge("device_used_gb", "What stands or moves on a device.", "device")
    fixed = _gauge("segment_routing", "Share of calls that the best fixed set covers.", "device")
    cached = _gauge("segment_cache", "Share of calls that the best cache serves.", "device")
    for device, state in devices.items():
        for model, moves in state["moved"].items():
            for move, total in moves.items():
                swaps.add_metric((device, model, move), total["count"])
                seconds.add_metric((device, model, move), total["seconds"])
        for model, lost in state["losses"].items():
            losses.add_metric((device, model), lost)
        for server in state["running"]:
            resident.add_metric((device, server), float(server in state["residents"]))
        faults.add_metric((device,), state["policy_faults"])
        memory.add_metric((device,), state["memory_gb"])
        used.add_metric((device,), state["used_gb"])
        consistency = state["consistency"]
        if consistency is not None and consistency["calls"]:
            fixed.add_metric((device,), consistency["segment_routing"])
            cached.add_metric((device,), consistency["segment_cache"])
    yield from (swaps, seconds, losses, faults, resident, memory, used, fixed, cached)


def _of_calls(devices: Mapping[str, Any]) -> Iterator[Metric]:
    queue = _gauge("queue", "Calls that wait for a lease.", "server", "expert", "priority")
    running = _gauge("running", "Calls that have a lease.", "server")
    refused = _counter("refused", "Calls that got no lease.", "device", "reason")
    left = _counter("left", "Callers that left the queue.", "device")
    waits = HistogramMetricFamily(
        "composer_wait_seconds", "Waits for leases.", labels=("device", "priority")
    )
    for device, state in devices.items():
        for line in state["queue"]:
            for priority in ("interactive", "batch"):
                queue.add_metric((line["server"], line["expert"], priority), line[priority])
        for server, count in state["running"].items():
            running.add_metric((server,), count)
        for reason, count in state["refused"].items():
            refused.add_metric((device, reason), count)
        left.add_metric((device,), state["left"])
        for priority, waited in state["waits"].items():
            buckets = [
                ("+Inf" if bound is None else str(float(bound)), count)
                for bound, count in waited["at_most_s"]
            ]
            waits.add_metric((device, priority), buckets, waited["total_s"])
    yield from (queue, running, refused, left, waits)


def _counter(name: str, what: str, *labels: str) -> Any:
    return CounterMetricFamily(f"composer_{name}", what, labels=labels)


def _gauge(name: str, what: str, *labels: str) -> Any:
    return GaugeMetricFamily(f"composer_{name}", what, labels=labels)
