"""The chaos runner: `python -m tests.chaos --minutes N --seed S`.

Real processes on a real S3 API, faults by a schedule that a seed decides, and readers that know every byte.
"""
