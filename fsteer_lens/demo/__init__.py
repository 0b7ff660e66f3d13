"""A demonstration: a real chat model steered on short requests, then the tutor; what `make demo` runs."""

from fsteer_lens.demo.running import demo

__all__ = ["demo"]
