"""What reproduces, what doesn't, and how sure we are. No torch."""

from reproduce.report.build import ReportSummary, build_report
from reproduce.report.frames import Frames, load

__all__ = ["Frames", "ReportSummary", "build_report", "load"]
