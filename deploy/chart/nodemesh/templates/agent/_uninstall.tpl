{{/*
The pod that removes the agent from its node. It is ready when nothing is left there. Directories of
nodemesh's own go, too: that is why it mounts those above them.
*/}}
{{- define "nodemesh.uninstall" -}}
{{ include "nodemesh.node" . }}
automountServiceAccountToken: false
initContainers:
  # First: pods that start from here on are outside of the mesh.
  - name: cni
    {{- include "nodemesh.image" (dict "root" . "program" "mesh-agent") | nindent 4 }}
    args:
      - cni-uninstall
      - --bin-dir={{ .Values.cni.binDir }}
      - --conf-dir={{ .Values.cni.confDir }}
    securityContext:
      {{- include "nodemesh.confined" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        # The two directories of the container runtime are not root's everywhere.
        add: [DAC_OVERRIDE]
    volumeMounts:
      - {name: cni-bin, mountPath: {{ .Values.cni.binDir }}}
      - {name: cni-conf, mountPath: {{ .Values.cni.confDir }}}
      - {name: var-lib, mountPath: /var/lib}
  - name: agent
    {{- include "nodemesh.image" (dict "root" . "program" "mesh-agent") | nindent 4 }}
    args: [uninstall, --config, /etc/nodemesh/config.yaml]
    env:
      - name: NODE_NAME
        valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    securityContext:
      {{- include "nodemesh.confined" . | nindent 6 }}
      # The usual profile lets nobody mount.
      appArmorProfile: {type: Unconfined}
      capabilities:
        drop: [ALL]
        add:
          {{- include "nodemesh.entering" . | nindent 10 }}
    volumeMounts:
      - {name: config, mountPath: /etc/nodemesh, readOnly: true}
      - {name: run, mountPath: /run, mountPropagation: HostToContainer}
      - {name: bpf, mountPath: /sys/fs/bpf}
containers:
  # A DaemonSet's pods are to run for ever.
  - name: done
    {{- include "nodemesh.image" (dict "root" . "program" "mesh-agent") | nindent 4 }}
    args: [pause]
    resources:
      requests: {cpu: 1m, memory: 8Mi}
    securityContext:
      runAsUser: 65532
      runAsGroup: 65532
      runAsNonRoot: true
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      seccompProfile: {type: RuntimeDefault}
      capabilities: {drop: [ALL]}
volumes:
  - name: config
    configMap: {name: nodemesh-agent}
  - name: run
    hostPath: {path: /run, type: Directory}
  - name: bpf
    hostPath: {path: /sys/fs/bpf, type: Directory}
  - name: cni-bin
    hostPath: {path: {{ .Values.cni.binDir }}, type: DirectoryOrCreate}
  - name: cni-conf
    hostPath: {path: {{ .Values.cni.confDir }}, type: DirectoryOrCreate}
  - name: var-lib
    hostPath: {path: /var/lib, type: Directory}
{{- end }}
