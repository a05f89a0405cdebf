"""What reproduces, what doesn't, and how sure we are. No torch."""

from reproduce.report.build import ReportSummary, build_report

__all__ = ["ReportSummary", "build_report"]
