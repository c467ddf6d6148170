"""The overview: is it well, what do requests wait for, what does the engine do."""

from __future__ import annotations

from deploy.grafana.cache import CACHE
from deploy.grafana.panels import MODEL, Panel, Query, Row, quantiles, stat, total

OVERVIEW = [
    Row(
        "Now",
        [
            stat("Ready gateways", "Gateways that take requests.", f"sum(consilium_ready{{{MODEL}}})"),
            stat(
                "Missing experts",
                "(layer, expert) pairs on no worker; requests that need one fail.",
                f"max(consilium_missing_experts{{{MODEL}}})",
                warn=1,
            ),
            stat(
                "Workers not reached",
                "Workers that the endpoints name and no gateway reaches.",
                f"sum(consilium:group_workers:known{{{MODEL}}}) - sum(consilium:group_workers:connected{{{MODEL}}})",
                warn=1,
            ),
            stat(
                "Failing requests",
                "Share of the last five minutes' requests that this side could not serve.",
                f"max(consilium:request_failures:ratio5m{{{MODEL}}})",
                "percentunit",
                warn=0.05,
            ),
            stat(
                "First token, p95",
                "Over the last five minutes.",
                f"max(consilium:time_to_first_token_seconds:p95_5m{{{MODEL}}})",
                "s",
                warn=10,
            ),
            stat(
                "Workers left alone",
                "For their failures or wrong numbers: connected, and asked for nothing that others hold.",
                f"sum(max by (group, worker) (consilium_worker_ejected{{{MODEL}}}))",
                warn=1,
            ),
            stat(
                "Wrong frames",
                "Frames of the last hour that an audit found wrong. Which worker it was is on the experts dashboard.",
                f"sum(increase(consilium_worker_lies_total{{{MODEL}}}[1h]))",
                warn=0.5,
            ),
            stat(
                "Load of the busiest worker",
                "Against the even share: 1 is balanced.",
                f"max(consilium:worker_load:ratio1m{{{MODEL}}})",
                warn=2,
            ),
        ],
    ),
    Row(
        "Requests",
        [
            Panel(
                "HTTP answers",
                "By route and status; probes included.",
                [Query(total("consilium_http_requests_total", MODEL, "route, status"), "{{route}} {{status}}")],
                "reqps",
            ),
            Panel(
                "Choices that ended well",
                "By why they ended.",
                [Query(total("consilium_request_success_total", MODEL, "finished_reason"), "{{finished_reason}}")],
                "reqps",
            ),
            Panel(
                "Requests that failed",
                "By error; also those that failed in the middle of a stream, whose status was 200.",
                [Query(total("consilium_request_failure_total", MODEL, "error"), "{{error}}")],
                "reqps",
            ),
            Panel(
                "Time to first token",
                "From the request's arrival.",
                quantiles("consilium_time_to_first_token_seconds", MODEL, 0.5, 0.95, 0.99),
                "s",
            ),
            Panel(
                "Time between tokens",
                "Of one choice.",
                quantiles("consilium_inter_token_latency_seconds", MODEL, 0.5, 0.95, 0.99),
                "s",
            ),
            Panel(
                "Time of a request, by phase",
                "Means of queue, prefill and decode.",
                [
                    Query(
                        f"{total(f'consilium_request_{phase}_time_seconds_sum', MODEL)}"
                        f" / {total(f'consilium_request_{phase}_time_seconds_count', MODEL)}",
                        phase,
                    )
                    for phase in ("queue", "prefill", "decode")
                ],
                "s",
                stacked=True,
            ),
        ],
    ),
    Row(
        "Engine",
        [
            Panel(
                "Tokens a second",
                "Prompt tokens taken in, and tokens generated.",
                [
                    Query(total("consilium_prompt_tokens_total", MODEL), "prompt"),
                    Query(total("consilium_generation_tokens_total", MODEL), "generated"),
                ],
            ),
            Panel(
                "Sequences",
                "In the batch, and waiting for space.",
                [
                    Query(f"sum(consilium_num_requests_running{{{MODEL}}})", "running"),
                    Query(f"sum(consilium_num_requests_waiting{{{MODEL}}})", "waiting"),
                ],
            ),
            Panel(
                "KV cache",
                "Share in use; near 1 sequences wait or are preempted. What the prefix cache keeps is free.",
                [Query(f"consilium_kv_cache_usage_perc{{{MODEL}}}", "{{instance}}")],
                "percentunit",
                maximum=1,
            ),
            Panel(
                "Time of a step",
                "One pass of the model over the batch.",
                quantiles("consilium_iteration_seconds", MODEL, 0.5, 0.95),
                "s",
            ),
            Panel(
                "Where a step's time goes",
                "Seconds a second of the engine's thread; wire, queue and compute are waits for workers.",
                [Query(total("consilium_engine_stage_seconds_total", MODEL, "stage"), "{{stage}}")],
                "s",
            ),
            Panel(
                "Tokens in a step",
                "Mean.",
                [
                    Query(
                        f"{total('consilium_iteration_tokens_sum', MODEL)}"
                        f" / {total('consilium_iteration_tokens_count', MODEL)}",
                        "tokens",
                    )
                ],
            ),
            Panel(
                "Preemptions",
                "Sequences that gave up their space for others.",
                [Query(total("consilium_num_preemptions_total", MODEL, "instance"), "{{instance}}")],
            ),
            Panel(
                "Prefix cache",
                "Share of the prompts' tokens that were found and not computed.",
                [
                    Query(
                        f"{total('consilium_prefix_cache_hits_total', MODEL)}"
                        f" / {total('consilium_prefix_cache_queries_total', MODEL)}",
                        "hits",
                    )
                ],
                "percentunit",
                maximum=1,
            ),
            Panel(
                "Tokens kept for prompts that begin alike",
                "They count as free: whoever needs their space evicts them.",
                [
                    Query(f"sum(consilium_prefix_cache_tokens{{{MODEL}}})", "kept"),
                    Query(
                        f"sum(increase(consilium_prefix_cache_evicted_tokens_total{{{MODEL}}}[$__rate_interval]))",
                        "evicted",
                    ),
                ],
            ),
        ],
    ),
    CACHE,
    Row(
        "Processes",
        [
            Panel(
                "CPU cores in use",
                "Of the gateways' two processes, and of the workers.",
                [
                    Query('rate(process_cpu_seconds_total{job=~"consilium-.*"}[$__rate_interval])', "{{instance}}"),
                    Query("rate(consilium_engine_process_cpu_seconds_total[$__rate_interval])", "{{instance}} engine"),
                ],
                width=12,
            ),
            Panel(
                "Resident memory",
                "Of the same processes.",
                [
                    Query('process_resident_memory_bytes{job=~"consilium-.*"}', "{{instance}}"),
                    Query("consilium_engine_process_resident_memory_bytes", "{{instance}} engine"),
                ],
                "bytes",
                width=12,
            ),
        ],
    ),
]
