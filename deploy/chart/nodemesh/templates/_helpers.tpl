{{/*
Names are fixed, not made of the release's: there is one agent per node, so one nodemesh per cluster,
and the agents' and the control plane's configurations name each other's objects.
*/}}

{{- define "nodemesh.labels" -}}
{{ include "nodemesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "nodemesh.selector" -}}
app.kubernetes.io/name: nodemesh
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The image of a program. */}}
{{- define "nodemesh.image" -}}
image: {{ printf "%s/%s:%s" .root.Values.image.repository .program (.root.Values.image.tag | default .root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end }}
