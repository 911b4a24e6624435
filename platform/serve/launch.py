"""Starts the service on a Ray of its own (or a given one), waits until it is ready, and takes it down again.

What can be checked without Ray is checked first, so that a typo fails in milliseconds. Nothing that Ray starts here
listens beyond this machine, except the service itself where `host` says so.
"""

import errno
import logging
import math
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lorafleet.core.config import home
from lorafleet.core.errors import ConfigError, LorafleetError, NotReady
from lorafleet.core.local_ray import prepare_local_ray
from lorafleet.core.registry_samples import seed_registry
from lorafleet.models import SAMPLE_REGISTRY
from lorafleet.sdxl.folder import find_base
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.tracing import endpoint

APP_NAME: Final = "lorafleet"
OBJECT_STORE_BYTES: Final = 256 * 1024 * 1024  # holds images on their way; Ray's default is a third of the memory
POLL_S: Final = 0.1
STOP_POLL_S: Final = 0.5
CONNECT_TIMEOUT_S: Final = 5.0
LOOPBACK: Final = "127.0.0.1"

# With `direct_ingress`: requests come to the gateway's process itself, and that process and the replicas have one event
# loop each. Ray's proxy, which passes a request on in actor calls to and fro, took two thirds of the CPU time of a
# request that does nothing (a gateway's and a replica's no-op).
DIRECT: Final = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # There is no balancer before the one gateway, to be waited for when it goes; the next one needs its port at once.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PORT_QUARANTINE_S": "0",
}
# Ray's workers have a niceness of 15: whatever else runs on the machine would go before an answer.
NICENESS: Final = {"RAY_worker_niceness": "0"}


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived while starting."""


def serve_forever(settings: ServeSettings, *, on_ready: Callable[[str, list[str]], None]) -> None:
    """Runs the service until SIGINT or SIGTERM; calls `on_ready` with its address, and those of its metrics, once it
    takes requests.

    Raises LorafleetError, one sentence, when it cannot start. Call it from the main thread.
    """
    stop = threading.Event()
    # The handlers only note the signal: an exception out of one, in the middle of Ray's native start-up code, ended
    # the process with a segmentation fault in 4 of 17 tries.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with running_service(settings, stop) as address:
            on_ready(address, metrics_urls())
            stop.wait()
    except Stopped:
        return
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def running_service(settings: ServeSettings, stop: threading.Event | None = None) -> Iterator[str]:
    """The service's address; on exit the service is down and, if Ray was ours, no process of it is left.

    Raises Stopped at the next safe place if `stop` is set before the service is ready.
    """
    stop = stop or threading.Event()
    check_port(settings.host, settings.port)
    if settings.metrics_port is not None:
        check_port(LOOPBACK, settings.metrics_port, "metrics_port")
    find_base(settings.base)
    endpoint(settings)
    if settings.base.id == "emojixl":
        seed_registry(settings.registry, SAMPLE_REGISTRY)
    with _environment(settings), _ray(settings):
        _check(stop)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(settings.log_level.upper())
        try:
            _deploy(settings)
            yield _wait_until_ready(settings, stop)
        finally:
            if settings.ray_address:
                serve.delete(APP_NAME)


def metrics_urls() -> list[str]:
    """Where Prometheus finds the measurements of the Ray that this process is connected to, one address per node."""
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]


def check_port(host: str, port: int, param: str = "port") -> None:
    """Raises ConfigError unless this process could listen there: Serve would share the port (SO_REUSEPORT)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
            probe.bind(address)
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use on {host}: stop what uses it or "
                + ("pass --port" if param == "port" else f"set another {param}"),
                param=param,
            ) from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}", param="host") from None


def _free_port(host: str) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


@contextmanager
def _environment(settings: ServeSettings) -> Iterator[None]:
    """What the processes of a Ray of our own read; a cluster's have theirs, and requests come through its proxies."""
    if settings.ray_address is not None:
        yield
        return
    wanted = dict(NICENESS)
    if settings.direct_ingress:
        wanted |= DIRECT
        wanted["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(settings.port)
        wanted["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(settings.port + 1)  # of a range: not included
    before = os.environ.copy()
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextmanager
def _ray(settings: ServeSettings) -> Iterator[None]:
    """A connection to Ray; a Ray of our own is gone afterwards, its logs too unless something failed."""
    temp_dir = None if settings.ray_address else prepare_local_ray()
    import ray

    logging.getLogger("ray").setLevel(settings.log_level.upper())
    on_term = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": settings.log_level, "namespace": APP_NAME}
    leftover: Path | None = None
    if settings.ray_address is not None:
        _check_reachable(settings.ray_address)
        try:
            ray.init(address=settings.ray_address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at ray_address={settings.ray_address}: {str(error).splitlines()[0]}",
                param="ray_address",
            ) from error
    else:
        with _one_sentence("Ray did not start"):
            context: Any = ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(settings.most_replicas * settings.replica_cpus + 1)),
                include_dashboard=False,
                _metrics_export_port=settings.metrics_port,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(temp_dir),
                **quiet,
            )
        assert temp_dir is not None
        leftover = Path(context.address_info["session_dir"]) if temp_dir.parent == home() else temp_dir
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # ray.init takes it over
    try:
        yield
    except Exception:
        leftover = None  # its logs say why
        raise
    finally:
        ray.shutdown()
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Raises ConfigError when nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray looks it up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at ray_address={address}: {error}", param="ray_address") from None


def _deploy(settings: ServeSettings) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from lorafleet.serve.deploy import application

    log = LoggingConfig(
        log_level=settings.log_level.upper(), enable_access_log=False, encoding=settings.log_format.upper()
    )
    is_direct = settings.direct_ingress and settings.ray_address is None
    # With direct ingress Ray's proxy answers too; it gets any port.
    http = {"host": settings.host, "port": _free_port(settings.host) if is_direct else settings.port}
    app = application(settings, may_grow=False)
    with _one_sentence("Ray Serve did not start"):  # the port may have been taken since it was checked, by Ray too
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=log)
        serve.run_many(
            [serve.RunTarget(app, name=APP_NAME, logging_config=log)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def _wait_until_ready(settings: ServeSettings, stop: threading.Event) -> str:
    """The address. Raises what hindered the replica, Stopped, or NotReady after `start_timeout_s`."""
    from ray import serve

    deadline = time.monotonic() + settings.start_timeout_s
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 (turned into loopback)
    address = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    status = ""
    while time.monotonic() < deadline:
        _check(stop)
        application = serve.status().applications.get(APP_NAME)
        status = str(application.status.value) if application else "NOT_STARTED"
        if application and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason = _last_line(application.message)
            raise LorafleetError(f"the service did not start, Ray's logs say more: {reason}")
        if status == "RUNNING":
            handle: Any = serve.get_deployment_handle("Replica", APP_NAME)
            if not handle.is_initialized:
                handle._init(_run_router_in_separate_loop=True)  # there is no event loop here
            try:
                answer = _result(handle.model.remote(), deadline, stop)
            except TimeoutError:
                break
            if isinstance(answer, LorafleetError):
                raise answer
            if _answers(f"{address}/readyz"):
                return address
        time.sleep(POLL_S)
    raise NotReady(
        f"the service was not ready in {settings.start_timeout_s:g} seconds (Ray Serve says {status}): "
        "raise start_timeout_s, or look for what else uses this machine"
    )


def _result(response: Any, deadline: float, stop: threading.Event) -> Any:
    """A replica's answer, looking up now and then whether to stop."""
    while True:
        _check(stop)
        try:
            return response.result(timeout_s=STOP_POLL_S)
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 (our own address)
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Ray's failures come as pages of nested tracebacks; their last line says it."""
    try:
        yield
    except Exception as error:
        raise LorafleetError(f"{what}, its logs say more: {_last_line(str(error))}") from error


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
