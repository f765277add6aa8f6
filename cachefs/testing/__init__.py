"""For tests and benchmarks, ours and others': a real S3 server, real cachefs processes, contract tests, faults."""
