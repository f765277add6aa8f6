"""Whether a node may make its own copy of a block."""

from __future__ import annotations

import enum

MAX_SHARE_OF_TIER = 4
"""A block larger than 1/4 of the tier is not admitted: it would push out too much of everything else."""


class Promote(enum.Enum):
    """The setting `promote`; see `admits`."""

    ALWAYS = "always"
    """Make a copy, and evict others for it."""
    IF_SPACE = "if-space"
    """Make a copy where there is room: neither thrashes nor duplicates under pressure. The default."""
    NEVER = "never"
    """Read through others."""


def admits(
    mode: Promote,
    *,
    block_length: int,
    capacity_bytes: int,
    free_bytes: int,
    reclaimable_bytes: int = 0,
    shared_bytes: int = 0,
    first_copy: bool = True,
    pinned_bytes: int = 0,
) -> bool:
    """The decision for one block on one node.

    `free_bytes` is what the tier could still take without evicting; `reclaimable_bytes` what it holds that counts as
    free: superseded content, blocks idle for long; `pinned_bytes` what never goes.

    `first_copy`: no other live node holds the block. `shared_bytes` is what this node holds of blocks that another live
    node holds too, those in `reclaimable_bytes` and pinned ones left out. It counts as free for a first copy: first
    copies displace duplicates, and duplicates displace nothing, or nodes would trade the same copies for ever.
    """
    if mode is Promote.NEVER or block_length * MAX_SHARE_OF_TIER > capacity_bytes:
        return False
    if block_length > capacity_bytes - pinned_bytes:
        return False
    displaced_bytes = reclaimable_bytes + shared_bytes if first_copy else reclaimable_bytes
    return mode is Promote.ALWAYS or block_length <= free_bytes + displaced_bytes
