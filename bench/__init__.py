"""Measurements: `python -m bench` compares a mount with native reads, `python -m bench.demo` shows the main job."""
