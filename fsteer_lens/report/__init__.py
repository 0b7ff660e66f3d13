"""Reports: one HTML file that opens without network.

`steering_report` tells what one steering did to a model, and `Report` is the page itself.
"""

from fsteer_lens.report.page import Report
from fsteer_lens.report.steered import steering_report

__all__ = ["Report", "steering_report"]
