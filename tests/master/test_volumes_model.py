"""Volumes against a model: the same calls again, others in between, restarts of the master at any time."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import trio
from hypothesis import given, settings

from cachefs.client import Volumes, open_volumes
from cachefs.master import MasterConfig, run_master
from cachefs.model import CachefsError, ConfigError, ExistsError, NotFoundError, volume_id
from cachefs.net import Hello, Pool, TcpAddress, open_background, open_pool
from cachefs.wire.messages import GetMasterStatus
from cachefs.wire.quotas import ListQuotas, RemoveQuota, SetQuota

NAMES = ("a", "b", "c")
TARGETS = ("own0", "own1", "/dir", "/dir", "/dir", "/")
"""Under-stores, by directories, and paths of the namespace."""

step = st.one_of(
    st.tuples(st.just("create"), st.sampled_from(NAMES), st.sampled_from(TARGETS), st.sampled_from((0, 1, 2, 3))),
    st.tuples(st.sampled_from(("delete", "delete twice")), st.sampled_from(NAMES), st.just(""), st.just(0)),
    st.tuples(st.just("quota"), st.sampled_from(NAMES), st.just(""), st.sampled_from((0, 1, 2, 3))),
    st.tuples(st.just("again"), st.sampled_from(NAMES), st.just(""), st.just(0)),
    st.tuples(st.sampled_from(("by hand", "not by hand")), st.just(""), st.sampled_from(("/dir", "/")), st.just(7)),
    st.just(("restart", "", "", 0)),
)

Known = tuple[str, int]
"""(target, quota)."""


class Model:
    """What there must be."""

    def __init__(self) -> None:
        self.volumes: dict[str, Known] = {}
        self.by_hand: dict[str, int] = {}
        self.sets: set[str] = set()
        """Names of volumes that the quota of their path is for."""

    def path(self, name: str) -> str:
        target = self.volumes[name][0]
        return target if target.startswith("/") else f"/volumes/{volume_id(name)}"

    def give(self, name: str, target: str, quota: int) -> None:
        self.volumes[name] = (target, quota)
        self.sets.discard(name)
        if quota and self.path(name) not in self.by_hand:
            self.sets.add(name)

    def take(self, name: str) -> None:
        self.volumes.pop(name, None)
        self.sets.discard(name)

    def quotas(self) -> dict[str, int]:
        found = dict(self.by_hand)
        for name in self.sets:
            path = self.path(name)
            found[path] = max(found.get(path, 0), self.volumes[name][1])
        return found

    def stores(self) -> list[str]:
        return sorted(["/", *(self.path(name) for name, known in self.volumes.items() if not known[0].startswith("/"))])


class World:
    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.root = root
        self.nursery = nursery
        self.model = Model()
        for name in ("data/dir", "own0/x", "own1/x"):
            (root / name).mkdir(parents=True)
        self.config = MasterConfig(
            data_dir=str(root / "master"), listen=TcpAddress("127.0.0.1", 0), mounts=(("/", f"file://{root}/data"),)
        )
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.clients = AsyncExitStack()
        self.volumes: Volumes
        self.master: Pool

    async def start(self) -> None:
        self.scope, self.ended = trio.CancelScope(), trio.Event()
        (address,) = await self.nursery.start(self._run)
        self.volumes = await self.clients.enter_async_context(open_volumes(address))
        self.master = await self.clients.enter_async_context(open_pool(address, Hello("client")))

    async def _run(self, task_status: trio.TaskStatus[Any]) -> None:
        try:
            with self.scope:
                await run_master(self.config, task_status=task_status)
        finally:
            self.ended.set()

    async def stop(self) -> None:
        await self.clients.aclose()
        self.scope.cancel()
        await self.ended.wait()

    async def do(self, what: str, name: str, target: str, quota: int) -> None:
        model, volumes = self.model, self.volumes
        known = model.volumes.get(name)
        if what == "create":
            if known is None or known == (target, quota):
                made = await self.create(name, target, quota)
                if known is None:
                    model.give(name, target, quota)
                assert (made.name, made.path, made.quota_bytes) == (name, model.path(name), quota)
            else:
                await raises(ExistsError, self.create(name, target, quota))
        elif what == "again" and known is not None:
            await self.create(name, *known)
        elif what.startswith("delete"):
            for _ in range(2 if what == "delete twice" else 1):
                await volumes.delete(volume_id(name))
            model.take(name)
        elif what == "quota":
            if known is None:
                await raises(NotFoundError, volumes.set_quota(volume_id(name), quota))
            else:
                assert (await volumes.set_quota(volume_id(name), quota)).quota_bytes == quota
                model.give(name, known[0], quota)
        elif what == "by hand" and target not in model.quotas():
            await self.master.call(SetQuota(target, quota))
            model.by_hand[target] = quota
        elif what == "not by hand" and target in model.by_hand:
            await self.master.call(RemoveQuota(target))
            del model.by_hand[target]
        elif what == "restart":
            await self.stop()
            await self.start()

    async def create(self, name: str, target: str, quota: int) -> Any:
        if target.startswith("/"):
            return await self.volumes.create(name, path=target, quota_bytes=quota)
        return await self.volumes.create(name, url=f"file://{self.root}/{target}", quota_bytes=quota)

    async def check(self) -> None:
        model = self.model
        listed = (await self.volumes.list()).volumes
        assert [each.id for each in listed] == sorted(volume_id(name) for name in model.volumes)
        assert {each.name: (each.path, each.quota_bytes) for each in listed} == {
            name: (model.path(name), quota) for name, (_, quota) in model.volumes.items()
        }
        for each in listed:
            assert await self.volumes.get(each.id) == each
        quotas = (await self.master.call(ListQuotas())).message.quotas
        assert {each.path: each.limit_bytes for each in quotas} == model.quotas()
        mounts = (await self.master.call(GetMasterStatus())).message.mounts
        assert sorted(each.path for each in mounts) == model.stores()


async def raises(error: type[CachefsError], call: Any) -> None:
    with suppress(error):
        await call
        raise AssertionError(f"it is to raise {error.__name__}")


@settings(max_examples=80)
@given(st.lists(step, min_size=3, max_size=16))
def test_whatever_is_asked_in_whatever_order_is_as_the_model_has_it(steps: list[tuple[str, str, str, int]]) -> None:
    async def run() -> None:
        with trio.fail_after(60):
            async with open_background() as nursery:
                world = World(root, nursery)
                await world.start()
                for each in steps:
                    await world.do(*each)
                    await world.check()
                await world.do("restart", "", "", 0)
                await world.check()
                for name in NAMES:
                    await world.do("delete", name, "", 0)
                await world.check()
                assert world.model.quotas() == world.model.by_hand
                with suppress(ConfigError):
                    await world.stop()

    root = Path(tempfile.mkdtemp(prefix="volumes-"))
    try:
        trio.run(run)
    finally:
        shutil.rmtree(root)
