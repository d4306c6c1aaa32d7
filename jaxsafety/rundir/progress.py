"""Live progress of long stages: a bar on a terminal, plain lines elsewhere. rich is imported only when shown."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_INTERVAL_S = 5.0


def say(text: str) -> None:
    """Shows a line of its own among the progress of stages, on standard error."""
    _console().print(f"jaxsafety: {text}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def track(
    total_steps: int, *, label: str, start: int = 0, seeds: int | None = None, unit: str = "step",
    console: "Console | None" = None,
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:  # fmt: skip
    """Shows the progress of a stage: a live bar on a terminal, else a plain line at most every few seconds.

    The last update always shows. Speed and time left count only steps done in this process, and leave out those
    before the first update where they can, because they include the compilation.

    Args:
        total_steps: the step at which the stage ends.
        label: the stage, e.g. ``tune dpo``.
        start: the step that the stage resumes from.
        seeds: number of seeds trained together, shown if given.
        unit: what one of them is called.
        console: where to show it; standard error if None.

    Yields:
        ``update(step, metrics)``, to be called as often as wanted with host numbers, e.g. ``{"loss": 0.3}``.
    """
    console = _console() if console is None else console
    anchors = [(start, time.monotonic())]

    def status(step: int, metrics: Mapping[str, float]) -> str:
        now = time.monotonic()
        # anchors: the start, then the first update, after which nothing compiles any more.
        (base, since) = anchors[-1]
        speed = (step - base) / (now - since) if step > base and now > since else None
        if len(anchors) == 1:
            anchors.append((step, now))
        return ", ".join(_status(metrics, seeds, speed, total_steps - step, unit))

    show = _live if console.is_interactive else _plain_lines
    with show(console, f"{label}: {unit}", start, total_steps) as render:
        yield lambda step, metrics: render(step, status(step, metrics))


def _console() -> "Console":
    import jax
    from rich.console import Console

    # Of several processes one speaks.
    return Console(stderr=True, quiet=jax.process_index() > 0)


@contextmanager
def _live(console: "Console", label: str, start: int, total: int) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(12, table_column=Column(min_width=12)),
        # The text wraps on a narrow terminal; left to itself, rich would give up the bar first.
        TextColumn("{task.completed}/{task.total}, {task.fields[status]}", markup=False, table_column=Column()),
    )
    # Output that the caller pipes elsewhere must not end up in the bar's console.
    with Progress(*columns, console=console, redirect_stdout=False, refresh_per_second=4) as bar:
        task = bar.add_task(label, total=total, completed=start, status="starting")
        yield lambda step, text: bar.update(task, completed=step, status=text)


@contextmanager
def _plain_lines(console: "Console", label: str, start: int, total: int) -> Iterator[Callable[[int, str], None]]:
    last_shown, pending = -math.inf, None

    def flush() -> None:
        nonlocal last_shown, pending
        if pending is not None:
            console.print(pending, soft_wrap=True, markup=False, highlight=False)
            last_shown, pending = time.monotonic(), None

    def render(step: int, text: str) -> None:
        nonlocal pending
        pending = f"{label} {step}/{total}, {text}"
        if time.monotonic() - last_shown >= _PLAIN_INTERVAL_S:
            flush()

    try:
        yield render
    finally:
        flush()


def _status(
    metrics: Mapping[str, float], seeds: int | None, speed: float | None, left: int, unit: str
) -> Iterator[str]:
    for name, value in metrics.items():
        yield f"{name.replace('_', ' ')} {float(value):.4g}"
    if seeds is not None:
        yield f"{seeds} seeds" if seeds != 1 else "1 seed"
    if speed is not None:
        yield f"{speed:.3g} {unit}s/s" if speed < 100 else f"{speed:.0f} {unit}s/s"
        seconds = round(max(left, 0) / speed)
        yield f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
