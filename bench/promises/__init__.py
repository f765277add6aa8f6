"""What was promised of speed and memory, group by group: see `bench.workloads.promises`."""
