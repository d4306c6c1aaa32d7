"""Where a compiled program's time goes: its operations by kind, from XLA's text and a profiler's trace.

The caller names scopes of its own kinds and runs the model under ``MODEL``, whose operations are products (of
activations with weights, of attention), what touches attention's ``[t, t]`` scores, and everything else.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax

Interval = tuple[float, float, str]

MODEL = "model"
WEIGHTS, ATTENTION, SOFTMAX, REST = "weight products", "attention products", "attention softmax", "other model"

# They contain other operations, which are counted themselves.
_CONTAINERS = {"while", "call", "conditional"}
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_SHAPE = re.compile(r"\[([\d,]*)\]")


def kinds(text: str, *, tokens: int, scopes: Sequence[str], default: str) -> dict[str, str]:
    """Returns the kind of every operation of a compiled program that does work itself, by name.

    Args:
        text: ``compiled.as_text()``.
        tokens: ``t``, which must be no other size of the program.
        scopes: named scopes that are kinds of their own.
        default: kind of what is under neither those scopes nor the scope ``MODEL``.
    """
    bodies = _bodies(text)
    found = {}
    for lines in bodies.values():
        for name, shape, opcode, rest in lines:
            if opcode in _CONTAINERS:
                continue
            inside = _inside(rest, bodies)
            path = _path([rest, *(one[3] for one in inside)])
            scope = next((scope for scope in scopes if scope in path), None)
            # What XLA itself inserted has no path: copies, almost all of the model's activations.
            in_model = not path or MODEL in path
            found[name] = scope or (_model_kind(shape, opcode, inside, rest, tokens=tokens) if in_model else default)
    return found


def dot_gflop(text: str, kind_of: Mapping[str, str]) -> dict[str, float]:
    """Returns the matrix products' work by kind, in 1e9 multiplications and additions, each operation run once."""
    work: dict[str, float] = defaultdict(float)
    for lines in _bodies(text).values():
        shapes = {name: _sizes(shape) for name, shape, _, _ in lines}
        for name, _, opcode, rest in lines:
            if opcode == "dot":
                left = shapes[re.findall(r"%?([\w.-]+)", rest)[0]]
                summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1)
                inner = prod(left[int(axis)] for axis in summed.split(",") if axis)
                work[kind_of[name]] += 2e-9 * prod(shapes[name]) * inner
    return dict(work)


def _bodies(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    lines: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = bodies.setdefault(header[1], [])
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction.groups())
    return bodies


def _sizes(shape: str) -> list[int]:
    listed = _SHAPE.search(shape)
    return [int(size) for size in listed[1].split(",") if size] if listed else []


def _inside(rest: str, bodies: Mapping[str, Any]) -> Sequence[tuple[str, str, str, str]]:
    called = re.search(r"calls=%?([\w.-]+)", rest)
    return bodies.get(called[1], []) if called else []


def _path(attributes: Sequence[str]) -> str:
    named = (re.search(r'op_name="([^"]*)"', one) for one in attributes)
    return next((path[1] for path in named if path), "")


def _model_kind(shape: str, opcode: str, inside: Sequence[tuple[str, str, str, str]], rest: str, *, tokens: int) -> str:
    touched = [shape, *(inner_shape for _, inner_shape, _, _ in inside)]
    scores = any(_sizes(one)[-2:] == [tokens, tokens] for one in touched)
    if "dot" in (opcode, *(inner_opcode for _, _, inner_opcode, _ in inside)):
        return ATTENTION if scores or _is_batched(rest, inside) else WEIGHTS
    return SOFTMAX if scores else REST


def _is_batched(rest: str, inside: Iterable[tuple[str, str, str, str]]) -> bool:
    return any("lhs_batch_dims={0" in one for one in (rest, *(inner_rest for _, _, _, inner_rest in inside)))


def trace(call: Callable[[], Any], *, text: str) -> tuple[list[tuple[float, float, str]], float]:
    """Runs a program under jax's profiler.

    Args:
        call: runs the program.
        text: its ``compiled.as_text()``; what other programs do meanwhile, such as make its inputs, is left out.

    Returns:
        Start and end in milliseconds, and name, of every operation of it that ran; and how long the call took.
    """
    module = re.match(r"HloModule ([\w.-]+)", text).group(1)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options), jax.profiler.TraceAnnotation("whole call"):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = [
            (event.name, event.start_ns / 1e6, event.duration_ns / 1e6, dict(event.stats))
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
        ]
    # A parallel operation's event ends when its work is handed out; an event of its own marks when that is done.
    ends = {stats["_c"]: start + took for name, start, took, stats in events if name.startswith("end: ")}
    ran = [
        (start, max(start + took, ends.get(stats.get("_p"), 0.0)), stats["hlo_op"])
        for _, start, took, stats in events
        if stats.get("hlo_module") == module
    ]
    return ran, next(took for name, _, took, _ in events if name == "whole call")


def shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """Returns the time by kind; where several run at once, each gets an equal part of that time.

    Args:
        intervals: start, end and kind of each operation.
    """
    edges = sorted([(start, 1, kind) for start, _, kind in intervals] + [(end, -1, kind) for _, end, kind in intervals])
    running: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    before = 0.0
    for at, change, kind in edges:
        if count := sum(running.values()):
            for name, times in running.items():
                total[name] += (at - before) * times / count
        running[kind] += change
        before = at
    return dict(total)
