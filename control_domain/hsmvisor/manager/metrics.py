"""Prometheus metrics of a manager: what it did itself, and what there is in the database that all managers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

_HELP = {
    "hosts": "Hosts that have joined",
    "hosts_away": "Hosts that were not heard of for three heartbeats",
    "resources": "Resources that are there",
    "requests": "Requests that are active",
    "certificates": "Certificates that serve",
    "expiring": "Certificates in the last third of their life",
    "expired": "Certificates that serve and have expired",
    "failing": "Materials whose last attempt failed",
    "pending": "Deliveries that are not done",
    "denied": "Denials that stand",
}


class Metrics:
    def __init__(self, started_at: float, counters: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """`counters`: what this manager counts itself, by name: a line of help, and how many so far."""
        self._started_at, self._counters = started_at, counters

    def text(self, there: Mapping[str, int], stages: Mapping[str, int]) -> str:
        """Returns the text format."""
        registry = CollectorRegistry()
        registry.register(_Once([*self._own(), *_shared(there, stages)]))
        return generate_latest(registry).decode()

    def _own(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("hsmvisor_manager_start_time_seconds", "When it started", value=self._started_at)
        yield GaugeMetricFamily("hsmvisor_manager_resident_bytes", "Proportional set size of its process", value=_resident())
        for name, (what, count) in self._counters.items():
            yield CounterMetricFamily(f"hsmvisor_manager_{name}", what, value=count())


def _shared(there: Mapping[str, int], stages: Mapping[str, int]) -> Iterable[Metric]:
    for name, value in there.items():
        yield GaugeMetricFamily(f"hsmvisor_fleet_{name}", _HELP[name], value=value)
    lines = GaugeMetricFamily("hsmvisor_fleet_lines", "Materials by the stage that they are in", labels=["stage"])
    for stage, count in sorted(stages.items()):
        lines.add_metric([stage], count)
    yield lines


def _resident() -> float:
    try:
        found = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0.0
    return float(found.split()[1]) * 1024


class _Once(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
