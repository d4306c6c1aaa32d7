"""Progress on pipes and terminals."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxsafety.rundir import progress


def _console(**options) -> Console:
    return Console(file=io.StringIO(), width=200, color_system=None, **options)


def test_progress_on_a_pipe_is_a_plain_line_every_few_seconds_and_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    console = _console(force_terminal=False)
    with progress.track(2000, label="tune dpo", start=1000, seeds=8, console=console) as update:
        for step in range(1100, 1900, 100):
            now[0] += 20.0 if step == 1100 else 2.0  # the first chunk compiles
            update(step, {"loss": 0.25, "exact_match": 0.5})
    assert console.file.getvalue().splitlines() == [
        "tune dpo: step 1100/2000, loss 0.25, exact match 0.5, 8 seeds, 5 steps/s, 0:03:00 left",
        "tune dpo: step 1400/2000, loss 0.25, exact match 0.5, 8 seeds, 50 steps/s, 0:00:12 left",
        "tune dpo: step 1700/2000, loss 0.25, exact match 0.5, 8 seeds, 50 steps/s, 0:00:06 left",
        "tune dpo: step 1800/2000, loss 0.25, exact match 0.5, 8 seeds, 50 steps/s, 0:00:04 left",
    ]


def test_progress_shows_the_last_update_of_a_failing_stage():
    console = _console(force_terminal=False)
    with pytest.raises(KeyError), progress.track(10, label="edit", unit="tensor", console=console) as update:
        update(1, {})
        update(2, {})
        raise KeyError
    assert [line.partition(",")[0] for line in console.file.getvalue().splitlines()] == [
        "edit: tensor 1/10",
        "edit: tensor 2/10",
    ]


def test_progress_on_a_terminal_is_a_live_bar():
    console = _console(force_terminal=True, force_interactive=True)
    with progress.track(10, label="[tune]", seeds=1, console=console) as update:
        update(4, {"loss": 0.5})
        update(10, {"loss": 0.25})
    final = console.file.getvalue().split("\r")[-1]
    assert "[tune]" in final
    assert "10/10, loss 0.25, 1 seed" in final
