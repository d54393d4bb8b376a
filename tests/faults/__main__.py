"""Runs the fault suite: one table on the screen, ``reliability.json``, and the table of docs/reliability.md.

PYTHONPATH=tests python -m faults --scale commit --only kills,corruption
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from faults import suite, table

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"


def main() -> int:
    """Returns the exit code: 0 if every promise was kept, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="Injects faults and counts what survives.")
    parser.add_argument("--scale", choices=("short", "commit", "nightly"), default="commit")
    parser.add_argument("--only", default=",".join(suite.MODULES), help="modules, separated by commas")
    parser.add_argument("--json", type=Path, default=Path("reliability.json"), help="where the figures go")
    parser.add_argument("--write-docs", action="store_true", help=f"replace the table in {DOCS.name}")
    parser.add_argument("--kills", type=int, help="kills of the kill storm instead of the scale's")
    arguments = parser.parse_args()
    modules = arguments.only.split(",")
    unknown = sorted(set(modules) - set(suite.MODULES))
    if unknown:
        parser.error(f"no module {', '.join(unknown)}; there are {', '.join(suite.MODULES)}")
    if arguments.write_docs and tuple(modules) != suite.MODULES:
        parser.error("--write-docs needs all modules")
    if arguments.kills is not None:
        os.environ["SMOE_TRAIN_FAULTS_KILLS"] = str(arguments.kills)
    os.environ.update(WANDB_MODE="offline", NO_COLOR="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    from faults import plain_deepspeed  # with it torch and the rest, once for all modules, which are forked

    results = []
    with tempfile.TemporaryDirectory(prefix="smoe-train-faults-") as folder:
        os.environ["SMOE_TRAIN_CACHE"] = str(Path(folder) / "cache")
        for module in modules:
            print(f"{module} ...", file=sys.stderr, flush=True)
            results.append(suite.run_module(module, arguments.scale, Path(folder) / module))
            if results[-1].error:
                print(results[-1].error, file=sys.stderr)
        results = plain_deepspeed.with_column(results, arguments.scale, Path(folder) / "plain_deepspeed")
    table.show(results)
    table.write_json(results, arguments.scale, arguments.json)
    if arguments.write_docs:
        table.write_docs(results, arguments.scale, DOCS)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
