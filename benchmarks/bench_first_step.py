"""What a user waits for: imports, ``--help``, and the real command up to the end of its first training step.

Each call is a process of its own, timed from its start to its end. The first-step command also saves its checkpoint
and metrics; the accuracy column compares the loss that it wrote with a cold and with a warm compilation cache.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cases, harness
from benchmarks.harness import Program

COLUMNS = {
    "name": "process", "median_ms": "median ms", "p10_ms": "p10", "p90_ms": "p90", "speedup": "speed-up",
    "speedup_p10": "p10", "speedup_p90": "p90", "over": "over", "loss_error": "loss error",
}  # fmt: skip

_ROOT = Path(__file__).resolve().parents[1]
_ONE_STEP = ("--models.pretrained.steps", "1", "--models.pretrained.chunk_steps", "1")
_CLI = "import sys; from jaxsafety.cli.main import main; sys.exit(main())"


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each process: imports first, then the first step."""
    programs = [Program(case.name, partial(_python, "-c", case.code)) for case in cases.PROCESSES]
    yield from _rows(harness.race(programs, rounds=cases.PROCESS_ROUNDS))
    with tempfile.TemporaryDirectory() as scratch:
        yield from _rows(_race_first_step(Path(scratch)))


def _race_first_step(scratch: Path) -> list[tuple[harness.Record, Any]]:
    cold = Program("first step, cold cache", lambda: first_step(_fresh(scratch), out=_fresh(scratch)))
    warm_cache = _fresh(scratch)
    first_step(warm_cache, out=_fresh(scratch))
    warm = Program("first step, warm cache", lambda: first_step(warm_cache, out=_fresh(scratch)))
    return harness.race([cold, warm], rounds=cases.FIRST_STEP_ROUNDS, warmups=0)


def _rows(results: list[tuple[harness.Record, Any]]) -> Iterator[dict[str, Any]]:
    baseline, expected = results[0]
    for record, loss in results:
        ratio = harness.speedup(record, over=baseline)
        accuracy = {} if expected is None else {"loss_error": harness.max_relative_error(loss, expected)}
        yield asdict(record) | accuracy | {
            "over": baseline.name, "speedup": ratio.median, "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
        }  # fmt: skip


def first_step(cache: Path, *, out: Path) -> float:
    """Runs the command for one step of pretraining; returns the loss that it wrote.

    Raises:
        RuntimeError: the command failed.
    """
    recipe = str(_ROOT / cases.FIRST_STEP_RECIPE)
    options = ("--out", str(out), "--compilation_cache", str(cache))
    _python("-c", _CLI, "pretrain", recipe, *_ONE_STEP, *options)
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def _fresh(scratch: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=scratch))


def _python(*arguments: str) -> None:
    _run([sys.executable, *arguments])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
