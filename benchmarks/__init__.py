"""Benchmarks: ``python -m benchmarks.run``. See README.md here for the cases and the numbers."""
