"""Recipes on disk: YAML and command-line overrides in, a checked Recipe out; and the resolved YAML back.

Parsing, typing and unknown-key detection are jsonargparse's; this module turns its answers into one sentence each.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from jaxsafety.config import yaml12
from jaxsafety.config.fields import hints_of
from jaxsafety.config.names import EARLIER, model_named, nearest, other_version
from jaxsafety.config.told import told_of
from jaxsafety.recipe import graph, suited
from jaxsafety.recipe.models import Training, kind_of
from jaxsafety.recipe.nodes import PLACES, SubjectConfig, known, nodes, subject
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.subjects.checkpoint import is_verdict_file
from jaxsafety.world.loading import is_file

jsonargparse.set_loader("yaml 1.2", yaml12.load, exceptions=(yaml.YAMLError,))
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "tuple": "a list",
    "dict": "a mapping {name: value}",
}
# Sections of earlier versions, and what they are now.
_GONE = {
    "pretrain": "a model without `from`, such as `models: {pretrained: {method: pretrain, steps: 700, lr: 0.02}}`; "
    "what was its `learning_rate` is `lr`, and its `mixture` is `data`",
    "tune": "a model for each of its methods, such as `models: {sft: {from: pretrained, method: sft, steps: 600, "
    "lr: {eta_M: 2.0e-3}}}`; what was `p_unsafe` and `mix` is below `data`",
    "world": "a field of `subject`, such as `subject: {world: tiny}`",
    "grammars": "a field of `subject`, such as `subject: {world: tiny, grammars: {safe: own.pcfg}}`",
    "model": "a field of `subject`, such as `subject: {world: tiny, model: {preset: tiny}}`",
}
# Fields of a subject that name a model.
_MODELS = ("checkpoint", "tokenizer")
# Keys of earlier versions below ``analyze``.
_MOVED = {
    "energy": "analyses.output_space.energy, and energy of the edits `space_part`",
    "directions": "analyses.output_space.directions, and of input_space and alignment",
    "sensitivity_prompts": "analyses.sensitivity.prompts",
    "jacobian_prompts": "analyses.sensitivity.jacobian_prompts",
    "gradient_prompts": "analyses.gradients.prompts",
    "intervention_prompts": "analyze.edit_prompts",
    "alphas": "alpha of the edits `scaled`, such as edits.whole.alpha",
    "ranks": "edits.rank.rank",
    "soft_tokens": "attacks.soft_tokens.count",
    "soft_steps": "attacks.soft_tokens.steps",
    "prefill_depths": "attacks.prefill.depth",
}


def read(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; fields that the file does not name keep their defaults, and ``name`` the file's.

    Overrides are command-line words such as ``--models.sft.steps 800``.

    Raises:
        ValueError: missing, empty or malformed file; unknown key (the nearest is named); wrong type; bad value.
    """
    written = yaml12.read(path)
    _check_sections(written, where=str(path))
    overrides, of_nodes = _split(overrides)

    def values(parser: ArgumentParser) -> Any:
        parsed = parser.parse_args(["--config", str(path), *overrides])
        _check_names(parsed.as_dict(), where=str(path))
        _fill(parsed, of_nodes, where=str(path))
        return parsed

    settings = _parsed(str(path), values)
    settings["subject"] = _subject_beside(path, settings["subject"])
    settings["models"] = {label: _model_beside(path, given) for label, given in settings["models"].items()}
    files = {f"subject.{name}" for name in _file_fields(settings["subject"].options)}

    def beside(name: str, value: Any) -> Any:
        own_world = name == "subject.world" and isinstance(value, str) and is_file(value)
        if name.removeprefix("subject.") in _MODELS and isinstance(value, str):
            return model_named(value, beside=path.parent)
        of_file = name.startswith("subject.grammars.") or name in files or own_world
        return _beside(path, str(value)) if of_file and value is not None else value

    settings["grid"] = {name: tuple(beside(name, one) for one in given) for name, given in settings["grid"].items()}
    if "name" not in written and settings["name"] == Recipe.name:
        settings["name"] = path.stem
    return Recipe(**settings)


def _fill(parsed: Any, of_nodes: Sequence[tuple[str, str, str, Any]], *, where: str) -> None:
    """Fills parsed settings with what the subject has by default, and with the command line's fields of nodes."""
    given = as_dict(parsed["subject"])
    for place, _, name, value in of_nodes:
        if place == "subject":
            given = _at(given if isinstance(given, dict) else {}, name.split("."), value)
    with told_of(where):
        parsed["subject"] = subject(given)
    parsed["models"] = suited.models(parsed["subject"], parsed["models"])
    for place in PLACES:
        given = suited.default_nodes(place, parsed["subject"]) if parsed[place] is None else parsed[place]
        if isinstance(given, dict):
            parsed[place] = {label: as_dict(node) for label, node in given.items()}
    for place, label, name, value in of_nodes:
        if place == "models":
            _override(parsed[place], label, name.split("."), value)
        if place not in PLACES:
            continue
        _check_label(place, label, parsed[place], {other[2] for other in of_nodes if other[:2] == (place, label)})
        before = parsed[place].get(label, {})
        parsed[place][label] = {**(before if isinstance(before, dict) else {}), name: value}


def _split(overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str, Any]]]:
    """Takes the fields of nodes out of command-line words: jsonargparse would replace all of a node by one field.

    Returns:
        The other words; place, label, field and value of those.
    """
    rest, found = [], []
    words, places = iter(overrides), "|".join(map(re.escape, PLACES))
    patterns = (rf"--({places})\.([^=]+)\.([^.=]+)", r"--(models)\.([^.=]+)\.([^=]+)", r"--(subject)\.()([^=]+)")
    for word in words:
        if word.partition("=")[0] == "--config":
            raise ValueError("--config: the recipe is the file that is named: expected its fields as options beside it")
        if (gone := re.match(r"--(\w+)[.=]?", word)) and gone[1] in _GONE:
            raise ValueError(f"{word.partition('=')[0]}: `{gone[1]}` is now {_GONE[gone[1]]}")
        found_as = (re.fullmatch(rf"{pattern}(?:=(.*))?", word, flags=re.DOTALL) for pattern in patterns)
        named = next(filter(None, found_as), None)
        if not named:
            rest.append(word)
            continue
        value = named[4] if named[4] is not None else next(words, None)
        if value is None or value.startswith("--"):
            raise ValueError(f"{word} has no value: expected one behind it")
        found.append((named[1], named[2], named[3], plain_value(word.partition("=")[0], value)))
    return rest, found


def _check_label(place: str, label: str, labels: Mapping[str, Any], given: set[str]) -> None:
    """Refuses a label of the command line that names nothing, and by none of its fields says what it is to be."""
    of = PLACES[place]
    if label not in labels and label not in known(of.FOLDER) and fields(of)[0].name not in given:
        raise ValueError(f"--{place}.{label}: there is no {label!r} in this recipe{nearest(label, labels)}")


def _override(models: dict[str, Any], pattern: str, path: Sequence[str], value: Any) -> None:
    """Sets a field of a model, or of all that are trained whose names match a pattern such as ``*``."""
    exact = pattern in models
    chosen = [label for label in fnmatch.filter(models, pattern) if exact or kind_of(models[label] or {}) is Training]
    if not chosen and not re.fullmatch(r"[\w+-]+", pattern):
        raise ValueError(f"--models.{pattern}: no model of this recipe matches: expected one of {', '.join(models)}")
    if not chosen and path != ["method"]:
        raise ValueError(f"--models.{pattern}: there is no {pattern!r} in this recipe{nearest(pattern, models)}")
    for label in chosen or [pattern]:
        models[label] = _at(models.get(label) or {}, path, value)


def _at(fields_: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Fields with another value at a path."""
    first, *rest = path
    below = fields_.get(first)
    return {**fields_, first: _at(below if isinstance(below, dict) else {}, rest, value) if rest else value}


def plain_value(name: str, text: str) -> Any:
    """Returns what a word on the command line stands for, as YAML reads it.

    Raises:
        ValueError: it is not YAML; the option is named.
    """
    try:
        return yaml12.load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {text!r} is no value: {' '.join(str(error).split())}") from error


def _beside(path: Path, file: str) -> str:
    # No shell has seen a recipe.
    return str((path.parent / os.path.expanduser(file)).resolve())


def _subject_beside(path: Path, about: SubjectConfig) -> SubjectConfig:
    """A subject whose files and grammars lie beside the recipe's."""
    own = about.options
    files: dict[str, Any] = {}
    for name in _file_fields(own):
        if (file := getattr(own, name)) is not None:
            place = model_named(str(file), beside=path.parent) if name in _MODELS else _beside(path, str(file))
            files[name] = type(file)(place)
    if hasattr(own, "grammars"):
        files["grammars"] = {name: _beside(path, file) for name, file in own.grammars.items()}
        if is_file(own.world):
            files["world"] = _beside(path, own.world)
    if judges := getattr(own, "judges", None):
        files["judges"] = tuple(_beside(path, one) if is_verdict_file(one) else one for one in judges)
    return replace(about, options=replace(own, **files)) if files else about


def _file_fields(own: Any) -> list[str]:
    """The fields of a subject that are files: those of type ``Path``, and ``checkpoint``, which may hold a pattern."""
    hints = hints_of(type(own))
    return [name for name, kind in hints.items() if Path in (kind, *get_args(kind)) or name == "checkpoint"]


def _model_beside(path: Path, given: Any) -> Any:
    """A model whose files, and runs to reuse, lie beside the recipe's file."""
    if not isinstance(given, dict):
        return given
    if isinstance(given.get("checkpoint"), str):
        given = given | {"checkpoint": model_named(given["checkpoint"], beside=path.parent)}
    if isinstance(given.get("data"), dict) and given["data"].get("file"):
        given = given | {"data": given["data"] | {"file": _each_beside(path, given["data"]["file"])}}
    if not isinstance(given.get("from"), dict) or not given["from"].get("run"):
        return given
    return given | {"from": given["from"] | {"run": _each_beside(path, given["from"]["run"])}}


def _each_beside(path: Path, named: Any) -> Any:
    """A file, a list of files or named ones, beside the recipe's."""
    if isinstance(named, dict):
        return {name: _beside(path, str(file)) for name, file in named.items()}
    return [_beside(path, str(file)) for file in named] if isinstance(named, list) else _beside(path, str(named))


def parse(content: dict[str, Any], *, where: str) -> Recipe:
    """Returns the recipe of plain data such as ``as_dict`` makes, checked as a file's would be.

    Raises:
        ValueError: as :func:`read`; ``where`` stands for the file's path.
    """
    _check_fields(content, Recipe, where=where)
    return Recipe(**_parsed(where, lambda parser: parser.parse_object(content)))


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="jaxsafety", exit_on_error=False, parser_mode="yaml 1.2")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    return parser


def _parsed(where: str, values_of: Callable[[ArgumentParser], Any]) -> dict[str, Any]:
    parser = _parser()
    try:
        parsed = values_of(parser)
        _check_names(parsed.as_dict(), where=where)
        _check_nulls(Recipe, parsed.as_dict(), where=where)
        with told_of(where):
            parsed["subject"] = subject(as_dict(parsed["subject"]))
            graph.expand(suited.models(parsed["subject"], parsed["models"]))
            for place in PLACES:
                if parsed[place] is not None:
                    parsed[place] = nodes(place, parsed[place])
            values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(_sentence(str(error), where=where)) from error
    except OverflowError as error:
        raise ValueError(f"{where}: a number is too large: {error}") from error
    return {f.name: getattr(values, f.name) for f in fields(Recipe)}


def recorded(directory: Path) -> Recipe | None:
    """Returns the recipe that a study's directory records; None for results alone.

    Raises:
        ValueError: it is none, or names something that is not there any more.
    """
    path = directory / "config.yaml"
    return read(path) if path.exists() else None


def to_yaml(recipe: Recipe) -> str:
    """Returns the fully resolved recipe as YAML; reading it gives an equal recipe."""
    return yaml12.dump(as_dict(recipe))


def _check_sections(content: dict[str, Any], *, where: str) -> None:
    """Refuses what jsonargparse would ignore: a section that is no mapping, and an unknown one that holds nothing."""
    if Path(where).name == "config.yaml" and content.keys() & {*EARLIER}:
        raise ValueError(other_version(Path(where).parent))
    for name, now in _GONE.items():
        if name in content:
            raise ValueError(f"{where}: `{name}` is now {now}")
    for name, kind in hints_of(Recipe).items():
        if name in content and content[name] is None:
            raise ValueError(f"{where}: {name} is empty: give it a value or leave the field out")
        if (is_dataclass(kind) or name == "subject") and not isinstance(content.get(name, {}), dict):
            raise ValueError(f"{where}: {name} must hold fields, got {content[name]!r}")
    for name in content.get("analyze", {}):
        if name in _MOVED:
            raise ValueError(f"{where}: analyze.{name} is called {_MOVED[name]}")
    _check_fields(content, Recipe, where=where)


def _check_fields(content: dict[str, Any], of: type, *, where: str, below: str = "") -> None:
    known = hints_of(of)
    for name, value in content.items():
        if name not in known:
            expected = f"expected one of {', '.join(known)}{nearest(name, known)}"
            raise ValueError(f"{where}: unknown field {below + name!r}: {expected}")
        if is_dataclass(known[name]) and isinstance(value, dict):
            _check_fields(value, known[name], where=where, below=f"{name}.")


def _check_names(content: dict[Any, Any], *, where: str) -> None:
    """Refuses a key on the command line that is no text; those of the file have been looked at."""
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{where} has a key that is no text: put {name!r} in quotes or rename it")
        if isinstance(value, dict):
            _check_names(value, where=where)


def _check_nulls(config: type, values: dict[str, Any], *, where: str, prefix: str = "") -> None:
    """Refuses a field left empty that must have a value, which jsonargparse would pass on as None."""
    for name, kind in hints_of(config).items():
        value, inner = values.get(name), [part for part in get_args(kind) if is_dataclass(part)]
        if name in values and value is None and type(None) not in get_args(kind):
            raise ValueError(f"{where}: {prefix}{name} is empty: give it a value or leave the field out")
        if is_dataclass(kind) and isinstance(value, dict):
            _check_nulls(kind, value, where=where, prefix=f"{prefix}{name}.")
        if inner and isinstance(value, dict):
            for label, item in value.items():
                if isinstance(item, dict):
                    _check_nulls(inner[0], item, where=where, prefix=f"{prefix}{name}.{label}.")


def _sentence(message: str, *, where: str) -> str:
    """Turns a jsonargparse message into one sentence, with the nearest known name for an unknown one."""
    text = " ".join(message.replace("typing.", "").split())
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    value = re.search(r"Expected a Literal\[(.+?)\]\. Got value: (\S+)", text)
    if value:
        known = value[1].replace("'", "").split(", ")
        text = text.replace(value[0], f"expected one of {', '.join(known)}, got {value[2]!r}{nearest(value[2], known)}")
    text = text.replace("[dict[str, Any], NoneType]", "[dict]")  # null is refused above
    any_of = (
        r"Does not validate against any of the Union subtypes Subtypes: \[((?:[\w, ]|\[[^]]*\])+)\].* Given value: (.*)"
    )

    def told(found: re.Match[str]) -> str:
        types = re.sub(r"\[[^]]*\]", "", found[1])
        return f"expected {_kind(*types.split(', '))}, got {found[2]}"

    text = re.sub(any_of, told, text)
    one = r"Expected a (\w+)( with \d+ elements)?\. Got value: "
    text = re.sub(one, lambda found: f"expected {_kind(found[1])}{found[2] or ''}, got ", text)
    if section := re.match(r"Parser key \"(\w+)\": Unable to load config '(.*?)'", text):
        first = next(_keys(hints_of(Recipe)[section[1]], f"--{section[1]}."))
        text = f"--{section[1]}: got {section[2]!r}, expected a field of it, such as {first}"
    if word := re.search(r"[Uu]nrecognized arguments?: -*([\w.-]+)", text):
        known = set(_keys(Recipe))
        text += nearest(word[1], known) or nearest(word[1].partition(".")[0], known)
    text = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", text)
    return f"{where}: {text}"


def _kind(*types: str) -> str:
    return " or ".join(_KINDS.get(name, name) for name in types)


def _keys(config: type, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields; those of a mapping's values come right below the mapping's name."""
    for name, kind in hints_of(config).items():
        yield prefix + name
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from _keys(inner, f"{prefix}{name}.")
