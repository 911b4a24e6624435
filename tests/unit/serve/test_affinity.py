"""Which replica a request goes to, by what the replicas say and what was sent to them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorafleet.core.generation import GenerationRequest
from lorafleet.serve.affinity import Affinity, Report, short_key
from lorafleet.serve.config import RoutingPolicy
from lorafleet.serve.work import Work, WorkAdapter

REPLICAS = ["a", "b", "c"]


def work(*adapters: int, steps: int = 10) -> Work:
    """One image of some steps with these adapters."""
    request = GenerationRequest(prompt="x", steps=steps, seed=1, width=64, height=64)
    versions = [cast("Any", SimpleNamespace(version=key(number))) for number in adapters]
    return Work(request, adapters=tuple(WorkAdapter(version, 1.0) for version in versions))


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


def told(**reports: Report) -> Affinity:
    """What the replicas said."""
    affinity = Affinity(slot_s=4.0, host_s=2.0)
    affinity.update({replica: reports.get(replica, Report()).to_json() for replica in REPLICAS})
    return affinity


def has(*, slots: tuple[int, ...] = (), host: tuple[int, ...] = (), backlog_s: float = 0.0) -> Report:
    return Report([short_key(key(n)) for n in slots], [short_key(key(n)) for n in host], backlog_s, unit_s=100.0)


def test_a_slot_is_better_than_memory_and_memory_than_nothing() -> None:
    affinity = told(a=has(), b=has(host=(1,)), c=has(slots=(1,)))
    assert affinity.rank(REPLICAS, work(1)) == (["c", "b", "a"], "slot")
    assert affinity.rank(["a", "b"], work(1)) == (["b", "a"], "host")
    assert affinity.rank(["a"], work(1)) == (["a"], "cold")


@pytest.mark.parametrize(("backlog_s", "chosen", "why"), [(3.9, "c", "slot"), (4.1, "a", "spread")])
def test_a_hot_adapter_spreads_when_its_replica_is_busier_than_the_slot_is_worth(
    backlog_s: float, chosen: str, why: str
) -> None:
    affinity = told(a=has(), b=has(backlog_s=9), c=has(slots=(1,), backlog_s=backlog_s))
    ranked, choice = affinity.rank(REPLICAS, work(1))
    assert (ranked[0], choice) == (chosen, why)


def test_several_adapters_count_by_their_share() -> None:
    affinity = told(a=has(slots=(1,)), b=has(slots=(1, 2)), c=has(host=(1, 2)))
    assert affinity.rank(REPLICAS, work(1, 2))[0][0] == "b"
    affinity = told(a=has(slots=(1,)), b=has(slots=(1, 2), backlog_s=2.1))
    assert affinity.rank(["a", "b"], work(1, 2)) == (["a", "b"], "spread")


def test_an_adapter_that_nobody_has_goes_to_the_same_replica_whoever_asks() -> None:
    firsts = [[told().rank(order, work(n))[0][0] for n in range(60)] for order in (REPLICAS, REPLICAS[::-1])]
    assert firsts[0] == firsts[1]
    assert min(Counter(firsts[0]).values()) >= 10
    without_c = [told().rank(["a", "b"], work(n))[0][0] for n in range(60)]
    assert all(new == old for old, new in zip(firsts[0], without_c, strict=True) if old != "c")


def test_what_was_sent_counts_before_the_replica_says_so() -> None:
    affinity = told()
    first = affinity.rank(REPLICAS, work(1))[0][0]
    affinity.sent(1, first, work(1))
    assert affinity.rank(REPLICAS, work(1)) == (affinity.rank(REPLICAS, work(1))[0], "slot")
    assert affinity.rank(REPLICAS, work(1))[0][0] == first
    affinity.ended(1)
    affinity.ended(1)
    assert affinity.rank(REPLICAS, work(1))[1] == "slot"  # it is there until a report says otherwise
    affinity.update({replica: has(slots=(9,)).to_json() for replica in REPLICAS})
    assert affinity.rank(REPLICAS, work(1))[1] == "cold"


def test_work_without_adapters_goes_where_least_is_in_front() -> None:
    affinity = told(a=has(backlog_s=1), b=has(backlog_s=0.5), c=has(backlog_s=2))
    assert affinity.rank(REPLICAS, work()) == (["b", "a", "c"], "none")
    for i in range(30):
        affinity.sent(i, "b", work(steps=10))
    assert affinity.rank(REPLICAS, work())[0][-1] == "b"
    for i in range(30):
        affinity.ended(i)
    assert affinity.rank(REPLICAS, work())[0][0] == "b"


def test_work_that_is_sent_elsewhere_is_counted_there_alone() -> None:
    affinity = told(a=has(), b=has(), c=has(backlog_s=99))
    affinity.sent(1, "a", work(steps=100))
    affinity.sent(1, "b", work(steps=100))
    assert affinity.rank(REPLICAS, work())[0][:2] == ["a", "b"]


def test_a_replica_that_is_gone_is_forgotten() -> None:
    affinity = told(a=has(slots=(1,)))
    affinity.update({"b": {}})
    affinity.update({"a": {}, "b": {}})
    assert affinity.rank(["a", "b"], work(1))[1] == "cold"


@pytest.mark.parametrize(("policy", "drawn"), [("least_busy", "ab"), ("random", "abc")])
def test_the_other_policies_draw_whatever_adapters_there_are(policy: RoutingPolicy, drawn: str) -> None:
    affinity = Affinity(slot_s=4.0, host_s=2.0, policy=policy)
    reports = {"a": has(slots=(1,)), "b": has(), "c": has(slots=(1,), backlog_s=1.0)}
    affinity.update({replica: report.to_json() for replica, report in reports.items()})
    ranked = [affinity.rank(REPLICAS, work(1)) for _ in range(600)]
    firsts = Counter(order[0] for order, _ in ranked)
    assert sorted(firsts) == list(drawn)
    assert min(firsts.values()) > 120
    assert {order[0]: choice for order, choice in ranked} == {
        replica: "spread" if replica == "b" else "slot" for replica in drawn
    }
