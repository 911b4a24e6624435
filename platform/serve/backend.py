"""The replicas as the API's backend: which of them gets a piece of work, and what is done when it is lost."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from lorafleet.core.errors import LorafleetError, NotReady
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import ROUTER_CHOICES, Recorder
from lorafleet.serve import directory, logs
from lorafleet.serve.affinity import Affinity
from lorafleet.serve.channel import LOST, NotTaken, Order, Sender
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.work import Work

logger = logging.getLogger(__name__)

MODEL_TIMEOUT_S: Final = 2.0  # a replica answers this from its event loop, however busy its pipeline is
LOOK_S: Final = 0.2  # between two looks for a replica that takes the work


class ReplicaBackend:
    """For one event loop. Questions go by Ray Serve's handle, work by a channel of its own."""

    def __init__(self, replicas: DeploymentHandle[Any], settings: ServeSettings, recorder: Recorder) -> None:
        self._replicas = replicas
        self._min_replicas = settings.replicas if settings.scaling is None else settings.scaling.min_replicas
        routing = settings.routing
        self._affinity = Affinity(routing.slot_s, routing.host_s, routing.policy)
        self._known: Mapping[str, directory.Known] = {}
        self._sender = Sender()
        self._recorder = recorder
        self._numbers = itertools.count()

    @property
    def is_asleep(self) -> bool:
        return self._min_replicas == 0 and directory.replicas == {}

    async def model(self) -> ModelInfo:
        try:
            async with asyncio.timeout(MODEL_TIMEOUT_S):
                answer = await self._replicas.model.remote()
        except (RayError, RayServeException, TimeoutError) as error:
            raise NotReady("no replica has its model loaded yet: try again later") from error
        if isinstance(answer, LorafleetError):
            raise NotReady(answer.message) from answer
        assert isinstance(answer, ModelInfo)
        return answer

    async def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        order = Order(work, timeout_s, is_detailed, logs.caller())
        number, deadline = next(self._numbers), time.monotonic() + timeout_s
        try:
            while True:
                for replica in self._ranked(work):
                    # Counted from here on: others are sent before it has answered.
                    self._affinity.sent(number, replica, work)
                    left = replace(order, timeout_s=deadline - time.monotonic())
                    try:
                        async with aclosing(self._sender.send(left, self._known[replica].address)) as events:
                            async for event in events:
                                yield event
                    except NotTaken as reason:
                        logger.info("replica %s does not take work: %s", replica, reason)
                        continue
                    return
                self._affinity.ended(number)
                await self._anyone()
        finally:
            self._affinity.ended(number)

    async def push(self, name: str, handed_in: str) -> Manifest:
        try:
            answer = await self._replicas.push.remote(name, handed_in)
        except (RayError, RayServeException) as error:
            raise NotReady(LOST) from error
        if isinstance(answer, LorafleetError):
            raise answer
        assert isinstance(answer, Manifest)
        return answer

    async def close(self) -> None:
        await self._sender.close()

    def _ranked(self, work: Work) -> list[str]:
        """The replicas that there are, the best one first."""
        if (known := directory.replicas) is not None and known is not self._known:
            self._known = known
            self._affinity.update({replica: each.stats for replica, each in known.items()})
        ranked, choice = self._affinity.rank(list(self._known), work)
        if ranked:
            self._recorder.add(ROUTER_CHOICES, choice=choice)
        return ranked

    async def _anyone(self) -> None:
        """Waits until a replica is there; where none runs, Serve starts one as soon as this asks."""
        await asyncio.sleep(LOOK_S)
        try:
            await self._replicas.model.remote()
        except (RayError, RayServeException) as error:
            raise NotReady(LOST) from error
