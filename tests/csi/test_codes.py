"""Every error of ours has a code of gRPC."""

from __future__ import annotations

import grpc
import pytest
from cachefs_csi.codes import CODES, CallError, code_of
from cachefs_csi.node_volumes import InUseError, NotStagedError

from cachefs import model


def every(of: type[model.CachefsError]) -> set[type[model.CachefsError]]:
    return {of}.union(*(every(each) for each in of.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(every(model.CachefsError), key=lambda each: each.__name__))
def test_the_table_is_complete(kind: type[model.CachefsError]) -> None:
    """Directly, or by what it is a kind of; only what is a mistake of ours is INTERNAL without being named."""
    if kind is CallError:
        return
    named = next(each for each in kind.__mro__ if each in CODES)
    assert named is not model.CachefsError or kind is model.CachefsError or kind.__module__.startswith("cachefs.fuse")


def test_codes_that_orchestrators_decide_by() -> None:
    code = grpc.StatusCode
    for error, expected in (
        (model.ConfigError("k", "v", "a"), code.INVALID_ARGUMENT),
        (model.NotFoundError(""), code.NOT_FOUND),
        (model.ExistsError(""), code.ALREADY_EXISTS),
        (NotStagedError(""), code.FAILED_PRECONDITION),
        (InUseError(""), code.FAILED_PRECONDITION),
        (model.TransportError(""), code.UNAVAILABLE),
        (model.UnavailableError(""), code.UNAVAILABLE),
        (model.DeadlineError(""), code.DEADLINE_EXCEEDED),
        (model.DeniedError(""), code.PERMISSION_DENIED),
        (model.CapacityError(""), code.RESOURCE_EXHAUSTED),
        (ValueError(""), code.INTERNAL),
    ):
        assert code_of(error) is expected
