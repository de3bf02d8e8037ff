"""Prometheus metrics: what the workers report, gathered when somebody asks, and what the host itself counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hsmvisor.host import reports
from hsmvisor.host.module import SERVING, Module
from hsmvisor.serving.errors import ServiceError
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry


@dataclass(frozen=True)
class HostCounts:
    """What the host itself counts, at one moment."""

    started_at: float
    launcher_restarts: int
    provider_restarts: int
    audit_lines: int
    audit_failing: bool
    calls_refused: int


@dataclass(frozen=True)
class _Sample:
    module: Module
    statistics: reports.Statistics | None
    status: reports.Status | None


class Metrics:
    def __init__(self, modules: Callable[[], list[Module]], counts: Callable[[], HostCounts], within: float) -> None:
        self._modules, self._counts, self._within = modules, counts, within

    async def text(self) -> str:
        """Returns the text format; a worker that does not answer in time is missing from it, and counted as not up."""
        samples = await asyncio.gather(*map(self._sample, self._modules()))
        registry = CollectorRegistry()
        registry.register(_Once([*_host(self._counts()), *_modules(samples), *_operations(samples), *_generations(samples)]))
        return generate_latest(registry).decode()

    async def _sample(self, module: Module) -> _Sample:
        if module.state != SERVING:
            return _Sample(module, None, None)
        try:
            async with asyncio.timeout(self._within):
                statistics, status = await asyncio.gather(module.statistics(), module.status())
        except (ServiceError, TimeoutError):
            return _Sample(module, None, None)
        return _Sample(module, statistics, status)


class _Once(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _host(counts: HostCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily("hsmvisor_host_start_time_seconds", "When the host service began.", counts.started_at)
    restarts = CounterMetricFamily("hsmvisor_host_helper_restarts", "Restarts of the host's helper processes.", labels=["helper"])
    restarts.add_metric(["launcher"], counts.launcher_restarts)
    restarts.add_metric(["key-provider"], counts.provider_restarts)
    yield restarts
    yield CounterMetricFamily("hsmvisor_host_audit_lines", "Lines written to the audit log.", counts.audit_lines)
    yield GaugeMetricFamily("hsmvisor_host_audit_failing", "1 while the audit log cannot be written.", int(counts.audit_failing))
    yield CounterMetricFamily("hsmvisor_host_calls_refused", "Control calls refused for who called.", counts.calls_refused)


def _modules(samples: list[_Sample]) -> Iterator[Metric]:
    up = GaugeMetricFamily("hsmvisor_module_up", "1 while the module's worker answers.", labels=["module"])
    restarts = CounterMetricFamily("hsmvisor_module_restarts", "Restarts of the module's worker.", labels=["module"])
    connections = GaugeMetricFamily("hsmvisor_module_connections", "Open guest connections.", labels=["module"])
    sessions = GaugeMetricFamily("hsmvisor_module_sessions", "Open PKCS#11 sessions.", labels=["module"])
    total = CounterMetricFamily(
        "hsmvisor_module_connections_accepted", "Guest connections since the worker began.", labels=["module"]
    )
    refused = CounterMetricFamily("hsmvisor_module_connections_refused", "Guest connections refused.", labels=["module"])
    for sample in samples:
        labels = [sample.module.name]
        up.add_metric(labels, int(sample.statistics is not None))
        restarts.add_metric(labels, sample.module.restarts)
        if sample.statistics is not None:
            connections.add_metric(labels, sample.statistics.connections)
            sessions.add_metric(labels, sample.statistics.sessions)
            total.add_metric(labels, sample.statistics.connections_total)
            refused.add_metric(labels, sample.statistics.connections_refused)
    yield from (up, restarts, connections, sessions, total, refused)


def _operations(samples: list[_Sample]) -> Iterator[Metric]:
    labels = ["module", "operation", "mechanism"]
    failed = CounterMetricFamily("hsmvisor_operation_errors", "Operations that ended with an error.", labels=labels)
    latency = HistogramMetricFamily("hsmvisor_operation_seconds", "Time of operations in the worker.", labels=labels)
    for sample in samples:
        seen = set()
        for row in sample.statistics.operations if sample.statistics else ():
            values = [sample.module.name, row.operation, row.mechanism]
            if (row.operation, row.mechanism) in seen:
                continue
            seen.add((row.operation, row.mechanism))
            failed.add_metric(values, row.errors)
            latency.add_metric(values, _cumulative(row), row.seconds)
    yield from (failed, latency)


def _cumulative(row: reports.Operation) -> list[tuple[str, float]]:
    """Returns Prometheus's buckets: cumulative, the last one +Inf."""
    buckets, sum_so_far = [], 0
    for bound, count in zip(row.bounds, row.counts, strict=False):
        sum_so_far += count
        buckets.append((repr(bound), float(sum_so_far)))
    return [*buckets, ("+Inf", float(row.count))]


def _generations(samples: list[_Sample]) -> Iterator[Metric]:
    labels = ["module", "material", "generation", "state"]
    age = GaugeMetricFamily("hsmvisor_generation_age_seconds", "Time since the generation was activated.", labels=labels)
    expiry = GaugeMetricFamily(
        "hsmvisor_certificate_not_after_seconds", "When the leaf certificate expires (Unix time).", labels=labels
    )
    drain = GaugeMetricFamily("hsmvisor_generation_drain_end_seconds", "When the drain window ends (Unix time).", labels=labels)
    now = time.time()
    for sample in samples:
        for material in sample.status.materials if sample.status else ():
            for row in material.generations:
                values = [sample.module.name, material.name, str(row.number), row.state]
                if row.activated_at:
                    age.add_metric(values, max(0.0, now - row.activated_at))
                if row.not_after:
                    expiry.add_metric(values, row.not_after)
                if row.drain_ends_at:
                    drain.add_metric(values, row.drain_ends_at)
    yield from (age, expiry, drain)
