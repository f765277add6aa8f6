"""What the policies do to a cluster: how much is read from the own cache, from peers and from the under-store.

`python -m bench.simulate` prints it by policy, size of the caches and epoch. Two simulations, the same assumptions:

- `exact` runs the real code of `cachefs.policy` (Sieve, admits, rank_homes, IdleGroups), one read after the other:
  some 10 workers, 10,000 blocks;
- `large` keeps the same state in arrays and lets all workers take a step at once: 1,000 workers, 10 million blocks. A
  test holds it against `exact`.

What is assumed:

- All blocks have one size, all caches too: shares of reads are shares of bytes. `fraction` is all caches together / the
  data.
- An epoch reads every block once, in a new random order, dealt to the readers in turns as a distributed sampler does
  (`shard`); or every reader reads everything in an order of its own (`all`; exact only). Readers take turns, read by
  read. Some workers may cache without reading.
- A read is of a whole block and is over before the next one: nothing is in flight, no lease is contended, the master
  always knows who holds what. A read from a peer counts as a use of the peer's copy.
- `lru`, `sieve`: what is read is copied to the reader, by evicting if it must.
- `if-space`: copied if there is room, never evicted. That is also what pinning as much as fits does.
- `last-copy`, ours: as `if-space`; a block nobody holds also displaces duplicates, and where the reader has no room, a
  home takes it (the first of `HOMES_TRIED` that has room).
- `idle_after`, in epochs (exact only): what nobody has used for so long counts as free.
"""
