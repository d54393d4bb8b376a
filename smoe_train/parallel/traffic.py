"""Bytes that this process sends to the other ranks of its expert-parallel group, counted as they are handed over.

Counting is arithmetic on sizes that the host knows anyway. Kinds of an ordinary layer are ``counts``, ``tokens`` on
their way to experts and ``outputs`` on their way back; of a contest ``contest_tokens``, ``contest_responses``,
``contest_winners`` and ``contest_outputs``. What the backward pass sends is the kind with ``_gradients``. Gradients of
weights, which DeepSpeed reduces, are not among them.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

bytes_sent: Counter[str] = Counter()
"""Bytes by kind since this process began."""


def count_rows(kind: str, rows: Tensor, number: int) -> None:
    """Counts rows that are sent.

    Args:
        kind: What they are.
        rows: Rows like those sent; only the shape of one and the dtype count.
        number: How many leave this rank.
    """
    bytes_sent[kind] += number * rows.shape[1:].numel() * rows.element_size()
