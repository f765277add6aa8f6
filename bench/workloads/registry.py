"""Which workloads there are: every one that a module of this package defines."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import bench.workloads
from bench.workloads.base import Alone, Scale, Workload

Kind = type[Workload] | type[Alone]


@cache
def workloads() -> Mapping[str, Kind]:
    """Name -> class, those on data sets first."""
    found: dict[str, Kind] = {}
    for module in pkgutil.iter_modules(bench.workloads.__path__):
        if module.name in ("base", "registry"):
            continue
        for each in vars(importlib.import_module(f"bench.workloads.{module.name}")).values():
            if not isinstance(each, type) or not issubclass(each, Workload | Alone):
                continue
            if each.__module__ == f"bench.workloads.{module.name}" and hasattr(each, "name"):
                assert each.name not in found, f"two workloads are named {each.name}"
                found[each.name] = each
    return dict(sorted(found.items(), key=lambda item: (issubclass(item[1], Alone), item[0])))


def address_of(kind: type) -> str:
    """Names a workload's class to another process."""
    return f"{kind.__module__}:{kind.__qualname__}"


def loaded(address: str, scale: str, options: Mapping[str, str]) -> Workload | Alone:
    module, _, name = address.partition(":")
    made: Workload | Alone = getattr(importlib.import_module(module), name)(Scale(scale), options)
    return made
