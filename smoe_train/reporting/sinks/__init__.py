"""Places that the figures of a run go to.

`JsonLines` is the record and loses nothing while memory lasts; everything else is a `Sink` and runs behind a
`Background` thread.
"""

from smoe_train.reporting.sinks.background import Background, Sink
from smoe_train.reporting.sinks.console import ConsoleSink
from smoe_train.reporting.sinks.jsonl import JsonLines
from smoe_train.reporting.sinks.tensorboard import TensorboardSink
from smoe_train.reporting.sinks.wandb import WandbSink

__all__ = ["Background", "ConsoleSink", "JsonLines", "Sink", "TensorboardSink", "WandbSink"]
