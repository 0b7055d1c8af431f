"""What makes the numbers in docs/benchmarks.md: `python -m benchmarks.NAME`."""
