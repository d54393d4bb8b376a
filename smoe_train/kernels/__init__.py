"""Own machine code for what PyTorch's operations cannot do fast enough, each with a PyTorch form of the same results.

It is built on request, with torch's extension API, and kept in ``TORCH_EXTENSIONS_DIR``; nothing here is needed.
"""

from typing import TYPE_CHECKING

from smoe_train.lazy import lazy_attributes

if TYPE_CHECKING:
    from smoe_train.kernels.build import load_experts_kernel
    from smoe_train.kernels.experts import combine, run_experts, supports

__getattr__ = lazy_attributes(
    __name__, {"build": ("load_experts_kernel",), "experts": ("combine", "run_experts", "supports")}
)

__all__ = ["combine", "load_experts_kernel", "run_experts", "supports"]
