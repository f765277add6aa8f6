"""The calls of the interface, from the threads of gRPC to trio and back: dispatched, logged, counted."""

from __future__ import annotations

import logging
import math
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import trio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from cachefs.metrics import Times
from cachefs.model import CachefsError
from cachefs_csi import csi_pb2
from cachefs_csi.codes import Code, code_of
from cachefs_csi.redacting import redacted, secret_values, shown_map

logger = logging.getLogger(__name__)

SERVICES: Mapping[str, ServiceDescriptor] = csi_pb2.DESCRIPTOR.services_by_name
_QUIET = re.compile("Probe$|Get(Info|Capabilities|PluginInfo|VolumeStats)$|GetPluginCapabilities$|GetCapabilities$")
"""Asked all the time, by everybody: logged only when they fail."""

_REDACTED = "***"


def snake_case(name: str) -> str:
    """NodeStageVolume -> node_stage_volume"""
    return re.sub("(?<!^)(?=[A-Z])", "_", name).lower()


def shown(message: Message) -> str:
    """A message on one line, without what the interface marks as secret."""
    parts = []
    for field, value in message.ListFields():
        options: Any = field.GetOptions()  # its stubs know no extensions that are made
        if options.Extensions[csi_pb2.csi_secret]:
            parts.append(f"{field.name}={_REDACTED}")
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            parts.append(f"{field.name}={shown_map(value)}")
        elif field.message_type is not None and not field.is_repeated:
            parts.append(f"{field.name}={{{shown(value)}}}")
        elif field.message_type is not None:
            parts.append(f"{field.name}=[{'; '.join(shown(each) for each in value)}]")
        else:
            parts.append(f"{field.name}={list(value) if field.is_repeated else value!r}")
    return " ".join(parts)


def secrets_in(message: Message) -> set[str]:
    """What must not appear in a text about a request."""
    secrets: dict[str, str] = {}
    given: set[str] = set()
    for field, value in message.ListFields():
        if field.message_type is None or not field.message_type.GetOptions().map_entry:
            continue
        options: Any = field.GetOptions()
        if options.Extensions[csi_pb2.csi_secret]:
            secrets.update(value)
        else:
            given |= secret_values({}, value)
    return given | secret_values(secrets)


class _CallerLeft(Exception):
    """Or its connection is gone."""


class Calls(grpc.GenericRpcHandler):
    """What answers the calls. Made in trio; called by the threads of a gRPC server.

    `services`: by the service's name, an object with an async method for each call that is answered: it takes the
    request, and returns the response or raises. Those that it lacks are UNIMPLEMENTED. A call whose caller gave up or
    ran out of time is cancelled.
    """

    def __init__(self, services: Mapping[str, object]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self.times: Times[str] = Times()
        """Seconds that calls took, by method."""
        self.codes: dict[tuple[str, ...], float] = {}
        """How many there were, by method and code."""
        for name, implementation in services.items():
            for method in SERVICES[name].methods:
                function = getattr(implementation, snake_case(method.name), None)
                if function is not None:
                    self._handlers[f"/{SERVICES[name].full_name}/{method.name}"] = self._handler(method, function)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handlers.get(details.method)

    def _handler(
        self, method: MethodDescriptor, function: Callable[[Any], Awaitable[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(request: Message, context: grpc.ServicerContext) -> Any:
            began = time.monotonic()
            code, message, response = Code.OK, "", None
            try:
                response = trio.from_thread.run(self._run, function, request, context, trio_token=self._token)
            except trio.RunFinishedError:
                code, message = Code.UNAVAILABLE, "the driver ends"
            except trio.Cancelled:
                code, message = Code.UNAVAILABLE, "the driver ends"
            except (TimeoutError, trio.TooSlowError):
                code, message = Code.DEADLINE_EXCEEDED, "it took longer than the caller waits"
            except _CallerLeft:
                code, message = Code.CANCELLED, "the caller gave up"
            except CachefsError as error:
                code, message = code_of(error), str(error)
            except Exception as error:
                # Without its traceback's last line, which may quote a secret.
                where = "".join(traceback.format_tb(error.__traceback__))
                logger.error("call broke method=%s error=%s\n%s", method.name, type(error).__name__, where)
                code, message = Code.INTERNAL, f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            self._from_any_thread(lambda: self._count(method.name, code, seconds))
            if code is not Code.OK:
                message = redacted(message, secrets_in(request))
                facts = (method.name, code.name, seconds, message, shown(request))
                logger.warning("call failed method=%s code=%s seconds=%.3f error=%s %s", *facts)
                context.abort(code, message)
            if not _QUIET.search(method.name):
                logger.info("call method=%s seconds=%.3f %s", method.name, seconds, shown(request))
            return response

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )

    async def _run(
        self, function: Callable[[Any], Awaitable[Any]], request: Message, context: grpc.ServicerContext
    ) -> Any:
        """Raises TimeoutError, _CallerLeft, and what `function` raises."""
        remaining_s = context.time_remaining()
        deadline = math.inf if remaining_s is None else trio.current_time() + remaining_s
        with trio.CancelScope(deadline=deadline) as scope:
            if not context.add_callback(lambda: self._from_any_thread(scope.cancel)):
                scope.cancel()  # it is over already
            return await function(request)
        if trio.current_time() >= deadline:
            raise TimeoutError
        raise _CallerLeft

    def _from_any_thread(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            pass

    def _count(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        self.codes[method, code.name] = self.codes.get((method, code.name), 0) + 1
        self.times.observe(method, seconds)
