"""The report of a run: one self-contained HTML page, made from whatever the run directory holds."""

from trainer.report.page import build_report

__all__ = ["build_report"]
