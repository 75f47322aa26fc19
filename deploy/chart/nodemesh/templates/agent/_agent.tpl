{{/* The pod of an agent. */}}
{{- define "nodemesh.agent" -}}
{{ include "nodemesh.node" . }}
# The processes of pods that ran before the agent, to find their network namespaces.
hostPID: true
# The control plane's address comes as a variable: see its Service.
enableServiceLinks: true
# Above the drain, or open connections are cut short.
terminationGracePeriodSeconds: {{ add .Values.agent.drainSeconds 15 }}
containers:
  - name: agent
    {{- include "nodemesh.image" (dict "root" . "program" "mesh-agent") | nindent 4 }}
    args: [run, --config, /etc/nodemesh/config.yaml]
    env:
      - name: NODE_NAME
        valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    ports:
      - {name: http, containerPort: 9465}
    # On the node's own loopback, since the pod has no other network.
    startupProbe:
      httpGet: {host: 127.0.0.1, path: /healthz, port: http}
      periodSeconds: 2
      failureThreshold: 60
    # Patient: its end is the end of the pods' connections.
    livenessProbe:
      httpGet: {host: 127.0.0.1, path: /healthz, port: http}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    readinessProbe:
      httpGet: {host: 127.0.0.1, path: /readyz, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
    resources: {{- toYaml .Values.agent.resources | nindent 6 }}
    securityContext:
      {{- include "nodemesh.confined" . | nindent 6 }}
      # The usual profile lets nobody mount, or look at processes outside of the container.
      appArmorProfile: {type: Unconfined}
      capabilities:
        drop: [ALL]
        add:
          {{- include "nodemesh.entering" . | nindent 10 }}
          # Looking at /proc/PID/ns of other users' processes: pods that ran before the agent.
          - SYS_PTRACE
    volumeMounts:
      - {name: config, mountPath: /etc/nodemesh, readOnly: true}
      - {name: token, mountPath: /var/run/secrets/nodemesh, readOnly: true}
      - {name: bundle, mountPath: /var/run/nodemesh/bundle, readOnly: true}
      - {name: run, mountPath: /run/nodemesh}
      - {name: pins, mountPath: /sys/fs/bpf}
      - {name: cgroup, mountPath: /host/cgroup, readOnly: true}
      # Namespaces that the container runtime makes later must be seen.
      - {name: netns, mountPath: /run/netns, mountPropagation: HostToContainer}
  # Keeps the CNI plugin on the node, and asks for its token.
  - name: cni
    {{- include "nodemesh.image" (dict "root" . "program" "mesh-agent") | nindent 4 }}
    args:
      - cni-install
      - --watch
      - --node=$(NODE_NAME)
      - --bin-dir={{ .Values.cni.binDir }}
      - --conf-dir={{ .Values.cni.confDir }}
    env:
      - name: NODE_NAME
        valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    resources:
      requests: {cpu: 5m, memory: 16Mi}
    securityContext:
      {{- include "nodemesh.confined" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        # The two directories of the container runtime are not root's everywhere.
        add: [DAC_OVERRIDE]
    volumeMounts:
      - {name: cni-bin, mountPath: {{ .Values.cni.binDir }}}
      - {name: cni-conf, mountPath: {{ .Values.cni.confDir }}}
      - {name: cni-state, mountPath: /var/lib/nodemesh}
volumes:
  - name: config
    configMap: {name: nodemesh-agent}
  # What the agent joins with: bound to this pod, and of no use to anybody but the control plane.
  - name: token
    projected:
      sources:
        - serviceAccountToken: {audience: nodemesh-control, path: token, expirationSeconds: 3600}
  # The control plane makes it: an agent may be there before.
  - name: bundle
    configMap: {name: nodemesh-bundle, optional: true}
  # The admin socket, which the CNI plugin uses by the same path; keys, pod files, the last snapshot.
  # It outlives the pod, so that a later agent goes on with them.
  - name: run
    hostPath: {path: /run/nodemesh, type: DirectoryOrCreate}
  # The guards' pins, which must outlive the pod. No others are seen. If the node has no BPF file
  # system the directory cannot be made and the pod does not start: one that the agent mounted itself
  # would end with it, and the guards, too.
  - name: pins
    hostPath: {path: /sys/fs/bpf/nodemesh, type: DirectoryOrCreate}
  # The root of the hierarchy, to attach to. The container's own /sys/fs/cgroup is a part of it.
  - name: cgroup
    hostPath: {path: /sys/fs/cgroup, type: Directory}
  - name: netns
    hostPath: {path: /run/netns, type: DirectoryOrCreate}
  - name: cni-bin
    hostPath: {path: {{ .Values.cni.binDir }}, type: DirectoryOrCreate}
  - name: cni-conf
    hostPath: {path: {{ .Values.cni.confDir }}, type: DirectoryOrCreate}
  # The plugin's credentials and notes.
  - name: cni-state
    hostPath: {path: /var/lib/nodemesh, type: DirectoryOrCreate}
{{- end }}
