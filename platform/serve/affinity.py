"""Which replica a request should go to: pure decisions, no Ray.

A replica that has the request's adapters in slots is preferred, then one that has them in CPU memory; but only as long
as it is not busier than another one by more than that is worth. So a hot adapter spreads to more replicas, and to each
of them again while its slots there last. An adapter that no replica has goes, among equally busy ones, to the same one
every time, whichever gateway asks. The other policies are there to be compared with.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lorafleet.serve.config import RoutingPolicy
from lorafleet.serve.work import Work

KEY_CHARS: Final = 16  # of an adapter's version, in reports
UNKNOWN_UNIT_S: Final = 0.01  # of work, before a replica has done any
Choice = Literal["slot", "host", "cold", "spread", "none"]
"""What a decision found: the adapters in slots, in CPU memory, nowhere, or elsewhere (on a busier replica); `none`: the
request has no adapters."""


@dataclass(frozen=True)
class Report:
    """What a replica says of itself. `slots`, `host`: the adapters there, by `short_key`."""

    slots: Collection[str] = ()
    host: Collection[str] = ()
    backlog_s: float = 0.0
    unit_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"slots": list(self.slots), "host": list(self.host), "backlog_s": self.backlog_s, "unit_s": self.unit_s}


@dataclass
class _View:
    """A replica as seen from here: its last report, and what was sent there."""

    report: Report = field(default_factory=Report)
    units: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)  # adapters of requests in flight
    since: set[str] = field(default_factory=set)  # adapters of requests sent since the last report


class Affinity:
    """For one event loop."""

    def __init__(self, slot_s: float, host_s: float, policy: RoutingPolicy = "affinity") -> None:
        """Seconds of work that having an adapter in a slot, or in CPU memory, is worth."""
        self._policy = policy
        self._slot_s = slot_s
        self._host_s = host_s
        self._views: dict[str, _View] = {}
        self._sent: dict[int, tuple[str, float, tuple[str, ...]]] = {}

    def update(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """What the replicas that there are now say of themselves; of one that has said nothing yet, {}."""
        self._views = {replica: self._views.get(replica, _View()) for replica in reports}
        for replica, content in reports.items():
            view = self._views[replica]
            report = Report(**content)
            if report != view.report:
                view.report, view.since = report, set()

    def rank(self, replicas: Sequence[str], work: Work) -> tuple[list[str], Choice]:
        """The replicas, the best one first, and why that one."""
        keys = keys_of(work)
        scores = {replica: self._score(replica, keys) for replica in replicas}
        ranked = sorted(replicas, key=lambda replica: (round(scores[replica], 3), self._tie(replica, keys)))
        return ranked, self._choice(ranked, keys)

    def sent(self, request: int, replica: str, work: Work) -> None:
        """The request is on its way there; said again, it is on its way elsewhere."""
        self.ended(request)
        keys = keys_of(work)
        view = self._views.setdefault(replica, _View())
        view.units += work.cost()
        view.sent.update(keys)
        view.since.update(keys)
        self._sent[request] = replica, work.cost(), keys

    def ended(self, request: int) -> None:
        """Whatever became of it. May be said twice."""
        replica, units, keys = self._sent.pop(request, ("", 0.0, ()))
        view = self._views.get(replica)
        if view is not None:
            view.sent.subtract(keys)
            view.sent = +view.sent
            view.units = view.units - units if any(sent[0] == replica for sent in self._sent.values()) else 0.0

    def _score(self, replica: str, keys: Sequence[str]) -> float:
        """The least is the best."""
        match self._policy:
            case "affinity":
                return self._backlog_s(replica) - self._worth_s(replica, keys)
            case "least_busy":
                return self._backlog_s(replica)
            case "random":
                return 0.0

    def _backlog_s(self, replica: str) -> float:
        """What was sent from here and is not done, or what the replica says if that is more: there may be other
        gateways."""
        view = self._view(replica)
        return max(view.units * (view.report.unit_s or UNKNOWN_UNIT_S), view.report.backlog_s)

    def _worth_s(self, replica: str, keys: Sequence[str]) -> float:
        return sum(self._worth_of(replica, key) for key in keys) / len(keys) if keys else 0.0

    def _worth_of(self, replica: str, key: str) -> float:
        view = self._view(replica)
        if key in view.report.slots or key in view.sent or key in view.since:
            return self._slot_s
        return self._host_s if key in view.report.host else 0.0

    def _choice(self, ranked: Sequence[str], keys: Sequence[str]) -> Choice:
        if not keys or not ranked:
            return "none"
        worth = self._worth_s(ranked[0], keys)
        if max(self._worth_s(replica, keys) for replica in ranked) > worth:
            return "spread"
        return "slot" if worth >= self._slot_s > 0 else "host" if worth else "cold"

    def _tie(self, replica: str, keys: Sequence[str]) -> float:
        """Rendezvous hashing (Thaler and Ravishankar 1998): the order is the same wherever it is computed, and one
        replica more or fewer moves few adapters."""
        if not keys or self._policy != "affinity":
            return random.random()  # noqa: S311 (no secret)
        digest = hashlib.sha256(f"{keys[0]} {replica}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _view(self, replica: str) -> _View:
        return self._views.get(replica, _View())


def keys_of(work: Work) -> tuple[str, ...]:
    return tuple(short_key(adapter.key) for adapter in work.adapters)


def short_key(key: str) -> str:
    return key[:KEY_CHARS]
