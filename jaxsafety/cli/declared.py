"""Options of a command that are the fields of a record, read from its source: a help text starts no jax.

No default is typed twice, and ``--config FILE`` gives any of a command's options from YAML; the command line wins.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from jaxsafety.config import tables, yaml12

_CONFIG = "--config"


def add(parser: argparse.ArgumentParser, module: str, record: str, *, leave: Sequence[str] = ()) -> None:
    """Adds an option for every field of a module's record but those to ``leave``."""
    for one in tables.fields_of(module, record):
        if one.name in leave:
            continue
        known = "required" if one.default is None else f"default: {one.default}"
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if one.type == "bool" else {}
        parser.add_argument(
            f"--{one.name}", default=argparse.SUPPRESS, required=one.default is None, metavar="VALUE",
            help=f"{one.doc.rstrip('.')} ({known})".replace("%", "%%"), **flag,
        )  # fmt: skip


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds what every command with such options has."""
    parser.add_argument(_CONFIG, metavar="FILE", help="YAML of options by name, over which the command line wins")
    parser.add_argument("--print_config", action="store_true", help="print all options as such a file and stop")
    parser.add_argument("--compilation_cache", default="~/.cache/jaxsafety", metavar="DIR",
                        help="where compiled programs are kept between runs; 'off' for nowhere")  # fmt: skip


def words(arguments: Sequence[str]) -> list[str]:
    """Returns the words that a ``--config FILE`` among the arguments stands for, none without one.

    Raises:
        ValueError: no file, or not YAML of options.
    """
    named = [place for place, word in enumerate(arguments) if word == _CONFIG or word.startswith(f"{_CONFIG}=")]
    if not named:
        return []
    from jaxsafety.recipe import yaml_file  # starts jax, which a help text should not

    word = arguments[named[-1]]
    path = word.removeprefix(f"{_CONFIG}=") if "=" in word else next(iter(arguments[named[-1] + 1 :]), "")
    found = []
    for name, value in yaml_file.content(Path(path), what="options", such="lr: 1e-4").items():
        if value is True:
            found.append(f"--{name}")
        elif value is not False and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"--{name}={text}")
    return found


def given(options: argparse.Namespace, config: type, **more: Any) -> dict[str, Any]:
    """Returns the fields of a record that options hold, as plain values; ``more`` are others."""
    from jaxsafety.recipe import yaml_file

    hints, found = get_type_hints(config), dict(more)
    for one in fields(config):
        if one.name in found or not hasattr(options, one.name):
            continue
        value = getattr(options, one.name)
        if isinstance(value, str) and get_origin(hints[one.name]) is tuple:
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif isinstance(value, str) and hints[one.name] is not str:
            value = yaml_file.plain_value(f"--{one.name}", value)
        found[one.name] = value
    return found


def print_config(values: Mapping[str, Any]) -> int:
    """Prints options as ``--config`` reads them; returns the exit code."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    sys.stdout.write(yaml12.dump(plain))
    return 0
