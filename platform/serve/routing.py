"""The router that Ray Serve makes for the replicas in every process with a handle, and tells where they are."""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from lorafleet.serve import directory
from lorafleet.serve.channel import Address


class ReplicaWatch(RequestRouter):
    """Notes where the replicas are. Calls that come here are questions, for any of them; which one a piece of work goes
    to is decided by `ReplicaBackend`."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        directory.note(
            {
                replica.replica_id.unique_id: directory.Known(
                    Address(**replica.replica_metadata), replica.routing_stats
                )
                for replica in replicas
            }
        )
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]
