"""What `consilium up` would run: pure functions of its flags and the configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.config import load_config
from consilium.cores import usable_cores
from consilium.errors import ConfigError
from consilium.local_stack import (
    assign_experts,
    gateway_command,
    plan_workers,
    ranges,
    thread_environment,
    worker_command,
)

SKETCH = {
    "experts": {
        "vision": {"endpoint": "grpc://vision-expert:50051", "max_batch": 32},
        "language": {"endpoint": "grpc://language-expert:50051", "timeout": "500ms"},
    }
}


@given(st.data())
def test_every_expert_has_its_copies_and_no_worker_two_of_one(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 40))
    replicas = data.draw(st.integers(1, 6))
    workers = data.draw(st.integers(replicas, max(replicas, min(12, experts * replicas))))
    held = assign_experts(experts, workers, replicas)
    assert len(held) == workers
    assert Counter(expert for each in held for expert in each) == dict.fromkeys(range(experts), replicas)
    assert all(each == sorted(set(each)) for each in held)
    sizes = [len(each) for each in held]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_experts_are_split_into_neighbours() -> None:
    assert assign_experts(4, 2, 1) == [[0, 1], [2, 3]]
    assert assign_experts(5, 2, 1) == [[0, 1], [2, 3, 4]]
    assert assign_experts(4, 3, 2) == [[0, 1], [0, 2, 3], [1, 2, 3]]


def test_numbers_that_cannot_be_met_say_which_can() -> None:
    with pytest.raises(ConfigError, match=r"--replicas 3: 2 workers can hold at most 2 copies; use --workers 3"):
        assign_experts(4, 2, 3)
    with pytest.raises(ConfigError, match=r"--workers 9: there are only 8 .* use --workers 8"):
        assign_experts(4, 9, 2)


def test_groups_of_the_file_share_the_workers() -> None:
    config = load_config(environ={}, overrides=SKETCH)
    planned = plan_workers(config, experts=4, workers=3, replicas=1, cores=8)
    assert [(worker.name, worker.group, worker.experts, worker.threads) for worker in planned] == [
        ("worker-0", "vision", [0], 2),
        ("worker-1", "vision", [1], 2),
        ("worker-2", "language", [2, 3], 2),
    ]
    with pytest.raises(ConfigError, match=r"2 groups \(vision, language\).* use --workers 2"):
        plan_workers(config, experts=4, workers=1, replicas=1, cores=8)


def test_commands_name_every_address_under_its_group() -> None:
    config = load_config(environ={}, overrides={"gateway.host": "0.0.0.0", "gateway.port": 9000})
    worker = plan_workers(config, experts=6, workers=2, replicas=1, cores=1)[1]
    command = worker_command(worker, ["--model", "m"])
    assert command[1:5] == ["-m", "expert_service", "--model", "m"]
    pairs = dict(zip(command[5::2], command[6::2], strict=True))
    assert (pairs["--group"], pairs["--layers"], pairs["--experts"]) == ("experts", "all", "3,4,5")
    assert (pairs["--host"], pairs["--port"], pairs["--threads"]) == ("127.0.0.1", "0", "1")
    assert "--metrics-port" not in pairs
    command = worker_command(worker, ["--model", "m"], metrics=True)
    assert command[command.index("--metrics-port") + 1] == "0"  # they cannot all have the configured one
    command = gateway_command(config, [("a", "grpc://127.0.0.1:1"), ("a", "grpc://127.0.0.1:2")], 4, ["--model", "m"])
    assert command[-4:] == ["--group-endpoint", "a=grpc://127.0.0.1:1", "--group-endpoint", "a=grpc://127.0.0.1:2"]
    assert command[5:11] == ["--host", "0.0.0.0", "--port", "9000", "--threads", "4"]


def test_waiting_threads_leave_the_cores_to_others() -> None:
    environment = thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_ranges_read_as_people_write_them() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([4]) == "4"


def test_a_container_quota_limits_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    without = usable_cores(tmp_path / "missing")
    quota.write_text("max 100000\n")
    assert usable_cores(quota) == without
    quota.write_text("150000 100000\n")
    assert usable_cores(quota) == 1
    quota.write_text("50000 100000\n")
    assert usable_cores(quota) == 1
    quota.write_text("99999900000 100000\n")
    assert usable_cores(quota) == without
