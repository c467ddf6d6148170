"""All rules, in the order in which their problems are easiest to understand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.system.kubernetes import configuration, custom_resources, network, operation, scaling, storage, wiring
from tests.system.kubernetes.manifests import Cluster

Rule = Callable[[Cluster], Iterator[str]]

RULES: tuple[Rule, ...] = (
    wiring.namespaces_agree,
    wiring.names_are_unique,
    wiring.workloads_select_their_own_pods,
    wiring.services_reach_ports,
    wiring.references_resolve,
    wiring.generated_objects_are_used,
    wiring.monitors_find_ports,
    wiring.monitors_name_jobs_as_the_alerts_do,
    wiring.policies_select_pods,
    network.connections_are_as_meant,
    configuration.configurations_load,
    configuration.service_links_are_off,
    configuration.ports_are_the_configured_ones,
    configuration.routers_are_found,
    configuration.tokens_are_mounted,
    configuration.endpoints_are_headless_services,
    configuration.every_worker_belongs_to_a_group,
    configuration.every_expert_has_a_worker,
    operation.images_are_pinned,
    operation.pods_are_unprivileged,
    operation.resources_are_stated,
    operation.probes_ask_open_ports,
    operation.probes_ask_the_right_question,
    operation.pods_may_finish_draining,
    operation.rollouts_never_lack_an_expert,
    operation.memory_suffices,
    operation.threads_follow_the_cpu_limit,
    scaling.budgets_leave_room,
    scaling.replicas_have_a_budget,
    scaling.replicas_spread,
    scaling.spreads_count_their_own_pods,
    scaling.autoscalers_own_their_target,
    scaling.queries_are_about_this_cluster,
    scaling.queries_name_metrics_that_exist,
    storage.weights_are_read_only,
    storage.a_job_fetches_the_model,
    storage.volumes_can_be_shared,
    storage.redis_is_a_cache,
    storage.gateways_reach_their_cache,
    custom_resources.custom_resources_are_valid,
    custom_resources.triggers_are_valid,
)


def problems(cluster: Cluster) -> list[str]:
    """What all rules find: rule, then problem."""
    return [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(cluster)]
