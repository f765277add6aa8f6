"""cachefs: a distributed read-through cache that puts an object store under a job as if it were a local disk."""

__version__ = "0.1.0"
