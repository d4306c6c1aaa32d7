"""``jaxsafety new KIND NAME``: a commented file to begin with, which runs as it is."""

import argparse
import importlib.resources
import keyword
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxsafety.cli.declared import path
from jaxsafety.config.names import check_name
from jaxsafety.rundir import atomic

_KINDS = {
    "recipe": ".yaml",
    "method": ".py",
    "edit": ".py",
    "attack": ".py",
    "analysis": ".py",
}
_LIES = "    # where this file lies in the working directory"
_NEXT = {
    "recipe": "jaxsafety run {file} --dry_run    # what it needs; without --dry_run it is run",
    "method": "method: {module}:METHOD" + _LIES,
    "edit": "edits: {{mine: {{edit: {module}:EDIT}}}}" + _LIES,
    "attack": "attacks: {{mine: {{attack: {module}:ATTACK}}}}" + _LIES,
    "analysis": "analyses: {{mine: {{analysis: {module}:ANALYSIS}}}}" + _LIES,
}


def add_to(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb to a parser, by what adds one to it."""
    new = add("new", run, "write a commented file to begin with: a recipe, or a method, edit, attack or analysis")
    new.add_argument("kind", metavar="KIND", help=", ".join(_KINDS))
    new.add_argument("name", metavar="NAME", help="of the file, without its ending")
    new.add_argument("--out", type=path, default=Path(), metavar="DIR", help="where (default: the working directory)")


def run(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Writes the file and prints where it is and how it is used; returns the exit code.

    Raises:
        ValueError: an unknown kind, a name that cannot be imported, or a file of that name is there.
        OSError: it cannot be written.
    """
    kind, name = options.kind, options.name
    check_name("kind", kind, _KINDS)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"NAME: got {name!r}, expected letters, digits and _ that Python can import, such as mine")
    file = options.out / f"{name}{_KINDS[kind]}"
    if file.exists():
        raise ValueError(f"{file} is there: choose another name, or move it away")
    source = importlib.resources.files("jaxsafety.cli").joinpath("starter_files", f"{kind}{_KINDS[kind]}.txt")
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.atomic_write(file, source.read_text(encoding="utf-8").replace("{NAME}", name))
    print(f"{file}\n{_NEXT[kind].format(file=file, module=name)}")
    return 0
