"""What a cluster promises, measured with real processes: see `__main__`."""
