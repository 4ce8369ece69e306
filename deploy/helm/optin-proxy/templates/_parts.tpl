{{/* What goes into the pod of an application. Each is a list, to be indented by whoever includes it. */}}

{{- define "optin-proxy.mode" -}}
{{- if not (has .Values.mode (list "base-url" "https-proxy")) }}{{ fail (printf "mode: %s is neither base-url nor https-proxy" .Values.mode) }}{{ end }}
{{- end }}

{{- define "optin-proxy.initContainers" -}}
{{- include "optin-proxy.mode" . }}
{{- if eq .Values.mode "https-proxy" }}
# Makes the certificate authority, for the life of the pod, and what the application needs to trust it. The
# authority's folder is in memory, and the application does not see it.
- name: optin-proxy-trust
  image: {{ .Values.image }}
  args: [env, --shell, k8s, --proxy, "127.0.0.1:8080", --files, /run/optin-proxy/trust/files]
  env: [{ name: OPTIN_PROXY_INTERCEPT__CA_DIR, value: /run/optin-proxy/authority/ca }]
  resources: {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities: { drop: [ALL] }
    seccompProfile: { type: RuntimeDefault }
  volumeMounts:
    - { name: optin-proxy-authority, mountPath: /run/optin-proxy/authority }
    - { name: optin-proxy-trust, mountPath: /run/optin-proxy/trust }
{{- end }}
# A native sidecar (Kubernetes 1.29): it starts before the application, ends after it, and lets a Job end.
- name: optin-proxy
  image: {{ .Values.image }}
  restartPolicy: Always
  args: [serve, --config, /etc/optin-proxy/proxy.toml, --admin, "0.0.0.0:9901"]
  env:
    # One thread does all that an account may ask for, with the least CPU time and memory.
    - { name: TOKIO_WORKER_THREADS, value: "1" }
    {{- if eq .Values.mode "https-proxy" }}
    - { name: OPTIN_PROXY_INTERCEPT__CA_DIR, value: /run/optin-proxy/authority/ca }
    {{- end }}
  ports:
    - { name: optin-admin, containerPort: 9901 }
  startupProbe:
    httpGet: { path: /readyz, port: optin-admin }
    periodSeconds: 1
    failureThreshold: 30
  readinessProbe:
    httpGet: { path: /readyz, port: optin-admin }
    periodSeconds: 5
  livenessProbe:
    httpGet: { path: /livez, port: optin-admin }
    periodSeconds: 10
    timeoutSeconds: 5
  resources: {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities: { drop: [ALL] }
    seccompProfile: { type: RuntimeDefault }
  volumeMounts:
    - { name: optin-proxy-config, mountPath: /etc/optin-proxy, readOnly: true }
    {{- if eq .Values.mode "https-proxy" }}
    - { name: optin-proxy-authority, mountPath: /run/optin-proxy/authority }
    {{- end }}
{{- end }}

{{- define "optin-proxy.env" -}}
{{- if eq .Values.mode "base-url" }}
- { name: {{ .Values.application.urlVariable }}, value: "http://127.0.0.1:8080" }
{{- else }}
- { name: HTTPS_PROXY, value: "http://127.0.0.1:8080" }
- { name: https_proxy, value: "http://127.0.0.1:8080" }
- { name: NO_PROXY, value: "localhost,127.0.0.1,::1" }
- { name: no_proxy, value: "localhost,127.0.0.1,::1" }
- { name: SSL_CERT_FILE, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: REQUESTS_CA_BUNDLE, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: CURL_CA_BUNDLE, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: PIP_CERT, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: GIT_SSL_CAINFO, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: AWS_CA_BUNDLE, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: CARGO_HTTP_CAINFO, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: PERL_LWP_SSL_CA_FILE, value: "/run/optin-proxy/trust/files/bundle.pem" }
- { name: PERL_LWP_ENV_PROXY, value: "1" }
- { name: NODE_EXTRA_CA_CERTS, value: "/run/optin-proxy/trust/files/ca.pem" }
- { name: DENO_CERT, value: "/run/optin-proxy/trust/files/ca.pem" }
- { name: NODE_USE_ENV_PROXY, value: "1" }
- { name: NODE_OPTIONS, value: "--require=\"/run/optin-proxy/trust/files/node-proxy.cjs\"" }
- { name: RUBYOPT, value: "-r/run/optin-proxy/trust/files/ruby-proxy.rb" }
- { name: JAVA_TOOL_OPTIONS, value: "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=8080 -Dhttp.nonProxyHosts=localhost|127.0.0.1|::1 -Djavax.net.ssl.trustStore=\"/run/optin-proxy/trust/files/truststore.jks\" -Djavax.net.ssl.trustStorePassword=changeit" }
- { name: PHP_INI_SCAN_DIR, value: ":/run/optin-proxy/trust/files/php" }
{{- end }}
{{- end }}

{{- define "optin-proxy.volumeMounts" -}}
{{- if eq .Values.mode "https-proxy" }}
- { name: optin-proxy-trust, mountPath: /run/optin-proxy/trust, readOnly: true }
{{- end }}
{{- end }}

{{- define "optin-proxy.volumes" -}}
- name: optin-proxy-config
  configMap: { name: {{ .Release.Name }}-optin-proxy }
{{- if eq .Values.mode "https-proxy" }}
- name: optin-proxy-authority
  emptyDir: { medium: Memory, sizeLimit: 1Mi }
- name: optin-proxy-trust
  emptyDir: { sizeLimit: 4Mi }
{{- end }}
{{- end }}
