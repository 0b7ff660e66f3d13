"""What fsteer_lens costs, as ratios inside one run: `python -m benchmarks`, written to docs/benchmarks.md."""
