"""Tallies of an adapter's versions from metrics: a service's own /metrics pages, or a Prometheus that scrapes them."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.metrics import ADAPTER_SECONDS, ADAPTER_USES
from lorafleet.eval.canary import Tally

RAY: Final = "ray_"  # in front of every name that Ray exports
TIMEOUT_S: Final = 10.0
TRIES: Final = 3
COUNTED: Final = ("ok", "error")

Counts = dict[tuple[str, ...], float]
"""By (page, kind, version, result or bucket's bound, other labels)."""


class Pages:
    """Metrics pages, read by ourselves: what has come since the first look. A counter that falls began anew."""

    def __init__(self, urls: Sequence[str], adapter: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Looks for the first time. Raises StorageUnavailable."""
        self._urls = urls
        self._adapter = adapter
        self._sleep = sleep
        self._since: Counts = defaultdict(float)
        self._last = self._look()

    def read(self) -> Mapping[str, Tally]:
        now = self._look()
        for key, value in now.items():
            before = self._last.get(key, 0.0)
            self._since[key] += value - before if value >= before else value
        self._last = now
        return _tallies((key[1:4], value) for key, value in self._since.items())

    def _look(self) -> Counts:
        found: Counts = defaultdict(float)
        for url in self._urls:
            for family in text_string_to_metric_families(_get(url, {}, self._sleep).text):
                for sample in family.samples:
                    name = sample.name.removeprefix(RAY)
                    labels = sample.labels
                    if labels.get("adapter") != self._adapter:
                        continue
                    others = repr(sorted((key, value) for key, value in labels.items() if key != "le"))
                    if name == ADAPTER_USES.name:
                        found[url, "uses", labels["version"], labels["result"], others] += sample.value
                    elif name == f"{ADAPTER_SECONDS.name}_bucket":
                        found[url, "seconds", labels["version"], labels["le"], others] += sample.value
        return found


class Prometheus:
    """A Prometheus server: increases since the watch began."""

    def __init__(self, url: str, adapter: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Asks for the first time. Raises StorageUnavailable."""
        self._url = f"{url.rstrip('/')}/api/v1/query"
        self._adapter = adapter
        self._sleep = sleep
        self._begun_s = time.time()
        self.read()

    def read(self) -> Mapping[str, Tally]:
        window = f"{max(1, math.ceil(time.time() - self._begun_s))}s"
        uses = f'{RAY}{ADAPTER_USES.name}{{adapter="{self._adapter}"}}'
        buckets = f'{RAY}{ADAPTER_SECONDS.name}_bucket{{adapter="{self._adapter}"}}'
        found: list[tuple[tuple[str, ...], float]] = []
        for kind, series, label in (("uses", uses, "result"), ("seconds", buckets, "le")):
            # What was not there when the watch began counts from 0, which increase() would not do, and so does what has
            # begun anew since.
            before = f"({series} offset {window} or {series} * 0)"
            query = f"sum by (version, {label}) ({series} - {before} >= 0 or {series})"
            for row in self._ask(query):
                labels = row["metric"]
                found.append(((kind, labels["version"], labels[label]), round(float(row["value"][1]))))
        return _tallies(found)

    def _ask(self, query: str) -> list[dict[str, Any]]:
        reply = _get(self._url, {"query": query}, self._sleep)
        try:
            result: list[dict[str, Any]] = reply.json()["data"]["result"]
        except (ValueError, LookupError) as error:
            raise StorageUnavailable(
                f"{self._url} does not answer as a Prometheus does: {reply.text[:100]}."
            ) from error
        return result


def _get(url: str, params: Mapping[str, str], sleep: Callable[[float], None]) -> httpx.Response:
    """Three tries. Raises StorageUnavailable."""
    for left in reversed(range(TRIES)):
        try:
            return httpx.get(url, params=params, timeout=TIMEOUT_S).raise_for_status()
        except httpx.HTTPError as error:
            if not left:
                raise StorageUnavailable(f"the metrics at {url} cannot be read: {error}.", param="metrics") from error
            sleep(1.0)
    raise AssertionError("unreachable")


def _tallies(counts: Iterable[tuple[tuple[str, ...], float]]) -> dict[str, Tally]:
    """(kind, version, result or bound) and its count, cumulative for bounds."""
    results: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    cumulative: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for (kind, version, what), value in counts:
        if kind == "uses":
            results[version][what] += value
        else:
            cumulative[version][float(what)] += value
    return {
        version: Tally(
            requests=round(sum(results[version][result] for result in COUNTED)),
            errors=round(results[version]["error"]),
            seconds=_single(cumulative[version]),
        )
        for version in {*results, *cumulative}
    }


def _single(cumulative: Mapping[float, float]) -> dict[float, int]:
    below, single = 0.0, {}
    for bound in sorted(cumulative):
        single[bound] = max(0, round(cumulative[bound] - below))
        below = max(below, cumulative[bound])
    return single
