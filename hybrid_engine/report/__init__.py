"""What a run says: live progress, run.log, metrics.jsonl and summary.json."""

from hybrid_engine.report.reporter import Reporter
from hybrid_engine.report.summary import print_summary

__all__ = ["Reporter", "print_summary"]
