"""What fsteer_lens costs, as ratios inside one run: `python -m benchmarks`, written to docs/benchmarks.md."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # scikit-learn's threads, as PyTorch's: read once, when they are loaded
