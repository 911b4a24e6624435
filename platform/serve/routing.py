"""Affinity as Ray Serve's request router: it lives in the gateway, and sees every call on its way to a replica."""

import asyncio
from typing import Any, ClassVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lorafleet.core.metrics import ROUTER_CHOICES
from lorafleet.serve.affinity import Affinity, Choice
from lorafleet.serve.config import RoutingPolicy
from lorafleet.serve.metrics import RayRecorder
from lorafleet.serve.work import Work


class AdapterRouter(RequestRouter):
    """Sends work to the replica that `Affinity` prefers. Replicas report what they hold by `record_routing_stats`."""

    running: ClassVar[int | None] = None
    """Replicas that are up, as this process was last told; None before."""

    def initialize_state(  # type: ignore[override]
        self, policy: RoutingPolicy, slot_s: float, host_s: float
    ) -> None:
        self._affinity = Affinity(slot_s, host_s, policy)
        self._choices: dict[str, Choice] = {}  # for requests that are being routed
        self._recorder = RayRecorder()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        AdapterRouter.running = len(replicas)
        self._affinity.update({replica.replica_id.unique_id: replica.routing_stats for replica in replicas})
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        work = _work_of(pending_request)
        ranked, choice = self._affinity.rank(list(by_id), work)
        if pending_request is not None and work is not None and ranked:
            # Counted from here on: others are routed before the replica has answered.
            request = pending_request.metadata.internal_request_id
            self._affinity.sent(request, ranked[0], work)
            self._choices[request] = choice
            pending_request.future.add_done_callback(lambda future: self._given_up(request, future))
        return [[by_id[replica]] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        work = _work_of(pending_request)
        if work is not None:
            request = pending_request.metadata.internal_request_id
            self._affinity.sent(request, replica_id.unique_id, work)
            if (choice := self._choices.pop(request, None)) is not None:
                self._recorder.add(ROUTER_CHOICES, choice=choice)
            loop = asyncio.get_running_loop()
            result.add_done_callback(lambda _: loop.call_soon_threadsafe(self._affinity.ended, request))

    def _given_up(self, request: str, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._affinity.ended(request)
            self._choices.pop(request, None)


def _work_of(request: PendingRequest | None) -> Work | None:
    """The work that a call carries; other calls are questions."""
    given = request.args[0] if request is not None and request.args else None
    return given if isinstance(given, Work) else None
