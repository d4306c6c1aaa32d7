"""The chat template of a Hugging Face checkpoint: which of its files holds it, and what the program in it sees.

It runs in a sandbox, which knows the messages, the special tokens and nothing else of the machine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxsafety.formats.prompts import Message

_FILE = "chat_template.jinja"
_FOLDER = "additional_chat_templates"
_DEFAULT = "default"
# What a template's own program may raise beside jinja2's errors and those of values.
_OTHERS = (AttributeError, RecursionError, MemoryError)


def find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Returns the source of a checkpoint's chat template, None without any.

    Templates in files take the place of all that ``tokenizer_config.json``, the ``config``, holds; of several the one
    named ``default`` is meant, as in transformers.

    Raises:
        ValueError: a file that is not text; several templates and none of that name; one that is no text.
    """
    named, place = _in_files(directory) or _in_config(config), directory
    if not named:
        return None
    if _DEFAULT not in named:
        raise ValueError(
            f"{place} has chat templates named {', '.join(map(str, named))}: expected one named {_DEFAULT}, or raw text"
        )
    if not isinstance(found := named[_DEFAULT], str):
        raise ValueError(f"{place}: chat_template is a {type(found).__name__}, expected text")
    return found


def _in_files(directory: Path) -> dict[str, Any]:
    # A file of the folder that is named default comes after the one beside it.
    files = {_DEFAULT: directory / _FILE} if (directory / _FILE).is_file() else {}
    files |= {file.name.removesuffix(".jinja"): file for file in sorted((directory / _FOLDER).glob("*.jinja"))}
    return {name: _text(file) for name, file in files.items()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: expected a chat template") from error


def _in_config(config: Mapping[str, Any]) -> dict[Any, Any]:
    found = config.get("chat_template")
    if isinstance(found, list):
        return {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    return found if isinstance(found, dict) else {} if found is None else {_DEFAULT: found}


def compiled(source: str, *, where: Path) -> Any:
    """Returns the program of a template of the checkpoint ``where``; a ValueError says so if it is none."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {where} is not one: {error}") from error


def rendered(
    program: Any, messages: Sequence[Message], *, special: Mapping[str, str], answering: bool, where: Path
) -> str:
    """Returns the text of a conversation; with ``answering`` it goes on to where the assistant's answer begins.

    Raises:
        ValueError: the template refuses the conversation or fails.
    """
    import jinja2

    # Absent tools are defined as none: templates ask for either.
    given = {"messages": [asdict(turn) for turn in messages], "tools": None, "documents": None}
    try:
        return program.render(**given, add_generation_prompt=answering, **special)
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, *_OTHERS) as error:
        # Running out of memory has no words.
        told = str(error) or type(error).__name__
        raise ValueError(f"the chat template of {where} fails on a conversation: {told}") from error


def _environment() -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """``{% generation %}``, by which transformers marks answers; it writes what it encloses."""

        tags = {"generation"}  # noqa: RUF012  (the name and form that jinja2 reads)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment
