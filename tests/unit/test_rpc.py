from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from consilium import errors
from consilium.errors import ConfigError, ConsiliumError, ExpertUnavailable
from consilium.rpc import channel_options, from_call_error, from_rpc_error, server_options, to_call_error
from protos.expert.v1 import expert_pb2

KINDS = [errors.InvalidRequest, errors.Overloaded, errors.ExpertUnavailable, errors.StalePlacement]
KINDS += [errors.DeadlineExceeded, errors.WireError]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_call_arrives_as_it_was(kind: type[ConsiliumError]) -> None:
    arrived = from_call_error(to_call_error(kind("rows: too few")))
    assert type(arrived) is kind
    assert arrived.message == "rows: too few"


def test_a_bug_keeps_its_text_to_itself() -> None:
    sent = to_call_error(KeyError("/home/user/secret"))
    assert (sent.code, sent.retryable) == ("INTERNAL", False)
    assert "secret" not in sent.message
    assert type(from_call_error(sent)) is ConsiliumError


@pytest.mark.parametrize(
    ("code", "retryable", "kind"),
    [
        ("BRAND_NEW", True, ExpertUnavailable),
        ("BRAND_NEW", False, ConsiliumError),
        ("", False, ConsiliumError),
        ("FAILED_PRECONDITION", False, ConsiliumError),
        ("INVALID_ARGUMENT", True, ExpertUnavailable),
    ],
)
def test_whether_to_retry_is_what_the_peer_says(code: str, retryable: bool, kind: type[ConsiliumError]) -> None:
    error = from_call_error(expert_pb2.CallError(code=code, message="no", retryable=retryable))
    assert type(error) is kind
    assert error.retryable is retryable


def rpc_error(code: grpc.StatusCode, details: str | None = None) -> grpc.RpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_one_of_our_errors(code: grpc.StatusCode) -> None:
    error = from_rpc_error(rpc_error(code, "what happened"))
    assert isinstance(error, ConsiliumError)
    assert "what happened" in error.message
    retryable = {"UNAVAILABLE", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "DATA_LOSS"}
    assert error.retryable == (code.name in retryable | {"FAILED_PRECONDITION"})


def test_another_server_at_the_address_is_a_matter_of_configuration() -> None:
    assert type(from_rpc_error(rpc_error(grpc.StatusCode.UNIMPLEMENTED))) is ConfigError


def test_a_grpc_error_without_a_status() -> None:
    assert type(from_rpc_error(grpc.RpcError("channel closed"))) is ExpertUnavailable


def test_message_sizes_are_bounded_and_above_the_largest_frame() -> None:
    for options in (channel_options, server_options):
        for frame in (2**16, 64 * 2**20, 2**30):
            chosen = dict(options(frame))
            for name in ("grpc.max_send_message_length", "grpc.max_receive_message_length"):
                assert frame < chosen[name] < 2**31


def test_grpc_knows_every_option() -> None:
    """One that it does not know is ignored without a word; its names stand in its library."""
    library = Path(cygrpc.__file__).read_bytes()
    options = [*channel_options(), *server_options()]
    assert [name for name, _ in options if name.encode() + b"\0" not in library] == []


def test_a_server_takes_pings_as_often_as_clients_send_them() -> None:
    client, server = dict(channel_options()), dict(server_options())
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.use_local_subchannel_pool"] == 1
    assert server["grpc.so_reuseport"] == 0
