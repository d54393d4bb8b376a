"""Reporting: the record of a run, what people see of it, and the page that sums it up."""

from smoe_train.reporting.config import ReportingConfig, WandbConfig
from smoe_train.reporting.environment import environment, write_environment
from smoe_train.reporting.journal import Journal, check_sinks
from smoe_train.reporting.records import METRICS, ROUTING, Record, read_records
from smoe_train.reporting.report import write_report

__all__ = [
    "METRICS",
    "ROUTING",
    "Journal",
    "Record",
    "ReportingConfig",
    "WandbConfig",
    "check_sinks",
    "environment",
    "read_records",
    "write_environment",
    "write_report",
]
