"""Connections that can be cut: relays on loopback between processes that believe that they speak to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

_PIECE = 256 * 1024


class Cable:
    """To one listener, `target`, which may change; without one, connections are refused. Made by `Cable.lay`."""

    def __init__(self, listeners: list[trio.SocketListener]) -> None:
        self.target: tuple[str, int] | None = None
        self.address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        self._whole = trio.Event()
        self._whole.set()
        self._cuts = 0

    @staticmethod
    async def lay(nursery: trio.Nursery) -> Cable:
        """It lasts as long as the nursery."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        cable = Cable(listeners)
        nursery.start_soon(trio.serve_listeners, cable._relay, listeners)
        return cable

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing goes through, without a word, as when packets are lost; what was sent arrives afterwards."""
        self._cuts += 1
        if self._cuts == 1:
            self._whole = trio.Event()
        try:
            yield
        finally:
            self._cuts -= 1
            if self._cuts == 0:
                self._whole.set()

    async def _relay(self, near: trio.SocketStream) -> None:
        await self._whole.wait()
        async with near:
            if self.target is None:
                return
            with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                async with await trio.open_tcp_stream(*self.target) as far, trio.open_nursery() as nursery:

                    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                            while data := await source.receive_some(_PIECE):
                                await self._whole.wait()
                                await sink.send_all(data)
                        # Either end gone: both are.
                        await self._whole.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(pump, near, far)
                    nursery.start_soon(pump, far, near)
