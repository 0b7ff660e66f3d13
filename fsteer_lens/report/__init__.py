"""Reports: one HTML file that opens without network, and `demo`, which measures the tutor and writes one."""

from fsteer_lens.report.demonstration import demo
from fsteer_lens.report.page import Report

__all__ = ["Report", "demo"]
