"""The recipes that ``tune`` of a checkpoint and ``analyze weights | activations | merge`` stand for."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsafety import methods
from jaxsafety.cli import declared
from jaxsafety.cli.declared import Option
from jaxsafety.config.names import nearest

if TYPE_CHECKING:
    from jaxsafety.recipe.schema import Recipe

# Of models.
BASE, TUNED, MERGED = "pretrained", "tuned", "merged"
# Of --part null_space alone.
ENERGY = Option("energy", "jaxsafety.edits.space_part", "Config", "energy", "")


def _fields(module: str, record: str, names: str, place: str, *, prefix: str = "", instead: str = "") -> list[Option]:
    named = [(name, f"{place}.{name}".strip(".")) for name in names.split()]
    return [Option(prefix + name, f"jaxsafety.{module}", record, name, where, instead) for name, where in named]


_IGNORED = _fields("subjects.checkpoint", "Config", "ignore_config", "subject")
_READS = _fields("subjects.checkpoint", "Config", "columns template special_tokens max_tokens dtype", "subject")
OPTIONS = {
    "tune": [
        *_fields("recipe.models", "Training", "batch_size accumulate lr chunk_steps", "models.tuned",
                 instead="TRAINED"),
        *_fields("training.optim", "OptimConfig", "warmup weight_decay", "models.tuned.optim", instead="OPTIM"),
        *_fields("parametrisations.lora", "Config", "rank alpha targets", "models.tuned.parametrisation",
                 prefix="lora_", instead="ADAPTER"),
        *_READS,
        *_fields("subjects.checkpoint", "Config", "recompute store export", "subject"),
        *_IGNORED,
    ],
    "weights": [
        *_fields("study.checkpoints.weights", "Config", "attention energy method rank include exclude",
                 "analyses.weights"),
        *_IGNORED,
    ],
    "activations": [
        *_fields("study.checkpoints.activations", "Config", "directions", "analyses.activations"),
        *_fields("recipe.schema", "EvaluateConfig", "answers", "evaluate"),
        *_READS,
        *_fields("subjects.checkpoint", "Config", "batch_tokens", "subject"),
        *_IGNORED,
    ],
    "merge": [*_fields("subjects.checkpoint", "Config", "store", "subject"), *_IGNORED],
}  # fmt: skip


def recipe(options: argparse.Namespace) -> "Recipe":
    """Returns the recipe that a command's options stand for.

    Raises:
        ValueError: a bad option.
    """
    return _tuning(options) if options.verb == "tune" else _parsed(_WRITTEN[options.verb](options), options)


def _tuning(options: argparse.Namespace) -> "Recipe":
    """The recipe of a tuning; the steps of epochs are those that the examples make."""
    from jaxsafety.study.checkpoints import files

    if not (options.epochs > 0 and math.isfinite(options.epochs)):
        raise ValueError(f"epochs must be > 0 and finite, got {options.epochs}")
    _check_of_method(options)
    if lost := next((one.name for one in OPTIONS["tune"] if options.full and one.instead == "ADAPTER"
                     and hasattr(options, one.name)), None):  # fmt: skip
        raise ValueError(f"--{lost} is of an adapter: expected none with --full")
    recipe = _parsed(_tune(options, 1 if options.steps is None else options.steps), options)
    if options.steps is not None:
        return recipe
    lane = recipe.lanes_of(TUNED)[0]
    count = len(files.of_training(lane.training, recipe.subject.options))
    return _parsed(_tune(options, math.ceil(options.epochs * count / lane.training.batch_size)), options)


def _check_of_method(options: argparse.Namespace) -> None:
    """Refuses an option that is neither of the command nor of the method."""
    own = [one.name for one in fields(methods.load(options.method).Config)]
    for name in options.of_method:
        if name not in own:
            hint = nearest(name, [*own, *vars(options), *(one.name for one in OPTIONS["tune"])])
            raise ValueError(f"unknown option --{name}: method {options.method} has {', '.join(own) or 'none'}{hint}")


def _tune(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    from jaxsafety.recipe import yaml_file

    own = {name: yaml_file.plain_value(f"--{name}", value) for name, value in options.of_method.items()}
    full = {"parametrisation": {"kind": "full"}, "lr": 1e-5} if options.full else {}
    tuned = {"from": BASE, "method": options.method, "steps": steps} | full | own
    start, seeds = options.start, options.seeds.strip().removeprefix("[").removesuffix("]").split(",")
    return {
        "subject": {"checkpoint": start, "pairs": str(options.data.resolve())},
        "seeds": [yaml_file.plain_value("--seeds", seed) for seed in seeds],
        "models": {BASE: {"checkpoint": start}, TUNED: tuned},
    }  # fmt: skip


def _pair(options: argparse.Namespace) -> dict[str, Any]:
    tuned = {"from": BASE, "checkpoint": options.tuned, "role": "defence"}
    models = {BASE: {"checkpoint": options.base}, TUNED: tuned}
    return {"subject": {"checkpoint": options.base}, "seeds": [0], "models": models}


def _weights(options: argparse.Namespace) -> dict[str, Any]:
    return _pair(options) | {"analyses": {"weights": {}}}


def _activations(options: argparse.Namespace) -> dict[str, Any]:
    from jaxsafety.subjects.checkpoint import is_verdict_file

    content = _pair(options) | {"analyses": {"activations": {}}}
    # Both read what the tuned one, which has a template, was tuned on.
    content["subject"] |= {"prompts": str(options.prompts.resolve()), "tokenizer": options.tuned}
    if options.judges is not None:
        judges = [one.strip() for one in options.judges.strip("[]").split(",") if one.strip()]
        content["subject"]["judges"] = [str(Path(one).resolve()) if is_verdict_file(one) else one for one in judges]
    return content


def _merge(options: argparse.Namespace) -> dict[str, Any]:
    content, edits = _pair(options), list(_edits(options))
    for place, edit in enumerate(edits, 1):
        label = MERGED if place == len(edits) else f"{MERGED}_{place}"
        before = TUNED if place == 1 else f"{MERGED}_{place - 1}"
        content["models"][label] = {"from": before} | edit
    return content


def _edits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The edits that a merge is made of, one after the other: a part, directions of it, and how far."""
    from jaxsafety.recipe import yaml_file

    energy = {"energy": declared.value(ENERGY, options.energy)} if hasattr(options, "energy") else {}
    alpha = yaml_file.plain_value("--alpha", options.alpha)
    rank = None if options.rank is None else yaml_file.plain_value("--rank", options.rank)
    if options.part == "null_space":
        yield {"edit": "space_part", "method": "gram"} | energy
    elif energy:
        raise ValueError("--energy is of --part null_space: expected none without it")
    elif rank is None:
        yield {"edit": "scaled", "part": options.part, "alpha": alpha}
        return
    elif options.part != "whole":
        yield {"edit": "scaled", "part": options.part, "alpha": 1.0}
    if rank is not None:
        yield {"edit": "rank_part", "rank": rank, "method": "gram"}
    if alpha != 1:
        yield {"edit": "scaled", "alpha": alpha}


_WRITTEN = {"weights": _weights, "activations": _activations, "merge": _merge}


def _parsed(content: dict[str, Any], options: argparse.Namespace) -> "Recipe":
    """The recipe of plain fields, with the options that are given and, beside another analysis, what is recorded."""
    from jaxsafety.recipe import yaml_file

    for option in OPTIONS[options.verb]:
        if hasattr(options, option.name):
            _put(content, option.place.split("."), declared.value(option, getattr(options, option.name)))
    from jaxsafety.config import yaml12

    path = options.out / "config.yaml"
    recorded = yaml12.read(path) if path.is_file() else {}
    # A run that was moved keeps its name.
    content = {"name": recorded.get("name", options.out.resolve().name)} | content
    about = recorded.get("subject")
    if "analyses" in content and isinstance(about, dict) and "checkpoint" in about:
        content = _joined(recorded, content)
    return yaml_file.parse(content, where="tune" if options.verb == "tune" else f"analyze {options.verb}")


def _joined(recorded: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """What a run is asked with what it has been asked before: analyses add up."""
    return content | {
        section: (recorded.get(section) or {}) | content.get(section, {})
        for section in ("analyses", "evaluate", "subject")
    }


def _put(content: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
    content[path[-1]] = value
