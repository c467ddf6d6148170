"""The expert-output cache; these panels stay empty where none is configured."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, Panel, Query, Row, total

_HITS, _MISSES = (total(f"consilium_cache_{each}_total", MODEL, "tier") for each in ("hits", "misses"))
_SECONDS, _LOOKUPS = (total(f"consilium_cache_{each}_total", MODEL, "tier") for each in ("lookup_seconds", "lookups"))

CACHE = Row(
    "Expert-output cache",
    [
        Panel(
            "Hits",
            "Share of the rows asked for that were found, in memory and then in Redis. Rows found go to no worker.",
            [Query(f"{_HITS} / ({_HITS} + {_MISSES})", "{{tier}}")],
            "percentunit",
            maximum=1,
        ),
        Panel(
            "Time of a lookup",
            "Mean; one lookup for a layer and step.",
            [Query(f"{_SECONDS} / {_LOOKUPS}", "{{tier}}")],
            "s",
        ),
        Panel(
            "Memory",
            "Bytes of the rows in the gateways, and the most there may be.",
            [
                Query(f"sum(consilium_cache_bytes{{{MODEL}}})", "in use"),
                Query(f"sum(consilium_cache_capacity_bytes{{{MODEL}}})", "most"),
            ],
            "bytes",
        ),
        Panel(
            "Rows",
            "Written to Redis; not written, because the breaker was open or too many waited; and put out of memory.",
            [
                Query(total("consilium_cache_written_rows_total", MODEL), "written"),
                Query(total("consilium_cache_dropped_rows_total", MODEL), "not written"),
                Query(total("consilium_cache_evictions_total", MODEL), "put out"),
            ],
        ),
        Panel(
            "Errors of Redis",
            "By operation and kind; each counts as a miss, no request fails.",
            [Query(total("consilium_cache_errors_total", MODEL, "operation, kind"), "{{operation}} {{kind}}")],
        ),
        Panel(
            "Breakers that are open",
            "Gateways that do not ask Redis at the moment, because it failed.",
            [Query(f'sum by (operation) (consilium_cache_breaker{{{MODEL}, state="open"}})', "{{operation}}")],
        ),
    ],
)
