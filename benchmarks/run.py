"""``python -m benchmarks.run [NAME ...]``: runs the cases, prints a table for each, appends JSON lines.

A row of ``results.jsonl`` is a harness record with its case, date, revision and the machine's load at the start.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from benchmarks.cases import CaseName

RESULTS = Path(__file__).with_name("results.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(get_args(CaseName))} (all)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON lines to append to")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in get_args(CaseName)]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}: expected any of {', '.join(get_args(CaseName))}")
    _use_all_cores()
    for name in options.names or get_args(CaseName):
        run_case(name, results=options.results)
    return 0


def run_case(name: CaseName, *, results: Path) -> None:
    """Runs one case, appends its rows as they come, and prints its table."""
    from benchmarks import harness

    bench = importlib.import_module(f"benchmarks.bench_{name}")
    rows = []
    labels = {"case": name, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    # Processes that wanted to run in the last minute: on a busy machine, or after another case, not zero.
    labels |= {"revision": harness.environment()["revision"], "load": os.getloadavg()[0]}
    with results.open("a") as file:
        for row in bench.run():
            rows.append(row)
            file.write(json.dumps(labels | row) + "\n")
            file.flush()
            print(f"{name}: {row['name']} {cell(row.get('median_ms')) or '-'} ms", file=sys.stderr, flush=True)
    print(f"\n{name}, {harness.device()}; load {labels['load']:.1f} at its start")
    print(f"{table(rows, bench.COLUMNS)}\n", flush=True)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Returns rows as a Markdown table that is aligned as plain text too.

    Args:
        rows: values by field; a field may be absent or None.
        columns: field to heading.
    """
    body = [[cell(row.get(field)) for field in columns] for row in rows]
    lines = [list(columns.values()), *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    lines[1][0] = "-" * widths[0]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cell(value: Any) -> str:
    """Returns a table cell: numbers to about three digits, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _use_all_cores() -> None:
    """Gives jax one CPU device per core, as the command line does for seeds; before its backend starts."""
    import jax

    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
