{{/* The names, labels and images that all templates use. */}}

{{/* The chart's name, as a label. */}}
{{- define "lorafleet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* What every object's name begins with: the release, with the chart's name unless it is in there already. */}}
{{- define "lorafleet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "lorafleet.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lorafleet.name" .) -}}
{{- end -}}
{{- end -}}

{{/* What selects the release's pods. Neither version nor chart may be in here: a changed label of a pod template within a
RayService makes KubeRay build a new cluster. */}}
{{- define "lorafleet.selectorLabels" -}}
app.kubernetes.io/part-of: {{ include "lorafleet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object that is no pod template. */}}
{{- define "lorafleet.labels" -}}
{{ include "lorafleet.selectorLabels" . }}
app.kubernetes.io/name: {{ include "lorafleet.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The reference of an image: include "lorafleet.image" (dict "root" $ "image" .Values.image.serve). A digest wins over
the tag, and the tag is the chart's appVersion unless given. */}}
{{- define "lorafleet.image" -}}
{{- $name := printf "%s/%s" .image.registry .image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s%s" $name (default .root.Chart.AppVersion .image.tag) (default "" .image.tagSuffix) -}}
{{- end -}}
{{- end -}}
