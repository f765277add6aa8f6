"""What a cluster promises, measured with real processes: see `bench.workloads.cluster`."""
