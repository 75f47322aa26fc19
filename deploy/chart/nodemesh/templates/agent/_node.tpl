{{/* What both pods on a node are: one that runs the agent, and one that removes it. */}}
{{- define "nodemesh.node" -}}
serviceAccountName: nodemesh-agent
priorityClassName: system-node-critical
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.agent.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
# A node that keeps the agent out would keep every pod of the mesh from starting.
tolerations: [{operator: Exists}]
# The agent is the node's: pods' devices end there, and it dials for them from their namespaces.
hostNetwork: true
{{- end }}

{{/* For every container on a node. Root, since what it uses is root's. */}}
{{- define "nodemesh.confined" -}}
runAsUser: 0
runAsGroup: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
seccompProfile: {type: RuntimeDefault}
# Where SELinux is in force a container has no access to the node's directories otherwise.
seLinuxOptions: {type: spc_t}
{{- end }}

{{/* Entering pods' namespaces and undoing things there. */}}
{{- define "nodemesh.entering" -}}
# Programs, devices, rules, routes and settings of pods' namespaces; marked and transparent sockets.
- NET_ADMIN
# Entering network namespaces; making /proc/sys writable, which it is not in a container. It includes
# BPF and PERFMON: programs and maps, and the verifier's pointer arithmetic.
- SYS_ADMIN
{{- end }}
