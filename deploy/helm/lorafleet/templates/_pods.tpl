{{/* What the pods of all workloads have in common: restricted pod security, a read-only root, volumes to write to. */}}

{{/* Labels of a pod: include "lorafleet.podLabels" (dict "root" $ "component" "serve-worker"). */}}
{{- define "lorafleet.podLabels" -}}
{{ include "lorafleet.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "lorafleet.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lorafleet.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* The head of every pod's spec: dict "root" $ "token" true, where the pod asks the API server. */}}
{{- define "lorafleet.podBasics" -}}
serviceAccountName: {{ include "lorafleet.serviceAccountName" .root }}
automountServiceAccountToken: {{ default false .token }}
{{- /* A Service named lorafleet-x would set LORAFLEET_X_PORT and so on, and settings refuse what they do not know. */}}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "lorafleet.podSecurityContext" .root | nindent 2 }}
{{- end -}}

{{- define "lorafleet.serviceAccountName" -}}
{{- default (include "lorafleet.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Where GPU pods may be, out of a `worker` of values: selector and tolerations of the pod and of its GPUs. */}}
{{- define "lorafleet.placement" -}}
{{- $gpu := gt (int .gpu.count) 0 -}}
{{- with merge (dict) (default (dict) .nodeSelector) (ternary .gpu.nodeSelector (dict) $gpu) }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (default (list) .tolerations) (ternary .gpu.tolerations (list) $gpu) }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and $gpu .gpu.runtimeClassName }}
runtimeClassName: {{ .gpu.runtimeClassName }}
{{- end }}
{{- end -}}

{{/* The resources of a `worker` of values, with its GPUs, in whose limits the autoscaler looks for them. */}}
{{- define "lorafleet.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpu.count) 0 -}}
{{- $gpus := dict .gpu.resource (toString .gpu.count) -}}
{{- $_ := set $resources "limits" (merge (dict) $gpus (default (dict) $resources.limits)) -}}
{{- $_ := set $resources "requests" (merge (dict) $gpus (default (dict) $resources.requests)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* rayStartParams of a worker: Ray knows a MIG slice or a shared GPU as a GPU only if it is told. */}}
{{- define "lorafleet.workerStartParams" -}}
num-gpus: {{ .gpu.count | toString | quote }}
{{- end -}}

{{/* Environment of every container of ours. No LORAFLEET_* but settings: others are refused. */}}
{{- define "lorafleet.env" -}}
{{- if eq .Values.registry.type "s3" }}
{{- with .Values.registry.s3.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .Values.registry.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.registry.s3.accessKeyIdKey }}}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.registry.s3.secretAccessKeyKey }}}}
{{- end }}
{{- end }}
{{- if ne .Values.weights.mode "none" }}
- {name: HF_HOME, value: /weights}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end -}}

{{/* Environment of the serving Ray pods. */}}
{{- define "lorafleet.serveEnv" -}}
{{- $redis := fromYaml (include "lorafleet.redis" .) -}}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ sub (int .Values.serve.terminationGracePeriodSeconds) 15 | quote }}}
{{- include "lorafleet.env" . }}
{{- with .Values.serve.adminKey.existingSecret }}
- name: LORAFLEET_ADMIN_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.serve.adminKey.key }}}}
{{- end }}
{{- if or .Values.redis.jobs .Values.redis.cache }}
- name: JOBS_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $redis.secret }}, key: {{ $redis.key }}}}
{{- $url := printf "%s://:$(JOBS_REDIS_PASSWORD)@%s" $redis.scheme $redis.address }}
{{- if .Values.redis.jobs }}
- {name: LORAFLEET_JOBS__REDIS_URL, value: {{ printf "%s/1" $url | quote }}}
{{- end }}
{{- if .Values.redis.cache }}
- {name: LORAFLEET_CACHE__REDIS_URL, value: {{ printf "%s/2" $url | quote }}}
{{- end }}
{{- end }}
{{- with .Values.serve.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Which Redis there is, as YAML: address, secret, key, scheme; nothing: none. */}}
{{- define "lorafleet.redis" -}}
{{- if .Values.redis.internal.enabled -}}
{{- dict "address" (printf "%s-redis:6379" (include "lorafleet.fullname" .)) "secret" .Values.redis.internal.existingSecret "key" "password" "scheme" "redis" | toYaml -}}
{{- else if .Values.redis.external.address -}}
{{- dict "address" .Values.redis.external.address "secret" .Values.redis.external.existingSecret "key" .Values.redis.external.key "scheme" (ternary "rediss" "redis" .Values.redis.external.tls) | toYaml -}}
{{- end -}}
{{- end -}}

{{/* Mounts of a container that works: somewhere to write, adapters, weights. dict "root" $ "home" NAME "weights" bool */}}
{{- define "lorafleet.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/lorafleet}
{{- if eq .root.Values.registry.type "claim" }}
- {name: registry, mountPath: /registry}
{{- end }}
{{- if ne .root.Values.weights.mode "none" }}
- {name: weights, mountPath: /weights, readOnly: true}
{{- end }}
{{- end -}}

{{/* The volumes of those mounts; `homeClaim` and `cacheSize` say what the home is. */}}
{{- define "lorafleet.volumes" -}}
{{- $root := .root -}}
{{- $fullname := include "lorafleet.fullname" $root -}}
- {name: tmp, emptyDir: {}}
{{- if .homeClaim }}
- {name: home, persistentVolumeClaim: {claimName: {{ .homeClaim }}}}
{{- else }}
- {name: home, emptyDir: {sizeLimit: {{ default "1Gi" .cacheSize }}}}
{{- end }}
{{- if eq $root.Values.registry.type "claim" }}
- {name: registry, persistentVolumeClaim: {claimName: {{ default (printf "%s-registry" $fullname) $root.Values.registry.claim.existingClaim }}}}
{{- end }}
{{- if eq $root.Values.weights.mode "claim" }}
- {name: weights, persistentVolumeClaim: {claimName: {{ default (printf "%s-weights" $fullname) $root.Values.weights.claim.existingClaim }}}}
{{- else if eq $root.Values.weights.mode "pod" }}
- {name: weights, emptyDir: {sizeLimit: {{ $root.Values.weights.claim.size }}}}
{{- end }}
{{- end -}}

{{/* The registry's settings, as YAML. */}}
{{- define "lorafleet.registrySettings" -}}
{{- if eq .Values.registry.type "claim" }}
url: /registry
{{- else if eq .Values.registry.type "s3" }}
url: {{ .Values.registry.s3.url }}
{{- with .Values.registry.s3.endpointUrl }}
endpoint_url: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Init containers that wait for, or fetch, the base's weights. */}}
{{- define "lorafleet.weightsInit" -}}
{{- if ne .Values.weights.mode "none" -}}
- name: weights
  image: {{ include "lorafleet.image" (dict "root" . "image" .Values.image.serve) }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  securityContext: {{- include "lorafleet.containerSecurityContext" . | nindent 4 }}
{{- if include "lorafleet.weightsByJob" . }}
  command: [bash, -c, "until [[ -e /weights/{{ include "lorafleet.weightsMark" . }} ]]; do sleep 2; done"]
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 64Mi}
{{- else }}
{{ include "lorafleet.weightsFetch" . | indent 2 }}
{{- end }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /var/lib/lorafleet}
    - {name: weights, mountPath: /weights{{ if include "lorafleet.weightsByJob" . }}, readOnly: true{{ end }}}
{{- end -}}
{{- end -}}

{{/* Whether a Job fetches them: a claim that one node alone can mount would have to be where both the Job and the worker are. */}}
{{- define "lorafleet.weightsByJob" -}}
{{- if and (eq .Values.weights.mode "claim") (or .Values.weights.claim.existingClaim (has "ReadWriteMany" .Values.weights.claim.accessModes)) -}}
true
{{- end -}}
{{- end -}}

{{/* A file that says that this base is there, whole. */}}
{{- define "lorafleet.weightsMark" -}}
.ready-{{ .Values.serve.settings.base | toJson | sha256sum | trunc 12 }}
{{- end -}}

{{/* Command, environment and resources of what fetches the weights. */}}
{{- define "lorafleet.weightsFetch" -}}
command:
  - python
  - -c
  - |
    import os, pathlib
    from lorafleet.sdxl.config import BaseConfig
    from lorafleet.sdxl.folder import find_base
    mark = pathlib.Path("/weights/{{ include "lorafleet.weightsMark" . }}")
    if not mark.exists():
        print(find_base(BaseConfig.model_validate_json(os.environ["BASE"])).root)
        mark.touch()
env:
  - {name: BASE, value: {{ .Values.serve.settings.base | toJson | quote }}}
  - {name: HF_HOME, value: /weights}
{{- with .Values.weights.existingSecret }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end }}
resources: {{- toYaml .Values.weights.resources | nindent 2 }}
{{- end -}}
