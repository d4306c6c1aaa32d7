"""``python -m benchmarks.accelerator``: all figures of an accelerator in one command of at most nine minutes.

Every part is a process of its own with a cap, so that one that fails or takes too long costs no other. Rows are
appended to ``accelerator.jsonl`` as they come, and ``accelerator.md`` is written anew after every part: what is cut
off keeps its figures. What parts measure is in :mod:`benchmarks.accelerator_parts`; ``--small`` has a test's sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import table

# Seconds that a part may take, in the order of their worth; together nine minutes, the last one what is left of them.
CAPS = {"step": 150, "linalg": 80, "llama": 100, "sampler": 25, "determinism": 35, "profile": 60, "quick": 90}
COLUMNS = {
    "what": "what", "rate": "rate", "unit": "unit", "ms": "ms", "compile_s": "compile s", "peak_mb": "peak MB",
    "of_compute": "of peak FLOP/s", "of_bandwidth": "of peak bytes/s", "error": "error", "note": "",
}  # fmt: skip
_ROWS, _TABLE = "accelerator.jsonl", "accelerator.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a part failed or was cut off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description="Measure an accelerator.")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), metavar="DIR", help="where figures go")
    parser.add_argument("--only", nargs="+", choices=CAPS, default=list(CAPS), help="parts (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes of a test, for a CPU")
    parser.add_argument("--part", choices=CAPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        _measure(options.part, options.out / _ROWS, small=options.small)
        return 0
    ended = [_run(part, options.out, small=options.small) for part in options.only]
    print((options.out / _TABLE).read_text())
    return 0 if all(ended) else 1


def _measure(part: str, rows: Path, *, small: bool) -> None:
    """Runs one part in this process and appends what it measures, row by row."""
    from benchmarks import accelerator_parts

    sizes = accelerator_parts.SMALL if small else accelerator_parts.WHOLE
    with rows.open("a") as file:
        for row in accelerator_parts.PARTS[part](sizes):
            file.write(json.dumps({"part": part} | row) + "\n")
            file.flush()
            print(f"{part}: {row['what']}: {row.get('rate')} {row.get('unit')}", file=sys.stderr, flush=True)


def _run(part: str, out: Path, *, small: bool) -> bool:
    """Runs one part in a process of its own, and writes the table; returns whether it came to its end."""
    words = [sys.executable, "-m", "benchmarks.accelerator", "--out", str(out), "--part", part, *["--small"] * small]
    # What a first call has compiled, a second one finds.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((out / "cache").resolve())}
    started, cap = time.monotonic(), CAPS[part]
    try:
        code = subprocess.run(words, timeout=cap, check=False, env=environment).returncode
        note = "" if code == 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        note = f"cut off after {cap} s"
    took = {"what": "all of this part", "ms": 1e3 * (time.monotonic() - started), "note": note}
    with (out / _ROWS).open("a") as file:
        file.write(json.dumps({"part": part} | took) + "\n")
    (out / _TABLE).write_text("\n".join(_page(_read(out / _ROWS))))
    return not note


def _read(rows: Path) -> list[dict[str, Any]]:
    """The rows that were written to their end; a part that is cut off may leave half a line."""
    found = []
    for line in rows.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _page(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    about = next((row["about"] for row in rows if "about" in row), {})
    yield from (f"- {name}: {value}" for name, value in about.items())
    for part in dict.fromkeys(row["part"] for row in rows):
        yield f"\n### {part}\n"
        yield table([row for row in rows if row["part"] == part], COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
