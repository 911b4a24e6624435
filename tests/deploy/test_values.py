"""Values that cannot work, or should not: each is refused by a sentence that names the value."""

import pytest
from charts import APIS, Chart, Object

GPU = {"replica": {"gpus": 1}, "worker": {"gpu": {"count": 1}}}
LONG = "a-name-that-is-too-long-for-what-kuberay-would-call"


def serve(**values: object) -> Object:
    return {"serve": values}


def test_what_the_schema_refuses_is_told_by_its_path(chart: Chart) -> None:
    result = chart.template(
        {
            "replicas": 2,
            "adapters": [{"name": "Not A Name"}, {"nmae": "plush"}],
            "podSecurity": {"runAsUser": 0},
            "registry": {"type": "nfs", "s3": {"url": "http://bucket"}},
            "image": {"serve": {"digest": "abc"}},
            "eval": {"jobs": [{"name": "a", "args": []}]},
            "train": {"jobs": [{"data": "s3://b", "settings": {"loop": {"step": 3}}}]},
            "redis": {"external": {"address": "redis"}},
            "serve": {
                "settings": {"admin_key": "x" * 16, "engine": {"max_bacth": 4}},
                "limits": {"maxQueued": -1, "requestTimeoutSeconds": "soon"},
                "upgrade": {"type": "Recreate"},
                "worker": {"gpu": {"resource": "gpu"}, "cacheSize": "big"},
            },
        }
    )
    assert result.returncode != 0
    for sentence in (
        "at '': additional properties 'replicas' not allowed",
        "at '/adapters/0/name': 'Not A Name' does not match pattern",
        "at '/adapters/1': additional properties 'nmae' not allowed",
        "at '/adapters/1': missing property 'name'",
        "at '/podSecurity/runAsUser': minimum: got 0, want 1",
        "at '/registry/type': value must be one of 'claim', 's3', 'ephemeral'",
        "at '/registry/s3/url': 'http://bucket' does not match pattern",
        "at '/image/serve/digest': 'abc' does not match pattern",
        "at '/eval/jobs/0/args': minItems: got 0, want 1",
        "at '/train/jobs/0': missing property 'name'",
        "at '/train/jobs/0/settings/loop': additional properties 'step' not allowed",
        "at '/redis/external/address': 'redis' does not match pattern",
        "at '/serve/settings': additional properties 'admin_key' not allowed",
        "at '/serve/settings/engine': additional properties 'max_bacth' not allowed",
        "at '/serve/limits/maxQueued': minimum: got -1, want 0",
        "at '/serve/limits/requestTimeoutSeconds': got string, want integer",
        "at '/serve/upgrade/type': value must be one of",
        "at '/serve/worker/gpu/resource': 'gpu' does not match pattern",
        "at '/serve/worker/cacheSize': 'big' does not match pattern",
    ):
        assert sentence in result.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"fullnameOverride": LONG}, "has 51 characters, and KubeRay allows a RayService 47: set fullnameOverride"),
        ({"fullnameOverride": "9lives"}, "the name 9lives must begin with a letter"),
        ({"image": {"serve": {"tag": "latest"}}}, "image.serve.tag=latest means another image on another day"),
        ({"rayAuth": {"enabled": False}, "networkPolicy": {"enabled": False}}, "could run code in Ray"),
        (serve(env=[{"name": "LORAFLEET_ADMIN_KEY", "value": "x"}]), "LORAFLEET_ADMIN_KEY in the clear"),
        (serve(env=[{"name": "REDIS_PASSWORD", "value": "x"}]), "REDIS_PASSWORD, which KubeRay sets itself"),
        ({"redis": {"internal": {"enabled": True}}}, "redis.internal.existingSecret is empty"),
        ({"redis": {"external": {"address": "a:1"}}}, "redis.external.existingSecret is empty"),
        (
            {
                "redis": {
                    "internal": {"enabled": True, "existingSecret": "s"},
                    "external": {"address": "a:1", "existingSecret": "s"},
                }
            },
            "redis.internal.enabled and redis.external.address: set one of them",
        ),
        (serve(gcsFaultTolerance={"enabled": True}), "serve.gcsFaultTolerance.enabled needs a Redis"),
        ({"redis": {"jobs": True}}, "redis.jobs and redis.cache need a Redis"),
        ({"ingress": {"enabled": True}}, "ingress.host is empty"),
        ({"ingress": {"enabled": True, "host": "a.b"}}, "ingress.tls.secretName is empty"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
        (serve(worker={"minReplicas": 2}), "serve.worker.minReplicas=2 is above serve.worker.maxReplicas=1"),
        (serve(worker={"maxReplicas": 2}), "nothing adds pods: set serve.autoscaler.enabled=true"),
        (
            serve(head={"resources": {"requests": {"memory": "1Gi"}}}),
            "serve.head.resources: requests.memory (1Gi) and limits.memory (4Gi) must be given and equal",
        ),
        (serve(replica={"cpus": 2}), "serve.replica.cpus=2 and 0.1 for the gateway do not fit"),
        (serve(replica={"gpus": 1}), "serve.replica.gpus=1 but serve.worker.gpu.count=0"),
        (serve(worker={"gpu": {"count": 1}}), "serve.worker.gpu.count=1 but serve.replica.gpus=0"),
        (serve(**{**GPU, "replica": {"gpus": 2}}), "serve.replica.gpus=2 does not fit into serve.worker.gpu.count=1"),
        (
            serve(replica={"gpus": 1}, worker={"gpu": {"count": 2, "resource": "nvidia.com/mig-1g.10gb"}}),
            "serve.worker.gpu.count is above 1 with a MIG slice",
        ),
        (serve(**GPU, settings={"replicas": 3}), "asks for up to 3 replicas, and serve.worker.maxReplicas=1 pods"),
        (
            serve(settings={"scaling": {"max_replicas": 9}}),
            "serve.settings asks for up to 9 replicas, and serve.worker.maxReplicas=1 pods hold 1",
        ),
        (serve(drainSeconds=140), "serve.terminationGracePeriodSeconds=150 must be 30 more than serve.drainSeconds"),
        (
            serve(upgrade={"type": "NewClusterWithIncrementalUpgrade"}),
            "serve.upgrade.gatewayClassName is empty",
        ),
        (
            serve(upgrade={"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "x"}),
            "NewClusterWithIncrementalUpgrade needs serve.autoscaler.enabled=true",
        ),
        (serve(settings={"base": {"id": "a/b"}}), "serve.settings.base.revision is empty: name a commit of a/b"),
        (
            {"weights": {"mode": "claim"}},
            "weights.mode=claim but serve.settings.base.id=emojixl is not on the model hub",
        ),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters names a twice"),
        (
            {
                "adapters": [{"name": "a", "pin": True}, {"name": "b", "pin": True}],
                **serve(settings={"engine": {"bank": {"slots": 2}}}),
            },
            "adapters pins 2 of 2 slots, and one must stay free",
        ),
        ({"registry": {"type": "s3"}}, "registry.s3.url is empty"),
        (
            {
                "registry": {"type": "ephemeral"},
                **serve(worker={"minReplicas": 2, "maxReplicas": 2}),
            },
            "registry.type=ephemeral gives each pod its own adapters",
        ),
        (
            {
                "registry": {"claim": {"accessModes": ["ReadWriteOnce"]}},
                **serve(worker={"minReplicas": 2, "maxReplicas": 2}),
            },
            "registry.claim.accessModes has no ReadWriteMany",
        ),
        (
            {"train": {"jobs": [{"name": "a", "data": "s3://b", "workers": 2}]}},
            "train.jobs a has several workers: set train.storage.existingClaim",
        ),
        ({"train": {"jobs": [{"name": "a", "data": "/data/x"}]}}, "train.jobs a reads /data/x: set train.dataClaim"),
        ({"eval": {"jobs": [{"name": "a", "args": ["x"]}] * 2}}, "eval.jobs a is there twice"),
        (
            {"eval": {"jobs": [{"name": "a-very-long-name-of-an-evaluation", "args": ["x"]}]}},
            "makes a RayJob's name of 60 characters, and KubeRay allows 47",
        ),
        ({"ui": {"enabled": True}, **serve(enabled=False)}, "ui.enabled needs serve.enabled"),
        ({"ui": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "ui.autoscaling.minReplicas=9 is above"),
        ({"ui": {"enabled": True, "podDisruptionBudget": {"enabled": True}}}, "needs two pods: set ui.replicas"),
        (
            {"priorityClasses": {"create": True}, **serve(priorityClassName="x")},
            "serve.priorityClassName=x is not among priorityClasses.classes",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_a_sentence(chart: Chart, values: Object, sentence: str) -> None:
    result = chart.template(values)
    assert result.returncode != 0
    assert sentence in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("values", "missing", "sentence"),
    [
        ({}, "ray.io/v1", "the cluster has no ray.io/v1: install the KubeRay operator with its CRDs"),
        (
            {"monitoring": {"enabled": True}},
            "monitoring.coreos.com",
            "prometheus-operator",
        ),
        (
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "x"}]}},
            "gateway.networking.k8s.io/v1",
            "the cluster has no gateway.networking.k8s.io/v1: install the Gateway API",
        ),
    ],
)
def test_a_missing_crd_is_told(chart: Chart, values: Object, missing: str, sentence: str) -> None:
    result = chart.template(values, apis=tuple(api for api in APIS if not api.startswith(missing)))
    assert result.returncode != 0
    assert sentence in result.stderr
