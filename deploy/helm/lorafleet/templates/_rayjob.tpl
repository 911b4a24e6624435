{{/* A RayJob of one worker group: dict "root" $ "kind" "train" "job" (entry of values) "script" TEXT "files" (map)
"workers" N (pods) "processes" N "homeClaim" NAME "data" CLAIM. The name ends in a hash of all of it: what was run is never changed, a changed
entry is a new run. */}}
{{- define "lorafleet.rayJob" -}}
{{- $root := .root -}}
{{- $spec := include "lorafleet.rayJobSpec" . -}}
{{- $name := include "lorafleet.rayJobName" . -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  labels: {{- include "lorafleet.labels" $root | nindent 4 }}
data:
  {{- range $file, $text := .files }}
  {{ $file }}: |
    {{- $text | nindent 4 }}
  {{- end }}
---
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: {{ $name }}
  labels: {{- include "lorafleet.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .kind }}
spec:
  {{- $spec | replace "@NAME@" $name | nindent 2 }}
{{- end -}}

{{- define "lorafleet.rayJobName" -}}
{{- $hash := printf "%s%s" (include "lorafleet.rayJobSpec" .) (toJson .files) | sha256sum | trunc 6 -}}
{{- printf "%s-%s-%s-%s" (include "lorafleet.fullname" .root) .kind .job.name $hash -}}
{{- end -}}

{{- define "lorafleet.rayJobSpec" -}}
{{- $root := .root -}}
{{- $kind := .kind -}}
{{- $values := index $root.Values $kind -}}
{{- $image := include "lorafleet.image" (dict "root" $root "image" $root.Values.image.serve) -}}
entrypoint: bash /etc/lorafleet/run.sh
{{- if gt (int $values.worker.gpu.count) 0 }}
entrypointNumGpus: {{ ternary 0 1 (gt .processes 1) }}
{{- end }}
entrypointNumCpus: 1
submissionMode: K8sJobMode
backoffLimit: {{ $values.backoffLimit }}
activeDeadlineSeconds: {{ $values.activeDeadlineSeconds }}
shutdownAfterJobFinishes: false
deletionStrategy:
  deletionRules:
    - {policy: DeleteCluster, condition: {jobStatus: SUCCEEDED, ttlSeconds: {{ $values.deletion.clusterAfterSeconds }}}}
    - {policy: DeleteCluster, condition: {jobStatus: FAILED, ttlSeconds: {{ $values.deletion.clusterAfterSeconds }}}}
    - {policy: DeleteSelf, condition: {jobStatus: SUCCEEDED, ttlSeconds: {{ $values.deletion.jobAfterSuccessSeconds }}}}
    - {policy: DeleteSelf, condition: {jobStatus: FAILED, ttlSeconds: {{ $values.deletion.jobAfterFailureSeconds }}}}
submitterPodTemplate:
  metadata:
    labels: {{- include "lorafleet.podLabels" (dict "root" $root "component" (printf "%s-submitter" $kind)) | nindent 6 }}
  spec:
    {{- include "lorafleet.podBasics" (dict "root" $root) | nindent 4 }}
    restartPolicy: Never
    containers:
      - name: ray-job-submitter
        image: {{ $image }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        securityContext: {{- include "lorafleet.containerSecurityContext" $root | nindent 10 }}
        resources:
          requests: {cpu: 100m, memory: 512Mi}
          limits: {memory: 512Mi}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
    volumes:
      - {name: tmp, emptyDir: {}}
rayClusterSpec:
  rayVersion: {{ $root.Values.rayVersion | quote }}
  authOptions:
    mode: {{ ternary "token" "disabled" $root.Values.rayAuth.enabled }}
    {{- with $root.Values.rayAuth.existingSecret }}
    secretName: {{ . }}
    {{- end }}
  headGroupSpec:
    rayStartParams:
      num-cpus: "0"
      dashboard-host: 0.0.0.0
    template:
      metadata:
        labels: {{- include "lorafleet.podLabels" (dict "root" $root "component" (printf "%s-head" $kind)) | nindent 10 }}
      spec:
        {{- include "lorafleet.podBasics" (dict "root" $root) | nindent 8 }}
        restartPolicy: Never
        {{- with $values.priorityClassName }}
        priorityClassName: {{ . }}
        {{- end }}
        containers:
          - name: ray-head
            image: {{ $image }}
            imagePullPolicy: {{ $root.Values.image.pullPolicy }}
            securityContext: {{- include "lorafleet.containerSecurityContext" $root | nindent 14 }}
            ports:
              - {name: gcs-server, containerPort: 6379}
              - {name: dashboard, containerPort: 8265}
              - {name: client, containerPort: 10001}
              - {name: metrics, containerPort: 8080}
            resources:
              requests: {cpu: 500m, memory: 4Gi}
              limits: {memory: 4Gi}
            volumeMounts:
              - {name: tmp, mountPath: /tmp}
              - {name: home, mountPath: /var/lib/lorafleet}
        volumes:
          - {name: tmp, emptyDir: {}}
          - {name: home, emptyDir: {sizeLimit: 1Gi}}
  workerGroupSpecs:
    - groupName: workers
      replicas: {{ .workers }}
      minReplicas: {{ .workers }}
      maxReplicas: {{ .workers }}
      rayStartParams: {{- include "lorafleet.workerStartParams" $values.worker | nindent 8 }}
      template:
        metadata:
          labels: {{- include "lorafleet.podLabels" (dict "root" $root "component" (printf "%s-worker" $kind)) | nindent 12 }}
        spec:
          {{- include "lorafleet.podBasics" (dict "root" $root) | nindent 10 }}
          restartPolicy: Never
          {{- with $values.priorityClassName }}
          priorityClassName: {{ . }}
          {{- end }}
          {{- with include "lorafleet.placement" $values.worker }}
          {{- . | trim | nindent 10 }}
          {{- end }}
          {{- with include "lorafleet.weightsInit" $root }}
          initContainers: {{- . | nindent 12 }}
          {{- end }}
          containers:
            - name: ray-worker
              image: {{ $image }}
              imagePullPolicy: {{ $root.Values.image.pullPolicy }}
              securityContext: {{- include "lorafleet.containerSecurityContext" $root | nindent 16 }}
              ports:
                - {name: metrics, containerPort: 8080}
              {{- with include "lorafleet.env" $root }}
              env: {{- . | nindent 16 }}
              {{- end }}
              resources: {{- include "lorafleet.workerResources" $values.worker | nindent 16 }}
              volumeMounts: {{- include "lorafleet.mounts" (dict "root" $root) | nindent 16 }}
                - {name: run, mountPath: /etc/lorafleet, readOnly: true}
                {{- if .data }}
                - {name: data, mountPath: /data, readOnly: true}
                {{- end }}
          volumes: {{- include "lorafleet.volumes" (dict "root" $root "homeClaim" .homeClaim "cacheSize" "50Gi") | nindent 12 }}
            - {name: run, configMap: {name: "@NAME@"}}
            {{- if .data }}
            - {name: data, persistentVolumeClaim: {claimName: {{ .data }}, readOnly: true}}
            {{- end }}
{{- end -}}

{{/* A word as bash takes it, whatever is in it. */}}
{{- define "lorafleet.word" -}}
'{{ . | toString | replace "'" "'\\''" }}'
{{- end -}}

{{/* The settings of a job, as YAML: the entry's, with base and registry of the service where it says nothing of them. */}}
{{- define "lorafleet.jobSettings" -}}
{{- $settings := deepCopy (default (dict) .job.settings) -}}
{{- $_ := set $settings "base" (merge (dict) (default (dict) $settings.base) (dict "device" (ternary "cuda" "cpu" (gt (int .gpus) 0))) .root.Values.serve.settings.base) -}}
{{- with include "lorafleet.registrySettings" .root | fromYaml -}}
{{- $_ := set $settings "registry" (merge (dict) . (default (dict) $settings.registry)) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}
