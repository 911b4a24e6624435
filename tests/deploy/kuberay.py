"""What KubeRay 1.7 refuses beyond its CRDs' schemas, when the object is already stored.

Follows ray-operator/controllers/ray/utils/validation.go of ray-project/kuberay: the rules, in words of our own.
"""

import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
LONGEST = {"RayService": 47, "RayJob": 47, "RayCluster": 63}
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
OWN_ENV = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")
LEAST_RAY_WITH_TOKENS = (2, 52, 0)


def problems(document: Object) -> list[str]:
    """Why KubeRay would leave this RayService or RayJob alone; empty: it would not."""
    name, spec = document["metadata"]["name"], document["spec"]
    found = []
    if len(name) > LONGEST[document["kind"]]:
        found.append("name is too long")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append("name is no DNS-1035 label")
    if document["kind"] == "RayService":
        return [*found, *_cluster(spec["rayClusterConfig"]), *_service(spec)]
    return [*found, *_cluster(spec["rayClusterSpec"]), *_job(spec)]


def _cluster(spec: Object) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    autoscaler = spec.get("autoscalerOptions", {})
    for group in (head, *groups):
        pod, parameters = group["template"]["spec"], group["rayStartParams"]
        if not pod["containers"]:
            yield "a group without a container"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys():
            yield "resources both in rayStartParams and in the group"
        if "labels" in parameters:
            yield "labels in rayStartParams"
        if spec.get("enableInTreeAutoscaling") and autoscaler.get("version") == "v2":
            if pod.get("restartPolicy", "Never") != "Never":
                yield "the autoscaler v2 needs restartPolicy Never"
            if group.get("suspend"):
                yield "a suspended group with an autoscaler"
    for group in groups:
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield "replicas are not between minReplicas and maxReplicas"
    names = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", [])}
    if taken := names & set(OWN_ENV):
        yield f"the head's environment sets {sorted(taken)}"
    if "redis-password" in head["rayStartParams"] or "redis-username" in head["rayStartParams"]:
        yield "Redis' credentials in rayStartParams"
    if "RAY_enable_autoscaler_v2" in names:
        yield "the autoscaler's version by environment"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(map(int, spec.get("rayVersion", "0").split(".")))
        if version < LEAST_RAY_WITH_TOKENS:
            yield "token mode needs rayVersion 2.52.0 or newer"


def _service(spec: Object) -> Iterator[str]:
    if spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "the head service has a name"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "a negative deletion delay"
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type", "NewCluster") not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        yield "an unknown upgrade strategy"
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
        options = upgrade.get("clusterUpgradeOptions") or {}
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
            yield "the incremental upgrade needs the autoscaler"
        if not options.get("gatewayClassName"):
            yield "no gatewayClassName"
        if not 0 <= options.get("maxSurgePercent", 100) <= 100 or not 0 <= options.get("stepSizePercent", -1) <= 100:
            yield "percents must be between 0 and 100"
        if options.get("intervalSeconds", 0) <= 0:
            yield "intervalSeconds must be above 0"


def _job(spec: Object) -> Iterator[str]:
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "a TTL without shutdownAfterJobFinishes"
    if rules and shuts_down:
        yield "deletionRules and shutdownAfterJobFinishes"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds and backoffLimit must be positive"
    scales = spec["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    after: dict[tuple[str, str], int] = {}
    for rule in rules:
        key = (rule["condition"].get("jobStatus", ""), rule["policy"])
        if key in after:
            yield f"two rules for {key}"
        if scales and rule["policy"] == "DeleteWorkers":
            yield "DeleteWorkers with an autoscaler"
        after[key] = rule["condition"].get("ttlSeconds", 0)
    for status in {status for status, _ in after}:
        times = [after[status, policy] for policy in DELETION_ORDER if (status, policy) in after]
        if times != sorted(times):
            yield f"rules for {status} delete what is outside before what is inside"
