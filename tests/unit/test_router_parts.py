"""What a router takes and refuses, how it counts load, and who may call what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from consilium.config import Config, TokensConfig, load_config
from consilium.errors import ConfigError, InvalidRequest
from consilium.tokens import is_loopback, read_token, token_digest
from expert_service.tokens import Tokens
from protos.router.v1 import router_pb2
from protos.tensor.v1 import tensor_pb2
from router_service.load import DecayedLoad, enough, pack, total
from router_service.placement import Demand, Policy, WorkerSpec, place
from router_service.server import read_tokens
from tests.router_workers import DEPLOYMENT, layer_experts, record, worker

WORD = "0123456789abcdef"


def test_a_worker_that_fits_is_taken() -> None:
    DEPLOYMENT.check(record("a", [(0, 1)]), [record("b", [(0, 1), (1, 1)])])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"protocol_version": 99}, "protocol version is 99"),
        ({"model_fingerprint": "e" * 64}, "model fingerprint is eeee"),
        ({"quantization": "none"}, "quantization is none, this deployment's is int8"),
        ({"row_dtype": tensor_pb2.DTYPE_FLOAT32}, "dtype is DTYPE_FLOAT32, this deployment's is DTYPE_BFLOAT16"),
        ({"hidden_size": 32}, "hidden size is 32"),
        ({"numerics_class": "float-avx2"}, "numerics class is float-avx2, the others' is int8-v1"),
    ],
)
def test_a_worker_that_does_not_fit_is_told_why(said: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DEPLOYMENT.check(router_pb2.WorkerRecord(worker=worker("a", **said)), [record("b")])


def test_other_weights_are_refused_by_the_expert() -> None:
    other = router_pb2.WorkerRecord(worker=worker("a"), held=layer_experts([(0, 1), (1, 2)], content="x"))
    with pytest.raises(ConfigError, match=r"expert 1 of layer 0 have the hash .* those of b:1"):
        DEPLOYMENT.check(other, [record("b", [(0, 1)])])
    DEPLOYMENT.check(other, [record("b", [(0, 3)])])


def test_messages_that_make_no_sense_are_refused() -> None:
    impossible = [record("a", [(0, 4)]), record("a", [(7, 0)])]
    short = record("a", [(0, 0)])
    short.held[0].hashes[0] = b"short"
    nameless, homeless = record(""), record("a")
    homeless.worker.address = "grpc://a:1"
    for each in (*impossible, short, nameless, homeless):
        with pytest.raises(InvalidRequest):
            DEPLOYMENT.check(each, [])


def counts(rows: list[int], layer: int = 0) -> router_pb2.ReportLoadRequest:
    return router_pb2.ReportLoadRequest(
        interval_ms=1000, layers=[router_pb2.LayerCounts(layer=layer, rows=rows, reads=[1] * len(rows))]
    )


def test_a_constant_load_becomes_its_rate_and_fades() -> None:
    now = 0.0
    load = DecayedLoad([0, 1], 4, 10.0, lambda: now)
    for _ in range(200):
        now += 1.0
        load.add(counts([40, 0, 0, 8]))
    assert load.demand().rows[0] == pytest.approx([40, 0, 0, 8], rel=0.05)
    assert load.demand().reads[0, 0] == pytest.approx(1, rel=0.05)
    now += 10
    assert load.demand().rows[0, 0] == pytest.approx(20, rel=0.05)
    summed = total([0, 1], 4, [pack(load.demand()), pack(load.demand()), b"other"])
    assert summed.rows == pytest.approx(2 * load.demand().rows, rel=1e-5)


def test_few_rows_are_chance() -> None:
    now = 0.0
    load = DecayedLoad([0], 4, 10.0, lambda: now)
    load.add(counts([20, 20, 20, 20]))
    assert not enough(load.demand(), 10.0)
    load.add(counts([20, 20, 20, 0]))
    assert enough(load.demand(), 10.0)
    assert np.array_equal(load.demand().layers, [0])


def reports(shares: NDArray[np.float64], reports: int) -> DecayedLoad:
    """What is known after so many reports of 8 steps with 8 pairs in 8 layers, drawn by ``shares`` [E]."""
    random, now = np.random.default_rng(0), [0.0]
    load = DecayedLoad(range(8), len(shares), 60.0, lambda: now[0])
    for _ in range(reports):
        now[0] += 1
        drawn = [random.multinomial(64, shares).tolist() for _ in range(8)]
        layers = [router_pb2.LayerCounts(layer=layer, rows=rows, reads=rows) for layer, rows in enumerate(drawn)]
        load.add(router_pb2.ReportLoadRequest(layers=layers))
    return load


HALVES = {(layer, expert): ("ab"[expert // 32],) for layer in range(8) for expert in range(64)}
PAIR = [WorkerSpec(name, 8 * 64) for name in "ab"]


@pytest.mark.parametrize("seconds", [40, 60, 90, 200])
def test_chance_moves_nothing_and_makes_no_copies(seconds: int) -> None:
    demand = reports(np.full(64, 1 / 64), seconds).demand()
    assert enough(demand, 60.0)
    exact = replace(demand, variance=None)
    assert place(PAIR, HALVES, exact, Policy(tolerance=0.0)).loads, "taken for exact, the sample is uneven"
    assert not place(PAIR, HALVES, demand, Policy(tolerance=0.0)).loads


def test_what_is_more_than_chance_is_acted_on() -> None:
    shares = 1 / np.arange(1, 65)
    assert place(PAIR, HALVES, reports(shares / shares.sum(), 60).demand(), Policy()).loads


def test_reports_that_disagree_are_trusted_less_than_as_many_rows_that_agree() -> None:
    now, steady, bursts = [0.0], [25] * 4, [[100 * (e == turn) for e in range(4)] for turn in range(4)]
    loads = [DecayedLoad([0], 4, 60.0, lambda: now[0]) for _ in range(2)]
    for turn in range(40):
        now[0] += 1
        loads[0].add(counts(steady))
        loads[1].add(counts(bursts[turn % 4]))
    calm, moody = (load.demand() for load in loads)
    assert moody.rows == pytest.approx(calm.rows, rel=0.1)
    assert (moody.uncertainty() > 10 * calm.uncertainty()).all()


def test_a_busiest_worker_with_little_more_is_left_alone() -> None:
    rows = np.where(np.arange(64) < 32, 104.0, 100.0)
    demand = Demand(tuple(range(8)), np.tile(rows, (8, 1)), np.zeros((8, 64)))
    assert not place(PAIR, HALVES, demand, Policy(move_cost=0.0)).loads
    assert place(PAIR, HALVES, demand, Policy(move_cost=0.0, tolerance=0.01)).loads


@pytest.mark.parametrize("report", [counts([1] * 3), counts([1] * 4, layer=9)])
def test_a_report_on_another_model_is_refused(report: router_pb2.ReportLoadRequest) -> None:
    with pytest.raises(InvalidRequest, match="counts of 4 experts"):
        DecayedLoad([0, 1], 4, 10.0).add(report)


def test_beyond_loopback_a_router_needs_tokens(tmp_path: Path) -> None:
    assert read_tokens("127.0.0.1", TokensConfig()) == {}
    with pytest.raises(ConfigError, match=r"tokens.worker_file.*0.0.0.0 needs a secret"):
        read_tokens("0.0.0.0", TokensConfig())
    worker_file, gateway_file = tmp_path / "worker", tmp_path / "gateway"
    worker_file.write_text(WORD + "\n")
    with pytest.raises(ConfigError, match=r"tokens.gateway_file"):
        read_tokens("127.0.0.1", TokensConfig(worker_file=worker_file))
    gateway_file.write_text(WORD)
    both = TokensConfig(worker_file=worker_file, gateway_file=gateway_file)
    with pytest.raises(ConfigError, match="different secrets"):
        read_tokens("0.0.0.0", both)
    gateway_file.write_text(WORD[::-1])
    digests = {"worker": token_digest(WORD), "gateway": token_digest(WORD[::-1])}
    assert read_tokens("0.0.0.0", both) == digests


def test_beyond_loopback_a_worker_needs_to_know_whom_to_answer(tmp_path: Path) -> None:
    def tokens(*, host: str = "0.0.0.0", **sections: object) -> Tokens:
        return Tokens(Config.model_validate({"worker": {"host": host}, **sections}))

    assert not tokens(host="127.0.0.1").asked
    with pytest.raises(ConfigError, match=r"tokens.gateway_file: a worker that listens on 0.0.0.0 answers only to"):
        tokens()
    file = tmp_path / "gateway"
    file.write_text(WORD)
    assert tokens(tokens={"gateway_file": file}).asked
    assert tokens(host="127.0.0.1", tokens={"gateway_file": file}).asked
    joining = tokens(router={"endpoint": "grpc://h:1"})
    with pytest.raises(ConfigError, match="the router asks for none"):
        joining.learn({})
    joining.learn({"gateway": token_digest(WORD)})


@pytest.mark.parametrize(
    "content", [b"short", b"", b"two words, and long enough", "ümläute-und-mehr".encode(), b"\xff" * 20]
)
def test_a_token_is_one_long_word(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="key: "):
        read_token(file, "key")


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key: cannot read .*nothing: No such file"):
        read_token(tmp_path / "nothing", "key")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_the_router_section() -> None:
    assert Config().router is None
    config = load_config(environ={"CONSILIUM_ROUTER__REDIS": "redis://:hidden@h:1", "CONSILIUM_ROUTER__LEASE": "5s"})
    assert config.router is not None
    assert config.router.lease == 5.0
    with pytest.raises(ConfigError, match=r"router.redis.*write redis://") as caught:
        load_config(environ={"CONSILIUM_ROUTER__REDIS": "http://:hidden@h"})
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"router.endpoint.*grpc://HOST:PORT"):
        load_config(environ={"CONSILIUM_ROUTER__ENDPOINT": "h:1"})
