"""Own machine code for what PyTorch's operations cannot do fast enough, each with a PyTorch form of the same results.

It is built on request, with torch's extension API, and kept in ``TORCH_EXTENSIONS_DIR``; nothing here is needed.
"""

from typing import TYPE_CHECKING

from smoe_train.lazy import lazy_attributes

if TYPE_CHECKING:
    from smoe_train.kernels.attention import attend, attends
    from smoe_train.kernels.build import load_kernels
    from smoe_train.kernels.experts import combine, run_experts, supports

__getattr__ = lazy_attributes(
    __name__,
    {
        "attention": ("attend", "attends"),
        "build": ("load_kernels",),
        "experts": ("combine", "run_experts", "supports"),
    },
)

__all__ = ["attend", "attends", "combine", "load_kernels", "run_experts", "supports"]
