"""The Ray Serve application: a gateway that speaks HTTP and replicas that hold the model."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from lorafleet.core.errors import GenerationFailed, LorafleetError
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import PRELOAD_PROBLEMS, REPLICA_BACKLOG_SECONDS, REPLICA_READY, REPLICA_REQUESTS
from lorafleet.core.registry import open_registry
from lorafleet.serve import logs, tracing
from lorafleet.serve.affinity import Report, short_key
from lorafleet.serve.api import create_app
from lorafleet.serve.backend import ReplicaBackend
from lorafleet.serve.channel import Order, Receiver
from lorafleet.serve.config import LiveSettings, ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.metrics import RayRecorder
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.routing import ReplicaWatch
from lorafleet.serve.scaling import BACKLOG, IN_FLIGHT, autoscaling
from lorafleet.serve.work import Work
from lorafleet.serve.workload import Workload

if TYPE_CHECKING:
    from lorafleet.serve.preload import Preloader

logger = logging.getLogger(__name__)

RELOAD_AFTER_S: Final = 60.0  # long enough for whoever starts the service to be told why it fails
GATEWAY_CPUS: Final = 0.1
MANY: Final = 100_000  # requests at a time: more than are ever admitted
MAX_REPORTED: Final = 1000  # adapters in CPU memory; each takes 20 bytes of a report


@serve.deployment
class Replica:
    """One copy of the model and the engine that shares it between requests, in a thread of its own.

    Work comes by a channel of its own, questions by Serve's handle. Errors that this project raises on purpose, those
    of the constructor too, are handed over as values: raised ones would reach the gateway wrapped, and Ray would log
    each bad request as a failure of the replica.
    """

    def __init__(self, settings: ServeSettings, threads: int) -> None:
        logs.log_to_stderr(settings.log_level, settings.log_format)
        tracing.start(settings, "replica")
        self._stall_s = settings.request_timeout_s
        self._workload = Workload()
        self._preloader: Preloader | None = None
        self._failure: LorafleetError | None = None
        self._is_loaded = False
        self._recorder = RayRecorder()
        self._recorder.sample(self._measure)
        try:
            self._load(settings, threads)
        except LorafleetError as error:
            self._failed_at, self._failure = time.monotonic(), error
        except Exception as error:  # the process edge: raised, it would come back as Ray's pages of text
            logger.exception("the model does not load")
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._failed_at, self._failure = time.monotonic(), LorafleetError(f"the base does not load: {reason}")
        self._receiver = Receiver(self._work)

    async def __del__(self) -> None:
        """Serve's: waited for, for `drain_s`, before a replica that is to go ends."""
        await self._receiver.drain()
        await self._receiver.close()

    def _load(self, settings: ServeSettings, threads: int) -> None:
        # Read when torch is loaded. By default OpenMP's threads spin while they wait for each other: beside another
        # busy process, 20 steps of emojixl took 6.4 s on two cores, so 0.84 s.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from lorafleet.sdxl.base import load_base
        from lorafleet.serve.engine_metrics import EngineMetrics
        from lorafleet.serve.pipeline import Pipeline
        from lorafleet.serve.preload import Preloader

        torch.set_num_threads(threads)
        registry = open_registry(settings.registry)
        self._pipeline = Pipeline(load_base(settings.base), settings.engine, registry, self._recorder).start()
        self._pipeline.generate(GenerationRequest(prompt="warm-up", steps=1, seed=0))
        engine = self._pipeline.engine
        metrics = EngineMetrics(self._recorder, engine.bank)
        engine.observe(metrics)
        self._recorder.sample(metrics.sample)
        if (bank := engine.bank) is not None:
            self._preloader = Preloader(bank, registry)
        self._is_loaded = True

    def reconfigure(self, live: dict[str, Any]) -> None:
        """Serve's `user_config`: called after the start, and whenever it is changed."""
        if self._preloader is not None:
            self._preloader.want(LiveSettings.model_validate(live).preload)

    async def model(self) -> ModelInfo | LorafleetError:
        if self._failure is not None:
            return self._failure
        problems = () if self._preloader is None else self._preloader.problems
        return replace(self._pipeline.model, problems=problems)

    async def _work(self, order: Order) -> AsyncGenerator[Event | LorafleetError]:
        """Events, an error as the last one. When the gateway hangs up, the images are called off."""
        logs.begin(order.caller)
        if self._failure is not None:
            yield self._failure
            return
        deadline = time.monotonic() + order.timeout_s
        try:
            with tracing.span("generate"), self._counted(order.work) as done:
                images = self._pipeline.stream(order.work, deadline=deadline, is_detailed=order.is_detailed)
                async with aclosing(images) as events:
                    async for event in events:
                        yield event
                done.set()
        except Exception as error:  # the process edge: this request is lost, the replica is not
            yield _in_our_words(error)

    async def push(self, name: str, handed_in: str) -> Manifest | LorafleetError:
        """An adapter, checked against the base."""
        if self._failure is not None:
            return self._failure
        try:
            return await asyncio.to_thread(self._pipeline.push, name, handed_in)
        except Exception as error:  # the process edge, as above
            return _in_our_words(error)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """For the gateways, asked by Serve once, when this replica is ready: from here on it takes work."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return (await self._receiver.start(host)).to_json()

    def record_routing_stats(self) -> dict[str, Any]:
        """For the gateways, asked by Serve every `routing.stats_every_s`."""
        if self._failure is not None:
            return {}
        bank = self._pipeline.engine.bank
        slots, host = ([], []) if bank is None else bank.residents()
        return Report(
            slots=[short_key(key) for key in slots],
            host=[short_key(key) for key in host[-MAX_REPORTED:]],
            backlog_s=round(self._workload.backlog_s, 2),
            unit_s=float(f"{self._workload.unit_s:.2g}"),
        ).to_json()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {BACKLOG: self._workload.backlog_s, IN_FLIGHT: self._workload.in_flight}

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises: what hindered the load may pass, and an engine
        that has ended, or hangs for as long as any request may take, does not come back."""
        if self._failure is not None:
            if time.monotonic() - self._failed_at > RELOAD_AFTER_S:
                raise self._failure
            return
        if (fault := self._fault()) is not None:
            raise LorafleetError(fault)

    def _fault(self) -> str | None:
        """What is wrong with the engine."""
        engine = self._pipeline.engine
        if engine.failure is not None:
            return f"the engine failed: {engine.failure}"
        if time.monotonic() - engine.heartbeat > self._stall_s:
            return f"the engine has not moved for {self._stall_s:g} seconds"
        return None

    def _measure(self) -> None:
        """Sets the gauges; from the recorder's thread."""
        self._recorder.set(REPLICA_READY, float(self._is_loaded and self._fault() is None))
        self._recorder.set(REPLICA_REQUESTS, self._workload.in_flight)
        self._recorder.set(REPLICA_BACKLOG_SECONDS, self._workload.backlog_s)
        self._recorder.set(PRELOAD_PROBLEMS, 0 if self._preloader is None else len(self._preloader.problems))

    @contextmanager
    def _counted(self, work: Work) -> Iterator[threading.Event]:
        """Counts work in flight; the event is to be set when its images are made."""
        units, done = work.cost(), threading.Event()
        self._workload.enter(units)
        try:
            yield done
        finally:
            self._workload.leave(units, is_done=done.is_set())
            if done.is_set():
                logger.info(
                    "images made", extra={"images": work.request.num_images, "backlog_s": self._workload.backlog_s}
                )


def _in_our_words(error: Exception) -> LorafleetError:
    if isinstance(error, LorafleetError):
        return error
    logger.error("a request failed", exc_info=error)
    return GenerationFailed("the model failed on this request: the replica's log says why")


@serve.deployment
@serve.ingress()
class Gateway:
    """HTTP in, HTTP out. Imports no torch, so that it is up before the model is."""

    def __init__(self, settings: ServeSettings, replicas: DeploymentHandle[Any]) -> None:
        logs.log_to_stderr(settings.log_level, settings.log_format)
        tracing.start(settings, "gateway")
        recorder = RayRecorder()
        self._backend = ReplicaBackend(replicas, settings, recorder)
        self._app = create_app(settings, self._backend, adds_request_id=False, recorder=recorder)
        recorder.sample(self._app.state.service.measure)
        recorder.sample(self._app.state.jobs.measure)

    async def __del__(self) -> None:
        """Serve's, once the last request has its answer."""
        await self._backend.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def reconfigure(self, live: dict[str, Any]) -> None:
        """Serve's `user_config`: called after the start, and whenever it is changed."""
        self._app.state.service.reconfigure(LiveSettings.model_validate(live))


def build(settings: ServeSettings, *, replica_gpus: float, replica_threads: int) -> serve.Application:
    """The application. Serve's own queues have more places than admission fills: ours is the one that counts."""
    live = settings.live.model_dump(mode="json")
    scaling = settings.scaling
    router: dict[str, Any] = {
        "request_router_class": f"{ReplicaWatch.__module__}:{ReplicaWatch.__qualname__}",
        "request_routing_stats_period_s": settings.routing.stats_every_s,
    }
    replicas = Replica.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas if scaling is None else "auto",
        autoscaling_config=None if scaling is None else autoscaling(scaling, settings.replicas),
        max_ongoing_requests=MANY,
        request_router_config=RequestRouterConfig(**router),
        user_config=live,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": replica_gpus},
    ).bind(settings, replica_threads)
    gateway: serve.Application = Gateway.options(  # type: ignore[attr-defined]
        max_ongoing_requests=MANY, user_config=live, ray_actor_options={"num_cpus": GATEWAY_CPUS}
    ).bind(settings, replicas)
    return gateway
