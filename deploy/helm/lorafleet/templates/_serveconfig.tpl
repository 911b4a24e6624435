{{/* serveConfigV2, the file of Ray Serve: what `serve deploy` and `serve run` take too. Only this part of the RayService
changes with adapters, limits and settings, and KubeRay hands it to the cluster that is there. */}}

{{/* ServeSettings: the user's, then what other values say. */}}
{{- define "lorafleet.serveArgs" -}}
{{- $serve := .Values.serve -}}
{{- $args := deepCopy $serve.settings -}}
{{- $base := merge (dict) $args.base (dict "device" (ternary "cuda" "cpu" (gt (float64 $serve.replica.gpus) 0.0))) -}}
{{- $_ := set $args "base" $base -}}
{{- $_ := set $args "replica_cpus" $serve.replica.cpus -}}
{{- $_ := set $args "replica_gpus" $serve.replica.gpus -}}
{{- $_ := set $args "replica_threads" $serve.replica.threads -}}
{{- $_ := set $args "drain_s" $serve.drainSeconds -}}
{{- $_ := set $args "log_level" (lower $serve.logLevel) -}}
{{- $_ := set $args "log_format" "json" -}}
{{- with include "lorafleet.registrySettings" . | fromYaml -}}
{{- $_ := set $args "registry" (merge (dict) . (default (dict) $args.registry)) -}}
{{- end -}}
{{- toYaml $args -}}
{{- end -}}

{{/* LiveSettings: what changes in place. */}}
{{- define "lorafleet.userConfig" -}}
preload: {{ toJson .Values.adapters }}
max_queued: {{ .Values.serve.limits.maxQueued }}
request_timeout_s: {{ .Values.serve.limits.requestTimeoutSeconds }}
{{- end -}}

{{- define "lorafleet.serveConfig" -}}
{{- $log := printf "{encoding: JSON, log_level: %s, enable_access_log: false}" .Values.serve.logLevel -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
logging_config: {{ $log }}
applications:
  - name: lorafleet
    route_prefix: /
    import_path: lorafleet.serve.deploy:app
    logging_config: {{ $log }}
    args: {{- include "lorafleet.serveArgs" . | nindent 6 }}
    deployments:
      - name: Replica
        user_config: {{- include "lorafleet.userConfig" . | nindent 10 }}
      - name: Gateway
        user_config: {{- include "lorafleet.userConfig" . | nindent 10 }}
{{- end -}}
