"""smoe_train: pretrain and fine-tune sparse mixture-of-experts transformers.

Importing the package loads neither torch nor deepspeed; the rooms (``smoe_train.routing``, ``smoe_train.model``,
...) load what they need.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("smoe_train")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["__version__"]
