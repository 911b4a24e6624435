"""The application that both `lorafleet serve` and a file for Ray Serve (`serve deploy`, KubeRay's serveConfigV2) start.

In such a file, `import_path: lorafleet.serve.deploy:app` and `args` are ServeSettings, over which LORAFLEET_* variables
go as everywhere. What may change while the service runs stands under `deployments` as `user_config` (LiveSettings) of
Gateway and Replica alike: an edit there reconfigures them, and one of `args` replaces them one by one.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lorafleet.core.config import load_settings
from lorafleet.core.errors import ConfigError
from lorafleet.serve.config import LiveSettings, ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

ELSEWHERE: Final[Mapping[str, str]] = {
    "host": "http_options.host of this file",
    "port": "http_options.port of this file",
    "metrics_port": "the node's --metrics-export-port",
    "ray_address": "the cluster that the file is sent to",
    "direct_ingress": "the cluster's own environment, whose proxies are in front,",
    "start_timeout_s": "whoever waits for the application",
    **dict.fromkeys(LiveSettings.model_fields, "user_config of the deployments Gateway and Replica"),
}
"""Settings that would do nothing in `args`, or replace replicas for nothing, and what has their place."""


def app(args: dict[str, Any]) -> "Application":
    """For Ray Serve, which calls it on the cluster. Raises ConfigError, one sentence."""
    for name, place in ELSEWHERE.items():
        if name in args:
            raise ConfigError(f"{name} has no place in args: {place} says it", param=name)
    return application(load_settings(ServeSettings, given=args))


def application(settings: ServeSettings, *, may_grow: bool = True) -> "Application":
    """What `settings` leave out is taken from the Ray cluster that this process is connected to.

    Raises ConfigError when it has too few GPUs, unless it `may_grow`.
    """
    import ray

    from lorafleet.serve.app import build

    gpus_there: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    gpus = settings.replica_gpus
    if gpus is None:
        gpus = 1.0 if gpus_there and settings.base.device in ("auto", "cuda") else 0.0
    if gpus * settings.replicas > gpus_there and not may_grow:
        raise ConfigError(
            f"{settings.replicas} replicas with {gpus:g} GPUs each need more than the {gpus_there:g} there are: "
            "lower replicas or replica_gpus",
            param="replicas",
        )
    threads = settings.replica_threads or max(1, (os.cpu_count() or 1) // settings.most_replicas)
    return build(settings, replica_gpus=gpus, replica_threads=threads)
