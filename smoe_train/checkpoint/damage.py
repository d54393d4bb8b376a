"""What a damaged file has cost: which tensors, and so which experts, are no longer what was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Larger headers are refused by safetensors too.
LARGEST_HEADER_BYTES = 100_000_000
MOST_EXPERTS_NAMED = 8
MOST_OTHERS_NAMED = 3

EXPERT_TENSOR = re.compile(r"(?P<kind>[^/]+)/(?P<bank>.+\.experts)\.(?P<expert>\d+)\.(?P<name>.+)\Z")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def damaged_tensors(path: Path, expected: Mapping[str, str]) -> list[str] | None:
    """Returns which tensors of a safetensors file are not what was written, or None if its header cannot be read.

    safetensors refuses a damaged file as a whole; here each tensor is looked at that the file still has.

    Args:
        path: The file.
        expected: SHA-256 by name of the tensors that were written to it.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(LARGEST_HEADER_BYTES, path.stat().st_size):
            return None
        try:
            header = json.loads(file.read(size))
            places = {name: header[name]["data_offsets"] for name in expected if name in header}
            ranges = {name: (int(begin), int(end)) for name, (begin, end) in places.items()}
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        damaged = []
        for name, digest in expected.items():
            begin, end = ranges.get(name, (0, -1))
            if not 0 <= begin <= end <= path.stat().st_size:
                damaged.append(name)
                continue
            file.seek(8 + size + begin)
            if hashlib.sha256(file.read(end - begin)).hexdigest() != digest:
                damaged.append(name)
    return damaged


def described(tensors: Iterable[str]) -> str:
    """Returns tensors in words, those of experts by layer and global id: ``layer 0 expert 3: weight of w_in``."""
    experts: dict[tuple[str, int], list[str]] = defaultdict(list)
    others: list[str] = []
    for tensor in tensors:
        match = EXPERT_TENSOR.match(tensor)
        if match is None:
            others += [one] if (one := _of(tensor)) not in others else []
        else:
            experts[match["bank"], int(match["expert"])].append(f"{match['kind']} of {match['name']}")
    texts = []
    if len(experts) > MOST_EXPERTS_NAMED:
        texts.append(_summary(list(experts)))
    else:
        texts += [f"{place(bank)} expert {expert}: {', '.join(sorted(n))}" for (bank, expert), n in experts.items()]
    if len(others) > MOST_OTHERS_NAMED + 1:
        others = [*others[:MOST_OTHERS_NAMED], f"{len(others) - MOST_OTHERS_NAMED} more"]
    return "; ".join([*texts, *([", ".join(others)] if others else [])])


def place(module: str) -> str:
    """Returns where in the model a bank of experts is."""
    found = _LAYER.search(module)
    return f"layer {found[1]}" if found else module


def spans(numbers: Iterable[int]) -> str:
    """Returns whole numbers as text: ``0 to 3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _summary(experts: Sequence[tuple[str, int]]) -> str:
    by_experts: dict[str, list[str]] = defaultdict(list)
    banks: dict[str, list[int]] = defaultdict(list)
    for bank, expert in experts:
        banks[bank].append(expert)
    for bank, ids in banks.items():
        by_experts[spans(ids)].append(place(bank))
    return "; ".join(f"experts {ids} of {', '.join(places)}" for ids, places in by_experts.items())


def _of(tensor: str) -> str:
    kind, _, name = tensor.partition("/")
    if kind == "random":
        return f"the generators of rank {name.partition('/')[0]}"
    return f"{kind} of {name}" if name else tensor
