"""Options of a command that are the fields of a record, read from its source: a help text starts no jax.

No default is typed twice, and ``--config FILE`` gives any of a command's options from YAML; the command line wins.
"""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from jaxsafety.config import tables
from jaxsafety.config.names import model_named, nearest
from jaxsafety.rundir.printed import Form

_CONFIG = "--config"
TRACEBACK = "--traceback"
# Options without a value.
_SWITCHES = ("full", "dry_run", "print_config")


class Parser(argparse.ArgumentParser):
    """Ends the process with exit code 2 and one sentence on a word that it does not know; the nearest known is told.

    Options have no abbreviations, and every help text says what ``--traceback`` does.
    """

    def __init__(self, **named: Any):
        about = f"With {TRACEBACK}, anywhere, a sentence about bad input comes with the lines that it comes from."
        epilog = "\n\n".join(filter(None, (named.pop("epilog", None), about)))
        super().__init__(**({"allow_abbrev": False} | named), epilog=epilog)

    @property
    def known(self) -> list[str]:
        """Its options."""
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        """Exits."""
        if chosen := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            known = chosen[2].replace("'", "").split(", ")
            message = message.replace(
                chosen[0], f"got {chosen[1]!r}, expected one of {', '.join(known)}{nearest(chosen[1], known)}"
            )
        elif typed := re.search(r"invalid (int|float) value: (.*)", message):
            kind = {"int": "an integer", "float": "a number"}[typed[1]]
            message = message.replace(typed[0], f"got {typed[2]}, expected {kind}")
        elif unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += nearest(unknown[1], self.known)
        self.exit(2, f"jaxsafety: {message}\n")


class Option(NamedTuple):
    """An option that is a field of a recipe.

    Attributes:
        name: of the option.
        module, record, field: the record of whose source its meaning and default are.
        place: dotted, in the recipe.
        instead: the name of a constant of ``jaxsafety.subjects.checkpoint`` whose default comes before the record's.
    """

    name: str
    module: str
    record: str
    field: str
    place: str
    instead: str = ""

    @property
    def declared(self) -> tables.Declared:
        """The field as its source declares it."""
        return next(one for one in tables.fields_of(self.module, self.record) if one.name == self.field)

    @property
    def default(self) -> str | None:
        """Its default as a help text shows it."""
        found = tables.constant("jaxsafety.subjects.checkpoint", self.instead) if self.instead else {}
        return str(found[self.field]) if self.field in found else self.declared.default


def path(text: str) -> Path:
    """Returns a path that a user gives, ``~`` in it being the home; an empty one, as of a variable not set, is none."""
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path, expected a place such as runs/mine")
    return Path(os.path.expanduser(text))


# Of an argument that names a model.
MODEL = "Hugging Face directory, GGUF file, or name on the Hub, ORG/NAME[@REVISION]; with a PEFT adapter, BASE+ADAPTER"


def model(text: str) -> str:
    """Returns what names a model that a user gives; see :func:`jaxsafety.config.names.model_named`."""
    path(text)  # an empty one is refused
    return model_named(text, beside=Path.cwd())


def add(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Adds options, each with what the record's source says of it."""
    for option in options:
        one, default = option.declared, option.default
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if one.type == "bool" else {}
        known = "" if default is None else f" (default: {default})"
        parser.add_argument(
            f"--{option.name}", default=argparse.SUPPRESS, metavar="VALUE",
            help=f"{one.doc.rstrip('.')}{known}".replace("%", "%%"), **flag,
        )  # fmt: skip


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds what every command with such options has."""
    parser.add_argument(_CONFIG, metavar="FILE", help="YAML of options by name, over which the command line wins")
    parser.add_argument("--print_config", action="store_true", help="print the recipe that this stands for, and stop")
    add_format(parser)
    add_cache(parser)


def add_format(parser: argparse.ArgumentParser, *more: str, about: str = "") -> None:
    """Adds the form of what a command prints, and ``more`` of them."""
    parser.add_argument("--format", choices=(*get_args(Form), *more), default="table",
                        help=f"of what is printed (default: table){about}")  # fmt: skip


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Adds where compiled programs are kept."""
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
    from jaxsafety.config import yaml12  # a help text reads no YAML

    word = arguments[named[-1]]
    path = word.removeprefix(f"{_CONFIG}=") if "=" in word else next(iter(arguments[named[-1] + 1 :]), "")
    found = []
    for name, value in yaml12.read(Path(path), what="options", such="lr: 1e-4").items():
        if name in _SWITCHES:
            found += [f"--{name}"] * bool(value)
        elif value is None or isinstance(value, bool):
            found.append(f"--{name}={'null' if value is None else str(value).lower()}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"--{name}={text}")
    return found


def value(option: Option, text: str) -> Any:
    """Returns what a word on the command line stands for: text, a list separated by commas, or a value of YAML's."""
    from jaxsafety.recipe import yaml_file

    kind = option.declared.type
    if kind.startswith("tuple") and not text.strip().startswith("["):
        return [yaml_file.plain_value(f"--{option.name}", part) for part in text.split(",") if part.strip()]
    return text if kind in ("str", "Path") else yaml_file.plain_value(f"--{option.name}", text)
