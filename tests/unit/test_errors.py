"""Every class of the error tree can be told over gRPC and HTTP, and says in a sentence what it means."""

from __future__ import annotations

from http import HTTPStatus

import grpc
import pytest

from consilium import errors
from consilium.errors import ConsiliumError


def _tree(root: type[ConsiliumError]) -> list[type[ConsiliumError]]:
    return [
        root,
        *(below for child in root.__subclasses__() if child.__module__ == root.__module__ for below in _tree(child)),
    ]


TREE = _tree(ConsiliumError)


def test_the_tree_is_the_module() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert set(TREE) == set(classes)
    assert {"InvalidRequest", "Overloaded", "ExpertUnavailable", "StalePlacement", "DeadlineExceeded", "WireError",
            "CheckpointError", "ConfigError"} <= {each.__name__ for each in TREE}  # fmt: skip


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_class_is_complete(kind: type[ConsiliumError]) -> None:
    assert kind.grpc_code in grpc.StatusCode.__members__
    assert kind.grpc_code != "OK"
    assert HTTPStatus(kind.http_status) >= 400
    assert kind.kind.endswith("_error")
    assert "__doc__" in vars(kind)
    assert (kind.__doc__ or "").endswith(".")


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_only_what_may_pass_is_worth_retrying(kind: type[ConsiliumError]) -> None:
    client_fault = 400 <= kind.http_status < 500 and kind.http_status != HTTPStatus.TOO_MANY_REQUESTS
    assert not (kind.retryable and client_fault)


def test_an_error_keeps_its_text_and_parameter() -> None:
    error = errors.InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    assert (str(error), error.message, error.param) == (error.message, "max_tokens must be at least 1", "max_tokens")
