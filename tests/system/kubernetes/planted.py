"""Errors as people make them in the production overlay: at least one for each rule."""

from __future__ import annotations

from tests.system.kubernetes.manifests import Manifest
from tests.system.kubernetes.planting import REMOVED, Planted, add, drop, replace, variable

POD = "spec.template.spec"
CONTAINER = f"{POD}.containers.0"
GATEWAY, EXPERTS, REDIS = "Deployment/gateway", "Deployment/experts-a", "Deployment/redis"
CONFIG = "ConfigMap/consilium-config"
FILE = ("data", "consilium.yaml")
_NAME = "app.kubernetes.io/name"
_OPEN: Manifest = {"ports": [{"port": "grpc"}]}
_ENDPOINT = "spec.podMetricsEndpoints.0"
_SCALER, _TRIGGER = "ScaledObject/experts-a", "spec.triggers.0.metadata"
_REDIS_CONFIG, _REDIS_FILE = "ConfigMap/redis-config", ("data", "redis.conf")

PLANTED = (
    # who refers to whom
    Planted("namespaces_agree", "Service/gateway", "metadata.namespace", "default", "['consilium', 'default']"),
    Planted("namespaces_agree", "Namespace/consilium", "metadata.name", "other", "created are ['other']"),
    Planted("names_are_unique", "Service/gateway", "metadata.name", "redis", "Service/redis stands twice"),
    Planted("workloads_select_their_own_pods", EXPERTS, "spec.selector.matchLabels", {_NAME: "expert"}, "experts-b"),
    Planted("workloads_select_their_own_pods", EXPERTS, ("spec", "selector", "matchLabels", _NAME), "x", "no pods"),
    Planted("services_reach_ports", "Service/redis", ("spec", "selector", _NAME), "cache", "matches 0 workloads"),
    Planted("services_reach_ports", "Service/experts-a", "spec.selector", {_NAME: "expert"}, "matches 2 workloads"),
    Planted("services_reach_ports", "Service/gateway", "spec.ports.0.targetPort", "web", "has no port web"),
    Planted("services_reach_ports", "Service/experts-a", "spec.ports.0.port", 80, "not translated"),
    Planted("references_resolve", GATEWAY, f"{POD}.volumes.0.configMap.name", "consilium", "no ConfigMap 'consilium'"),
    Planted(
        "references_resolve", REDIS, f"{POD}.initContainers.0.env.0.valueFrom.secretKeyRef.name", "redis", "Secret"
    ),
    Planted("references_resolve", EXPERTS, f"{POD}.volumes.1.persistentVolumeClaim.claimName", "model", "'model'"),
    Planted("references_resolve", EXPERTS, f"{CONTAINER}.volumeMounts.2.name", "scratch", "no volume of the pod"),
    Planted("references_resolve", EXPERTS, f"{CONTAINER}.volumeMounts", drop("name", "tmp"), "no container mounts"),
    Planted("references_resolve", EXPERTS, f"{CONTAINER}.resources.limits.cpu", REMOVED, "not stated"),
    Planted("generated_objects_are_used", CONFIG, "metadata.name", "settings", "nothing refers to ConfigMap/settings"),
    Planted("monitors_find_ports", "PodMonitor/expert", f"{_ENDPOINT}.port", "web", "named 'web'"),
    Planted("monitors_find_ports", "PodMonitor/expert", "spec.selector.matchLabels", {_NAME: "worker"}, "no pods"),
    Planted("monitors_find_ports", "PodMonitor/expert", "spec.podMetricsEndpoints", lambda old: old * 2, "twice"),
    Planted("monitors_name_jobs_as_the_alerts_do", "PodMonitor/expert", f"{_ENDPOINT}.relabelings", [], "alerts know"),
    Planted("policies_select_pods", "NetworkPolicy/redis", "spec.podSelector.matchLabels", {_NAME: "cache"}, "no pods"),
    Planted(
        "policies_select_pods",
        "NetworkPolicy/redis",
        "spec.ingress.0.from.0.podSelector.matchLabels",
        {_NAME: "web"},
        "the peer",
    ),
    Planted("policies_select_pods", "NetworkPolicy/gateway", "spec.egress.0.ports.0.port", "rpc", "names the port"),
    # what gets through the network
    Planted("connections_are_as_meant", "NetworkPolicy/expert", "spec.ingress", add(_OPEN), "can reach port grpc"),
    Planted("connections_are_as_meant", "NetworkPolicy/redis", "spec.ingress.0.from", REMOVED, "can reach port redis"),
    Planted(
        "connections_are_as_meant",
        "NetworkPolicy/expert",
        "spec.ingress.1.from.0.podSelector",
        REMOVED,
        "another pod of Prometheus' namespace can reach port metrics",
    ),
    Planted("connections_are_as_meant", "NetworkPolicy/names", "spec.egress.0.ports.0.protocol", "TCP", "port dns of"),
    Planted("connections_are_as_meant", "NetworkPolicy/gateway", "spec.egress.2", REMOVED, "cannot reach port redis"),
    Planted(
        "connections_are_as_meant", "NetworkPolicy/default-deny", "spec.policyTypes", ["Egress"], "reach port any of"
    ),
    Planted(
        "connections_are_as_meant",
        "NetworkPolicy/fetch-model",
        "spec.egress.0.to.0.ipBlock.except",
        ["172.16.0.0/12"],
        "Job/fetch-model can reach",
    ),
    # what the programs make of it
    Planted("configurations_load", CONFIG, FILE, replace("kv_cache_memory", "kv_cache"), "unknown key"),
    Planted("configurations_load", CONFIG, FILE, replace("grpc://experts-a", "experts-a"), "grpc://HOST:PORT"),
    Planted("configurations_load", GATEWAY, f"{CONTAINER}.args", add("--metrics"), "unrecognized arguments"),
    Planted("configurations_load", GATEWAY, f"{CONTAINER}.args.1", "/etc/consilium.yaml", "cannot read"),
    Planted(
        "configurations_load", EXPERTS, f"{CONTAINER}.env", variable("CONSILIUM_WORKER__EXPERT", "0"), "unknown key"
    ),
    Planted("configurations_load", GATEWAY, f"{CONTAINER}.command.1", "serve", "no container runs `consilium gateway`"),
    Planted("service_links_are_off", EXPERTS, f"{POD}.enableServiceLinks", REMOVED, "enableServiceLinks"),
    Planted("ports_are_the_configured_ones", CONFIG, FILE, replace("  host: 0.0.0.0\n", ""), "listens on 127.0.0.1"),
    Planted("ports_are_the_configured_ones", CONFIG, FILE, replace("metrics_port: 9100", "metrics_port: 9"), "9100"),
    Planted("ports_are_the_configured_ones", GATEWAY, f"{CONTAINER}.ports.0.containerPort", 8080, "8080"),
    Planted("endpoints_are_headless_services", CONFIG, FILE, replace("//experts-a:", "//experts-c:"), "no Service"),
    Planted(
        "endpoints_are_headless_services", CONFIG, FILE, replace("experts-a:50051", "experts-a:5005"), "no such port"
    ),
    Planted("endpoints_are_headless_services", CONFIG, FILE, replace("//experts-a:", "//experts-b:"), "leads to"),
    Planted("endpoints_are_headless_services", "Service/experts-a", "spec.clusterIP", REMOVED, "not headless"),
    Planted("every_worker_belongs_to_a_group", CONFIG, FILE, replace("  experts-a:", "  experts-x:"), "not under"),
    Planted(
        "every_expert_has_a_worker", EXPERTS, f"{CONTAINER}.env", variable("CONSILIUM_WORKER__LAYERS", "0-9"), "layers"
    ),
    Planted("every_expert_has_a_worker", EXPERTS, f"{CONTAINER}.env.5.value", "0-6", "no worker holds the experts [7]"),
    Planted("every_expert_has_a_worker", EXPERTS, f"{CONTAINER}.env.5.value", "0-16", "out of range"),
    # how pods run
    Planted("images_are_pinned", GATEWAY, f"{CONTAINER}.image", "consilium/gateway", "no tag of its own"),
    Planted("images_are_pinned", EXPERTS, f"{POD}.initContainers.0.image", "r:5000/expert:latest", "wait-for-model"),
    Planted("images_are_pinned", REDIS, f"{CONTAINER}.image", REMOVED, "no tag of its own"),
    Planted("pods_are_unprivileged", REDIS, f"{POD}.automountServiceAccountToken", REMOVED, "token"),
    Planted("pods_are_unprivileged", GATEWAY, f"{POD}.securityContext.runAsUser", 0, "root"),
    Planted("pods_are_unprivileged", GATEWAY, f"{POD}.securityContext.seccompProfile", REMOVED, "seccomp"),
    Planted(
        "pods_are_unprivileged", EXPERTS, f"{CONTAINER}.securityContext", REMOVED, "securityContext of expert is {}"
    ),
    Planted(
        "pods_are_unprivileged", EXPERTS, f"{CONTAINER}.securityContext.readOnlyRootFilesystem", False, "of expert is"
    ),
    Planted("pods_are_unprivileged", "Job/fetch-model", f"{CONTAINER}.securityContext", REMOVED, "of fetch is {}"),
    Planted("resources_are_stated", GATEWAY, f"{CONTAINER}.resources", REMOVED, "does not state"),
    Planted("resources_are_stated", EXPERTS, f"{POD}.initContainers.0.resources", {}, "wait-for-model"),
    Planted("resources_are_stated", EXPERTS, f"{CONTAINER}.resources.requests.memory", "9Gi", "requests more memory"),
    Planted("probes_ask_open_ports", REDIS, f"{CONTAINER}.livenessProbe", REMOVED, "has no livenessProbe"),
    Planted("probes_ask_open_ports", GATEWAY, f"{CONTAINER}.readinessProbe.httpGet.port", "web", "asks port web"),
    Planted("probes_ask_open_ports", EXPERTS, f"{CONTAINER}.startupProbe.grpc.port", 50052, "asks port 50052"),
    Planted("probes_ask_the_right_question", GATEWAY, f"{CONTAINER}.livenessProbe.httpGet.path", "/ready", "/ready"),
    Planted(
        "probes_ask_the_right_question",
        EXPERTS,
        f"{CONTAINER}.livenessProbe.grpc.service",
        "expert.v1.ExpertService",
        "livenessProbe asks",
    ),
    Planted(
        "probes_ask_the_right_question", EXPERTS, f"{CONTAINER}.readinessProbe.grpc.service", "expert", "readinessProbe"
    ),
    Planted("probes_ask_the_right_question", EXPERTS, f"{CONTAINER}.startupProbe.failureThreshold", 3, "gives up"),
    Planted("probes_ask_the_right_question", EXPERTS, f"{CONTAINER}.livenessProbe.failureThreshold", 1, "as dead"),
    Planted(
        "routers_are_found", CONFIG, FILE, replace("grpc://router:50050", "grpc://router:50051"), "not lead to the"
    ),
    Planted("routers_are_found", "Service/router", "metadata.name", "control", "does not lead to the router"),
    Planted("tokens_are_mounted", "Deployment/router", f"{POD}.volumes.2.secret.secretName", "gateway-token", "worker"),
    Planted(
        "tokens_are_mounted",
        EXPERTS,
        f"{CONTAINER}.env",
        variable("CONSILIUM_TOKENS__GATEWAY_FILE", "/tokens/gateway/token"),
        "needs ['worker']",
    ),
    Planted("pods_may_finish_draining", GATEWAY, f"{POD}.terminationGracePeriodSeconds", REMOVED, "killed after 30 s"),
    Planted("pods_may_finish_draining", CONFIG, FILE, replace("drain_timeout: 15s", "drain_timeout: 1m"), "need 66 s"),
    Planted("pods_may_finish_draining", EXPERTS, f"{CONTAINER}.lifecycle.preStop.sleep.seconds", 14, "need 30 s"),
    Planted("pods_may_finish_draining", GATEWAY, f"{CONTAINER}.lifecycle", REMOVED, "no preStop pause"),
    Planted("rollouts_never_lack_an_expert", EXPERTS, "spec.minReadySeconds", 30, "need 35 s"),
    Planted("rollouts_never_lack_an_expert", GATEWAY, "spec.strategy.rollingUpdate", REMOVED, "take a replica away"),
    Planted("memory_suffices", CONFIG, FILE, replace("kv_cache_memory: 1GiB", "kv_cache_memory: 8GiB"), "its limit"),
    Planted(
        "memory_suffices", EXPERTS, f"{CONTAINER}.env", variable("CONSILIUM_WORKER__MAX_FRAME", "1GiB"), "6784 MiB"
    ),
    Planted(
        "threads_follow_the_cpu_limit", EXPERTS, f"{CONTAINER}.env", drop("name", "CONSILIUM_WORKER__THREADS"), "None"
    ),
    Planted(
        "threads_follow_the_cpu_limit",
        GATEWAY,
        f"{CONTAINER}.args",
        lambda old: [*old, "--threads", "16"],
        "16 threads",
    ),
    # how many there are
    Planted("budgets_leave_room", "PodDisruptionBudget/gateway", "spec.minAvailable", 2, "2 of 2 replicas must stay"),
    Planted("budgets_leave_room", "PodDisruptionBudget/gateway", "spec.maxUnavailable", 0, "2 of 2 replicas must stay"),
    Planted("budgets_leave_room", "PodDisruptionBudget/gateway", "spec.maxUnavailable", 2, "evicted at once"),
    Planted("budgets_leave_room", "PodDisruptionBudget/gateway", "spec.maxUnavailable", "50%", "state numbers"),
    Planted("budgets_leave_room", "PodDisruptionBudget/experts-a", "spec.selector.matchLabels", {"a": "b"}, "0 workl"),
    Planted(
        "replicas_have_a_budget", "PodDisruptionBudget/gateway", "spec.selector.matchLabels", {"a": "b"}, "gateway"
    ),
    Planted("replicas_spread", EXPERTS, f"{POD}.topologySpreadConstraints.1", REMOVED, "does not spread"),
    Planted(
        "spreads_count_their_own_pods",
        EXPERTS,
        f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels",
        {_NAME: "expert"},
        "not exactly its own",
    ),
    Planted(
        "autoscalers_own_their_target", _SCALER, "spec.scaleTargetRef.name", "expert-a", "no Deployment 'expert-a'"
    ),
    Planted("autoscalers_own_their_target", _SCALER, "spec.scaleTargetRef.name", "gateway", "several autoscalers"),
    Planted("autoscalers_own_their_target", _SCALER, "spec.minReplicaCount", 0, "from 0 to 8"),
    Planted("autoscalers_own_their_target", _SCALER, "spec.maxReplicaCount", 1, "from 2 to 1"),
    Planted("autoscalers_own_their_target", EXPERTS, "spec.replicas", 2, "every apply would undo"),
    Planted("queries_are_about_this_cluster", _SCALER, f"{_TRIGGER}.query", replace("experts-a", "experts-b"), "group"),
    Planted("queries_are_about_this_cluster", _SCALER, f"{_TRIGGER}.query", replace('consilium"', 'x"'), "namespace"),
    Planted("queries_name_metrics_that_exist", _SCALER, f"{_TRIGGER}.query", replace("busy", "compute"), "no service"),
    # what is stored
    Planted("weights_are_read_only", GATEWAY, f"{CONTAINER}.volumeMounts.1.readOnly", REMOVED, "may write"),
    Planted("a_job_fetches_the_model", "Job/fetch-model", f"{CONTAINER}.env.0.value", "/cache", "nothing puts"),
    Planted(
        "a_job_fetches_the_model",
        "Job/fetch-model",
        f"{POD}.volumes.0.persistentVolumeClaim.claimName",
        "scratch",
        "nothing puts",
    ),
    Planted(
        "volumes_can_be_shared", "PersistentVolumeClaim/weights", "spec.accessModes", ["ReadWriteOnce"], "several nodes"
    ),
    Planted("redis_is_a_cache", REDIS, f"{CONTAINER}.args.2", "3gb", "leaves no room"),
    Planted("redis_is_a_cache", _REDIS_CONFIG, _REDIS_FILE, replace("allkeys-lfu", "noeviction"), "noeviction"),
    Planted("redis_is_a_cache", _REDIS_CONFIG, _REDIS_FILE, replace('save ""', "save 60 1"), "save is 60 1"),
    Planted("redis_is_a_cache", _REDIS_CONFIG, _REDIS_FILE, replace("aclfile", "# aclfile"), "no aclfile"),
    Planted("gateways_reach_their_cache", "Service/redis", "spec.ports.0.port", 6380, "no Service's port"),
    Planted(
        "gateways_reach_their_cache",
        REDIS,
        f"{POD}.initContainers.0.args.0",
        replace("user consilium", "user cache"),
        "names the user 'consilium'",
    ),
    # custom resources
    Planted("custom_resources_are_valid", _SCALER, "spec.minReplicas", 2, "unknown field spec.minReplicas"),
    Planted("custom_resources_are_valid", _SCALER, "spec.scaleTargetRef", {"kind": "Deployment"}, "name"),
    Planted("custom_resources_are_valid", _SCALER, "spec.pollingInterval", "15s", "pollingInterval"),
    Planted("custom_resources_are_valid", "PodMonitor/expert", "spec.endpoints", [], "unknown field spec.endpoints"),
    Planted("custom_resources_are_valid", "PodMonitor/expert", "spec.selector", REMOVED, "selector"),
    Planted("triggers_are_valid", _SCALER, f"{_TRIGGER}.thresold", "1", "thresold"),
    Planted("triggers_are_valid", _SCALER, f"{_TRIGGER}.ignoreNullValues", "true", "would scale down"),
    Planted("triggers_are_valid", _SCALER, "spec.triggers.0.metricType", "Value", "does not divide"),
    Planted("triggers_are_valid", _SCALER, f"{_TRIGGER}.threshold", "0", "threshold 0"),
)
