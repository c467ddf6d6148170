"""The experts: who computes how much, how fast, and how well it is shared out."""

from __future__ import annotations

from deploy.grafana.panels import GROUP, MODEL, Panel, Query, Row, quantiles, total


def frame_time(part: str) -> Query:
    """The mean time of one part of a frame's way."""
    seconds = total(f"consilium_worker_{part}_seconds_total", GROUP, "group")
    return Query(f"{seconds} / {total('consilium_worker_frames_total', GROUP, 'group')}", f"{{{{group}}}} {part}")


EXPERTS = [
    Row(
        "Balance",
        [
            Panel(
                "Load of each worker against the even share",
                "1 is balanced. A layer waits for its busiest worker.",
                [Query(f"consilium:worker_load:ratio1m{{{GROUP}}}", "{{group}} {{worker}}")],
            ),
            Panel(
                "Load of each group against the even share",
                "What one worker of the group has on average; a group at 2 wants twice the replicas.",
                [Query(f"consilium:group_load:ratio1m{{{GROUP}}}", "{{group}}")],
            ),
            Panel(
                "Busy fraction",
                "Of each group's compute threads.",
                [Query(f"consilium:group_busy:ratio1m{{{GROUP}}}", "{{group}}")],
                "percentunit",
                maximum=1,
            ),
        ],
    ),
    Row(
        "Workers as the gateways see them",
        [
            Panel(
                "Workers that are reached",
                "By group.",
                [Query(f"consilium:group_workers:connected{{{GROUP}}}", "{{group}}")],
            ),
            Panel(
                "Rows a second",
                "(token, expert) pairs computed.",
                [Query(total("consilium_worker_rows_total", GROUP, "group, worker"), "{{group}} {{worker}}")],
            ),
            Panel(
                "Frames a second",
                "One per worker, layer and step.",
                [Query(total("consilium_worker_frames_total", GROUP, "group, worker"), "{{group}} {{worker}}")],
            ),
            Panel(
                "A frame's way",
                "Mean seconds in the worker's queue, computing, and on the wire with all that is around it.",
                [frame_time("queue"), frame_time("compute"), frame_time("wire")],
                "s",
                stacked=True,
            ),
            Panel(
                "Rows of one expert in one frame",
                "Few rows mean that reading the weights is the cost.",
                quantiles("consilium_worker_expert_call_rows", GROUP, 0.5, 0.95, by="group"),
            ),
            Panel(
                "Failures and failovers",
                "Frames that failed, and frames that a worker got in place of another.",
                [
                    Query(total("consilium_worker_failures_total", GROUP, "group, worker"), "failed {{worker}}"),
                    Query(total("consilium_worker_failovers_total", GROUP, "group, worker"), "taken over {{worker}}"),
                ],
            ),
            Panel(
                "Late frames and hedges",
                "Frames that another worker answered first, and frames that a worker got because another was late.",
                [
                    Query(total("consilium_worker_late_total", GROUP, "group, worker"), "late {{worker}}"),
                    Query(total("consilium_worker_hedges_total", GROUP, "group, worker"), "hedged {{worker}}"),
                ],
            ),
            Panel(
                "Audits and lies",
                "Frames computed only to be compared, and frames found wrong. Whoever lied gets nothing until it is "
                "started anew.",
                [
                    Query(total("consilium_worker_audits_total", GROUP, "group, worker"), "audited {{worker}}"),
                    Query(total("consilium_worker_lies_total", GROUP, "group, worker"), "lied {{worker}}"),
                ],
            ),
            Panel(
                "Ejected workers",
                "Gateways that leave a worker alone for its failures or its lies, and the ejections for failures since "
                "they started.",
                [
                    Query(f"sum by (group, worker) (consilium_worker_ejected{{{GROUP}}})", "left alone {{worker}}"),
                    Query(
                        f"sum by (group, worker) (consilium_worker_ejections_total{{{GROUP}}})", "ejections {{worker}}"
                    ),
                ],
            ),
            Panel(
                "Bytes a second",
                "Frames sent to workers, and their replies.",
                [
                    Query(total("consilium_worker_sent_bytes_total", GROUP, "group"), "{{group}} sent"),
                    Query(total("consilium_worker_received_bytes_total", GROUP, "group"), "{{group}} received"),
                ],
                "Bps",
            ),
            Panel(
                "Experts held",
                "(layer, expert) pairs of each worker.",
                [Query(f"max by (group, worker) (consilium_worker_experts{{{GROUP}}})", "{{group}} {{worker}}")],
            ),
            Panel(
                "Replies are of these numerics",
                "Workers by numerics class and version. More than one class: bits may change on a failover.",
                [
                    Query(
                        f"count by (numerics_class, version) (consilium_expert_service_info{{{GROUP}}})",
                        "{{numerics_class}} {{version}}",
                    )
                ],
                kind="stat",
            ),
        ],
    ),
    Row(
        "Workers by their own account",
        [
            Panel(
                "Calls by outcome",
                "gRPC's codes in small letters.",
                [
                    Query(
                        total("consilium_expert_service_calls_total", GROUP, "group, outcome"),
                        "{{group}} {{outcome}}",
                    )
                ],
            ),
            Panel(
                "Time in the queue",
                "From a call's arrival to the begin of its computing.",
                quantiles("consilium_expert_service_queue_seconds", GROUP, 0.5, 0.95, by="group"),
                "s",
            ),
            Panel(
                "Compute time",
                "Of one call.",
                quantiles("consilium_expert_service_compute_seconds", GROUP, 0.5, 0.95, by="group"),
                "s",
            ),
            Panel(
                "Calls in flight",
                "Waiting or computed; full queues refuse with RESOURCE_EXHAUSTED.",
                [Query(f"consilium_expert_service_calls_in_flight{{{GROUP}}}", "{{group}} {{instance}}")],
            ),
            Panel(
                "Rows of a compute batch",
                "Mean; calls are cut at the group's max_batch.",
                [
                    Query(
                        f"{total('consilium_expert_service_rows_total', GROUP, 'group')}"
                        f" / {total('consilium_expert_service_compute_batches_total', GROUP, 'group')}",
                        "{{group}}",
                    )
                ],
            ),
            Panel(
                "Weights held",
                "By each worker; with a memory limit on disk, too.",
                [Query(f"consilium_expert_service_weights_bytes{{{GROUP}}}", "{{group}} {{instance}}")],
                "bytes",
            ),
            Panel(
                "Experts found in memory",
                "Of those that calls asked for. Below 1 only with worker.memory_limit: the rest was read from disk.",
                [
                    Query(
                        f"{total('consilium_expert_service_memory_hits_total', GROUP, 'group')}"
                        f" / ({total('consilium_expert_service_memory_hits_total', GROUP, 'group')}"
                        f" + {total('consilium_expert_service_memory_misses_total', GROUP, 'group')})",
                        "{{group}}",
                    )
                ],
                "percentunit",
                maximum=1,
            ),
            Panel(
                "Experts read from disk",
                "Bytes a second, for want of memory.",
                [Query(total("consilium_expert_service_memory_read_bytes_total", GROUP, "group"), "{{group}}")],
                "Bps",
            ),
        ],
    ),
    Row(
        "The router",
        [
            Panel(
                "Workers with a lease",
                "All, those that are leaving, and those that could not load something.",
                [Query(f"max by (state) (consilium_router_workers{{{MODEL}}})", "{{state}}")],
            ),
            Panel(
                "Balance",
                "Busiest worker over the mean in the worst layer, as the router knows it; 0 while there is no load.",
                [Query(f"max(consilium_router_balance{{{MODEL}}})", "busiest/mean")],
            ),
            Panel(
                "Copies loaded and dropped",
                "Since the router started.",
                [
                    Query(f"sum(consilium_router_loads_total{{{MODEL}}})", "loaded"),
                    Query(f"sum(consilium_router_drops_total{{{MODEL}}})", "dropped"),
                ],
            ),
            Panel(
                "Copies, and experts without any",
                "(layer, expert) pairs that gateways may ask for; every copy counts.",
                [
                    Query(f"max(consilium_router_copies{{{MODEL}}})", "copies"),
                    Query(f"max(consilium_router_missing_experts{{{MODEL}}})", "missing"),
                ],
            ),
            Panel(
                "Changes of the placement in a minute",
                "Epochs. Many of them for long: something keeps coming and going.",
                [Query(f"max(delta(consilium_router_epoch{{{MODEL}}}[1m]))", "epochs")],
            ),
            Panel(
                "Gateways",
                "That were heard of, and those that still use an older placement.",
                [
                    Query(f"max(consilium_router_gateways{{{MODEL}}})", "all"),
                    Query(f"max(consilium_router_gateways_behind{{{MODEL}}})", "behind"),
                ],
            ),
        ],
    ),
    Row(
        "Single experts",
        [
            Panel(
                "Busiest experts",
                "Rows a second of the twenty (layer, expert) pairs that had most since the start, or of all where "
                "gateway.metrics_all_experts is set. GET /load/experts has every one.",
                [
                    Query(
                        f"topk(20, {total('consilium_expert_rows_total', MODEL, 'layer, expert')})",
                        "{{layer}}/{{expert}}",
                    )
                ],
                kind="bargauge",
                width=24,
            ),
        ],
    ),
]
