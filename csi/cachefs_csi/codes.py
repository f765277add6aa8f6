"""What a caller is told when a call fails: a code of gRPC, which the orchestrator decides by, and a sentence."""

from __future__ import annotations

import grpc

from cachefs import model as m

Code = grpc.StatusCode


class CallError(m.CachefsError):
    """A call is refused, with this code of gRPC. The message is for whoever reads the events of a pod or claim."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


# The nearest one up the tree of errors counts. What may get better by itself is UNAVAILABLE: orchestrators try again.
CODES: dict[type[m.CachefsError], grpc.StatusCode] = {
    m.CachefsError: Code.INTERNAL,
    m.ConfigError: Code.INVALID_ARGUMENT,
    m.ProtocolError: Code.INTERNAL,
    m.AuthenticationError: Code.UNAUTHENTICATED,
    m.TransportError: Code.UNAVAILABLE,
    m.HandshakeError: Code.UNAUTHENTICATED,
    m.DeadlineError: Code.DEADLINE_EXCEEDED,
    m.NamespaceError: Code.FAILED_PRECONDITION,
    m.NotFoundError: Code.NOT_FOUND,
    m.ExistsError: Code.ALREADY_EXISTS,
    m.NotADirectory: Code.INVALID_ARGUMENT,
    m.StaleError: Code.ABORTED,
    m.BlockError: Code.INTERNAL,
    m.CapacityError: Code.RESOURCE_EXHAUSTED,
    m.TierError: Code.FAILED_PRECONDITION,
    m.UnderStoreError: Code.INTERNAL,
    m.DeniedError: Code.PERMISSION_DENIED,
    m.ThrottledError: Code.UNAVAILABLE,
    m.UnavailableError: Code.UNAVAILABLE,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """INTERNAL for what is none of ours, which is a mistake of ours."""
    if isinstance(error, CallError):
        return error.code
    return next((CODES[each] for each in type(error).__mro__ if each in CODES), Code.INTERNAL)


def invalid(field: str, value: object, accepted: str) -> CallError:
    """A field of a request will not do."""
    return CallError(Code.INVALID_ARGUMENT, f"{field}: {value!r} is not accepted; expected {accepted}")


def missing(field: str) -> CallError:
    return CallError(Code.INVALID_ARGUMENT, f"{field} is missing")
