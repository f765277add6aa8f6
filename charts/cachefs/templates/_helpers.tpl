{{/* Names, labels and what several manifests have in common. */}}

{{- define "cachefs.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* Releases may have dots in their names, Services may not. */}}
{{- define "cachefs.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "cachefs.name" .) .Release.Name -}}
{{- .Release.Name | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "cachefs.name" .) | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Of a load. A Job cannot be changed, so what would run otherwise in anything is another Job: another load, image,
address, or version of this chart, which stands in the labels. (dict "root" $ "this" $this "load" $load) */}}
{{- define "cachefs.warmupName" -}}
{{- $name := printf "%s-warmup-%s" (include "cachefs.fullname" .root) .load.name -}}
{{- if .load.schedule -}}{{- $name -}}{{- else -}}
{{- printf "%s-%s" $name (include "cachefs.warmupJob" . | sha256sum | trunc 8) -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change: what selects pods. (dict "root" $ "component" "master") */}}
{{- define "cachefs.selector" -}}
app.kubernetes.io/name: {{ include "cachefs.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "cachefs.labels" -}}
{{ include "cachefs.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "cachefs.meta" -}}
name: {{ include "cachefs.fullname" .root }}-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "cachefs.labels" . | nindent 2 }}
{{- end -}}

{{- define "cachefs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* What every pod has. Kubernetes' variables for services are left out: one named CACHEFS_... would look like a setting. */}}
{{- define "cachefs.pod" -}}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "cachefs.nonRootPod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "cachefs.unprivileged" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{- define "cachefs.masterHost" -}}
{{ include "cachefs.fullname" . }}-master.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end -}}

{{- define "cachefs.masterAddress" -}}
{{ include "cachefs.masterHost" . }}:{{ .Values.master.port }}
{{- end -}}

{{- define "cachefs.workerDomain" -}}
{{ include "cachefs.fullname" . }}-worker.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end -}}

{{/* ---- Tokens and certificates ---- */}}

{{/* (dict "root" $ "role" "worker") */}}
{{- define "cachefs.tokensSecret" -}}
{{- $given := index .root.Values.tokens.existingSecrets .role -}}
{{- if $given -}}{{ $given }}{{- else -}}
{{ include "cachefs.fullname" .root }}-tokens-{{ .role }}
{{- end -}}
{{- end -}}

{{/* .role is that of the certificate: admins show one of clients. */}}
{{- define "cachefs.tlsSecret" -}}
{{- $role := eq .role "admin" | ternary "client" .role -}}
{{- $given := index .root.Values.tls.existingSecrets $role -}}
{{- if $given -}}{{ $given }}{{- else -}}
{{ include "cachefs.fullname" .root }}-tls-{{ $role }}
{{- end -}}
{{- end -}}

{{- define "cachefs.securityArgs" -}}
- --tokens=/etc/cachefs/tokens/tokens.toml
{{- if .root.Values.tls.enabled }}
- --tls-cert=/etc/cachefs/tls/tls.crt
- --tls-key=/etc/cachefs/tls/tls.key
- --tls-ca=/etc/cachefs/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "cachefs.securityMounts" -}}
- name: tokens
  mountPath: /etc/cachefs/tokens
  readOnly: true
{{- if .root.Values.tls.enabled }}
- name: tls
  mountPath: /etc/cachefs/tls
  readOnly: true
{{- end }}
{{- end -}}

{{/* Of a pod that runs as root. */}}
{{- define "cachefs.securityVolumes" -}}
- name: tokens
  secret:
    secretName: {{ include "cachefs.tokensSecret" . }}
    # Others than its owner must not read it: cachefs refuses the file otherwise.
    defaultMode: 0400
    items:
      - key: tokens.toml
        path: tokens.toml
{{ include "cachefs.tlsVolume" . }}
{{- end -}}

{{- define "cachefs.tlsVolume" -}}
{{- if .root.Values.tls.enabled -}}
- name: tls
  secret:
    secretName: {{ include "cachefs.tlsSecret" . }}
    defaultMode: 0440
{{- end -}}
{{- end -}}

{{/* Of a pod that does not: kubelet gives a Secret to the pod's group (0440), and cachefs wants a file of one user. */}}
{{- define "cachefs.ownSecurityVolumes" -}}
- name: tokens-secret
  secret:
    secretName: {{ include "cachefs.tokensSecret" . }}
    defaultMode: 0440
    items:
      - key: tokens.toml
        path: tokens.toml
- name: tokens
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
{{ include "cachefs.tlsVolume" . }}
{{- end -}}

{{- define "cachefs.ownTokens" -}}
- name: tokens
  image: {{ include "cachefs.image" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  # cachefs refuses tokens that a group can read, which is how kubelet gives Secrets to pods that are not root.
  command: ["install", "-m", "0600", "/etc/cachefs/tokens-secret/tokens.toml", "/etc/cachefs/tokens/tokens.toml"]
  {{- include "cachefs.unprivileged" . | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    - name: tokens-secret
      mountPath: /etc/cachefs/tokens-secret
      readOnly: true
    - name: tokens
      mountPath: /etc/cachefs/tokens
{{- end -}}

{{/* ---- Places ---- */}}

{{- define "cachefs.topologyEnv" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- range $name, $label := .Values.topology.fromPodLabels }}
- name: TOPOLOGY_{{ $name | upper | replace "-" "_" | replace "." "_" }}
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['{{ $label }}']
{{- end }}
{{- end -}}

{{/* A pod's own host name changes with each pod: the node's counts. */}}
{{- define "cachefs.topologyArgs" -}}
- --label=host=$(NODE_NAME)
{{- range $name, $value := .Values.topology.labels }}
- {{ printf "--label=%s=%s" $name $value | quote }}
{{- end }}
{{- range $name, $label := .Values.topology.fromPodLabels }}
- --label={{ $name }}=$(TOPOLOGY_{{ $name | upper | replace "-" "_" | replace "." "_" }})
{{- end }}
{{- end -}}

{{/* Workers write files, and mounts open them by the same paths. (dict "root" $ "readOnly" true) */}}
{{- define "cachefs.tierMounts" -}}
{{- $root := .root -}}
{{- $readOnly := .readOnly -}}
{{- if $root.Values.worker.tiers.memory.enabled }}
- name: tier-memory
  mountPath: {{ $root.Values.worker.tiers.memory.hostPath }}
  readOnly: {{ $readOnly }}
  mountPropagation: HostToContainer
{{- end }}
{{- range $index, $disk := $root.Values.worker.tiers.disks }}
- name: tier-disk-{{ $index }}
  mountPath: {{ $disk.hostPath }}
  readOnly: {{ $readOnly }}
  mountPropagation: HostToContainer
{{- end }}
{{- end -}}

{{- define "cachefs.tierVolumes" -}}
{{- if .Values.worker.tiers.memory.enabled }}
- name: tier-memory
  hostPath:
    path: {{ .Values.worker.tiers.memory.hostPath }}
    type: DirectoryOrCreate
{{- end }}
{{- range $index, $disk := .Values.worker.tiers.disks }}
- name: tier-disk-{{ $index }}
  hostPath:
    path: {{ $disk.hostPath }}
    type: DirectoryOrCreate
{{- end }}
{{- end -}}

{{/* A size of cachefs in MiB. (dict "size" "8G") */}}
{{- define "cachefs.mebibytes" -}}
{{- $number := regexFind "^[0-9]+" .size | int64 -}}
{{- $unit := regexFind "[KMGT]$" .size -}}
{{- if eq $unit "T" -}}{{ mul $number 1048576 }}
{{- else if eq $unit "G" -}}{{ mul $number 1024 }}
{{- else if eq $unit "M" -}}{{ $number }}
{{- else -}}{{ div (add $number 1023) 1024 }}
{{- end -}}
{{- end -}}

{{/* What the schema cannot say. */}}
{{- define "cachefs.validate" -}}
{{- $given := 0 -}}
{{- range $name, $secret := .Values.tokens.existingSecrets }}{{ if $secret }}{{ $given = add1 $given }}{{ end }}{{ end -}}
{{- if and (ne (int $given) 0) (ne (int $given) 4) -}}
{{- fail "tokens.existingSecrets: either all of master, worker, client and admin, or none" -}}
{{- end -}}
{{- $given = 0 -}}
{{- range $name, $secret := .Values.tls.existingSecrets }}{{ if $secret }}{{ $given = add1 $given }}{{ end }}{{ end -}}
{{- if .Values.tls.enabled -}}
{{- if .Values.tls.certManager.enabled -}}
{{- if $given -}}{{- fail "tls: either existingSecrets or certManager.enabled" -}}{{- end -}}
{{- else if ne (int $given) 3 -}}
{{- fail "tls.existingSecrets: all of master, worker and client are needed, or certManager.enabled" -}}
{{- end -}}
{{- end -}}
{{- $full := include "cachefs.fullname" . -}}
{{- if not (regexMatch "^[a-z]" $full) -}}
{{- fail (printf "fullnameOverride: names of objects would begin with %q, and Services must begin with a letter: set one that does" $full) -}}
{{- end -}}
{{- $loads := dict -}}
{{- range .Values.warmup.loads -}}
{{- $this := dict "root" $ "component" "warmup" "role" "admin" -}}
{{- $name := include "cachefs.warmupName" (dict "root" $ "this" $this "load" .) -}}
{{- $most := ternary 52 63 (hasKey . "schedule") -}}
{{- if gt (len $name) $most -}}
{{- fail (printf "warmup.loads: %s: the name %q has %d characters, and Kubernetes takes %d: a shorter name, or fullnameOverride" .name $name (len $name) $most) -}}
{{- end -}}
{{- if hasKey $loads .name -}}{{- fail (printf "warmup.loads: %s: the name is there twice" .name) -}}{{- end -}}
{{- $_ := set $loads .name true -}}
{{- end -}}
{{- if and (not .Values.worker.tiers.memory.enabled) (not .Values.worker.tiers.disks) -}}
{{- fail "worker.tiers: at least one, memory.enabled or an entry of disks" -}}
{{- end -}}
{{- range $name := list "master" "worker" -}}
{{- $its := index $.Values $name -}}
{{- if eq (int $its.port) (int $its.httpPort) -}}
{{- fail (printf "%s.httpPort: %d is %s.port too" $name (int $its.httpPort) $name) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "controller" "nodePlugin" -}}
{{- if eq (int (index $.Values.csi $name).httpPort) 9808 -}}
{{- fail (printf "csi.%s.httpPort: 9808 is that of the liveness sidecar" $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.csi.inlineUrls (not .Values.csi.mayAttach) -}}
{{- fail "csi.inlineUrls needs csi.mayAttach: attaching takes the token of an admin" -}}
{{- end -}}
{{- if and .Values.csi.inlineUrls (not .Values.csi.inlineVolumes) -}}
{{- fail "csi.inlineUrls needs csi.inlineVolumes" -}}
{{- end -}}
{{- range .Values.csi.storageClasses -}}
{{- if eq (hasKey .parameters "url") (hasKey .parameters "path") -}}
{{- fail (printf "csi.storageClasses: %s: parameters needs exactly one of url and path" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Directories of the node in which there are mountpoints; what is mounted there is seen by the node and its pods. */}}
{{- define "cachefs.mountpointMounts" -}}
{{- if .Values.csi.enabled }}
- name: kubelet
  mountPath: {{ .Values.kubeletDir }}
  mountPropagation: Bidirectional
{{- end }}
{{- /* Also when there are none any more: what was mounted is to be unmounted. */}}
- name: host-mounts
  mountPath: {{ .Values.mounts.hostDir }}
  mountPropagation: Bidirectional
{{- end -}}

{{- define "cachefs.mountpointVolumes" -}}
{{- if .Values.csi.enabled }}
- name: kubelet
  hostPath:
    path: {{ .Values.kubeletDir }}
    type: Directory
{{- end }}
- name: host-mounts
  hostPath:
    path: {{ .Values.mounts.hostDir }}
    type: DirectoryOrCreate
{{- end -}}

{{- define "cachefs.livenessSidecar" -}}
- name: liveness-probe
  image: {{ .Values.csi.sidecars.livenessProbe | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    - --csi-address=/csi/csi.sock
    - --http-endpoint=:9808
    # It asks the driver, which asks the master or the mount service and waits 5 s for them.
    - --probe-timeout=6s
  {{- include "cachefs.unprivileged" . | nindent 2 }}
  resources:
    {{- toYaml .Values.csi.sidecars.resources | nindent 4 }}
  volumeMounts:
    - name: socket
      mountPath: /csi
{{- end -}}

{{/* Of the driver's container: alive is what the sidecar answers for it. (dict "httpPort" 9103) */}}
{{- define "cachefs.csiProbes" -}}
ports:
  - name: metrics
    containerPort: {{ .httpPort }}
  - name: healthz
    containerPort: 9808
# Whom it asks may be away for a while, as in an upgrade: to start the driver again would only make that longer.
startupProbe:
  httpGet: {path: /healthz, port: healthz}
  periodSeconds: 10
  timeoutSeconds: 7
  failureThreshold: 30
livenessProbe:
  httpGet: {path: /healthz, port: healthz}
  periodSeconds: 10
  timeoutSeconds: 7
  failureThreshold: 30
# An update waits for it, and does not take the next one away as long as this one can do nothing.
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 7
{{- end -}}

{{/* By which the operator of Prometheus finds pods that nobody else asks over the network. */}}
{{- define "cachefs.metricsService" -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "cachefs.meta" . | nindent 2 }}
spec:
  # For monitoring alone.
  clusterIP: None
  selector:
    {{- include "cachefs.selector" . | nindent 4 }}
  ports:
    - name: metrics
      port: {{ .httpPort }}
      targetPort: metrics
{{- end -}}

{{/* The spec of a Job that loads. (dict "root" $ "this" $this "load" $load) */}}
{{- define "cachefs.warmupJob" -}}
# At an install the master may take a while to be there. What is loaded already is passed over.
backoffLimit: 10
template:
  metadata:
    labels:
      {{- include "cachefs.labels" .this | nindent 6 }}
  spec:
    {{- include "cachefs.pod" .this | nindent 4 }}
    {{- include "cachefs.nonRootPod" .root | nindent 4 }}
    serviceAccountName: {{ include "cachefs.fullname" .root }}-warmup
    automountServiceAccountToken: false
    restartPolicy: OnFailure
    initContainers:
      {{- include "cachefs.ownTokens" .this | nindent 6 }}
    containers:
      - name: load
        image: {{ include "cachefs.image" .root | quote }}
        imagePullPolicy: {{ .root.Values.image.pullPolicy }}
        command: ["cachefs"]
        args:
          - load
          {{- if .load.replicas }}
          - --replicas={{ .load.replicas }}
          {{- else }}
          # Each file on one worker.
          - --spread
          {{- end }}
          {{- with .load.limit }}
          - --limit={{ . }}
          {{- end }}
          {{- with .load.promote }}
          - --promote={{ . }}
          {{- end }}
          - --json
          - --master={{ include "cachefs.masterAddress" .root }}
          {{- include "cachefs.securityArgs" .this | nindent 10 }}
          - --
          {{- range .load.paths }}
          - {{ . | quote }}
          {{- end }}
        {{- include "cachefs.unprivileged" .root | nindent 8 }}
        resources:
          {{- toYaml .root.Values.warmup.resources | nindent 10 }}
        volumeMounts:
          - name: tmp
            mountPath: /tmp
          {{- include "cachefs.securityMounts" .this | nindent 10 }}
    volumes:
      - name: tmp
        emptyDir: {}
      {{- include "cachefs.ownSecurityVolumes" .this | nindent 6 }}
{{- end -}}
