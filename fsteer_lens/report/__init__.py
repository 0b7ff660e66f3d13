"""Reports: one HTML file that opens without network.

`steering_report` tells what one steering did to a model, `demo` measures the tutor, and `Report` is the page itself.
"""

from fsteer_lens.report.demonstration import demo
from fsteer_lens.report.page import Report
from fsteer_lens.report.steered import steering_report

__all__ = ["Report", "demo", "steering_report"]
