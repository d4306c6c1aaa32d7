"""``jaxsafety tune DIR --data FILE``: the command line of tuning a checkpoint.

jax is imported only once the options are known to be good.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsafety import methods
from jaxsafety.cli import declared, listing

if TYPE_CHECKING:
    from jaxsafety.study.tuning.options import TuningConfig
    from jaxsafety.study.tuning.run import Plan

_OPTIONS = "jaxsafety.study.tuning.options"


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``tune`` are about a checkpoint: examples are named, or a directory that is no run."""
    if any(word == "--data" or word.startswith("--data=") for word in arguments):
        return True
    given = Path(arguments[0]) if arguments else Path("")
    return bool(arguments) and given.is_dir() and not (given / "config.yaml").exists()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options; a wrong one ends the process with exit code 2 and a usage."""
    parser = argparse.ArgumentParser(
        prog="jaxsafety tune",
        description="Fine-tune a Hugging Face checkpoint.",
        epilog=f"methods, and the options that each has beside the others:\n{listing.told(methods.TABLE, prefix='--')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("start", type=Path, metavar="DIR", help="Hugging Face directory of the model")
    add("--data", type=Path, required=True, metavar="FILE", help="JSONL of prompt, chosen and rejected, or of messages")
    add("--method", required=True, help="a method of the list below, or somebody else's as package.module:NAME")
    add("--out", type=Path, required=True, metavar="RUN", help="run directory; the tuned model will be in RUN/model")
    add("--steps", type=int, help="optimiser steps (default: those of --epochs)")
    add("--epochs", type=float, default=1.0, help="passes over the examples (default: 1)")
    add("--full", action="store_true", help="tune all parameters, not an adapter; --lr is 1e-5 then")
    declared.add(parser, _OPTIONS, "TuningConfig", leave=("method", "steps", "options"))
    add("--devices", type=int, default=1, help="CPU devices to share the model; accelerators are all used (default: 1)")
    add("--dry_run", action="store_true", help="say what it needs of memory, load and write nothing")
    declared.add_shared(parser)
    options, rest = parser.parse_known_args([*declared.words(arguments), *arguments])
    options.of_method = _pairs(parser, rest)
    return options


def _pairs(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """Fields of the method, whose names and types only the method knows."""
    found, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest) or (not equals and rest[0].startswith("--")):
            parser.error(f"unrecognized arguments: {' '.join([name, *rest])}")
        found[name.removeprefix("--")] = value if equals else rest.pop(0)
    return found


def run(options: argparse.Namespace) -> int:
    """Tunes, or says what that would need; returns the exit code.

    Raises:
        ValueError: a bad option, checkpoint, example or tensor.
        FloatingPointError: training has diverged.
        OSError: a file cannot be read or written.
        ImportError: an extra is missing.
        Stopped: a signal has asked to stop.
    """
    from jaxsafety.cli import launch
    from jaxsafety.formats import hf, hf_tokenizer
    from jaxsafety.rundir import manifest_file, opening, progress, signals
    from jaxsafety.study.pairs.opened import fingerprint
    from jaxsafety.study.tuning import examples, places, run

    if not (options.start / "config.json").is_file() and options.start.is_dir():
        raise ValueError(
            f"{options.start} is not a model directory: expected one with a config.json, or the YAML file of a recipe "
            "without --data"
        )
    _check_out(options.out)
    config = _config(options)
    opened = hf.open_checkpoint(options.start)
    given = examples.read(options.data, pairs=config.pairs)
    if options.steps is None:
        config = replace(config, steps=math.ceil(options.epochs * len(given) / config.batch_size))
    if config.batch_size > len(given):
        raise ValueError(f"batch_size: got {config.batch_size}, expected at most the {len(given)} examples there are")
    tokenizer = hf_tokenizer.open_tokenizer(options.start, raw=config.template == "raw")
    if config.template == "chat" and tokenizer.template is None:
        raise ValueError(f"no chat template in {options.start}: expected a model with one, or --template raw")
    longest = min(config.max_tokens, opened.config.max_tokens)
    encoded = examples.encode(given, tokenizer, max_tokens=longest, vocab_size=opened.config.vocab_size)
    if encoded.truncated:
        progress.say(f"{encoded.truncated} of {len(given)} examples have more than {longest} tokens and are cut")
    if options.print_config:
        return declared.print_config(_recorded(config) | {"data": str(options.data), "out": str(options.out)})
    placed = places.local()
    if options.dry_run:
        sys.stdout.write(_told(run.plan(opened.config, encoded, config, places=placed)))
        return 0
    recorded = _recorded(config)
    recorded |= {"start": str(options.start.resolve()), "fingerprint": fingerprint(opened), "data": _digest(given)}
    counted = {"examples": len(given), "truncated_examples": encoded.truncated}
    begun = ("checkpoints", "references", run.MODEL)
    with (
        signals.deferred(launch.say_stopping),
        opening.unused_dropped(
            options.out,
            (".lock", "config.yaml", "manifest.json"),
            begun=lambda: any((options.out / name).exists() for name in begun),
        ),
        opening.open_run(options.out, {"tuning": recorded}),
        manifest_file.timed(options.out, "tuning", counted),
    ):
        print(run.write(opened, encoded, options.out, config, places=placed))
    return 0


def _recorded(config: "TuningConfig") -> dict[str, Any]:
    own = {name: value for name, value in asdict(config).items() if name != "options"}
    return own | asdict(config.options) | {"lora_targets": ",".join(config.lora_targets)}


def _check_out(directory: Path) -> None:
    """Checks that no model is in the way of the run's own."""
    from jaxsafety.study.pairs.opened import check_no_model
    from jaxsafety.study.tuning.run import MODEL

    check_no_model(directory)
    if (directory / MODEL).exists() and not (directory / "config.yaml").exists():
        raise ValueError(f"{directory / MODEL} is there, and no run has made it: choose another run directory (--out)")


def _config(options: argparse.Namespace) -> "TuningConfig":
    """The options as a record; a single step stands for those of the epochs, which the examples decide."""
    from jaxsafety.config import fields
    from jaxsafety.config.names import nearest
    from jaxsafety.recipe import yaml_file
    from jaxsafety.study.tuning.options import TuningConfig

    if not (options.epochs > 0 and math.isfinite(options.epochs)):
        raise ValueError(f"epochs must be > 0 and finite, got {options.epochs}")
    config = methods.load(options.method).Config
    for name in options.of_method:
        hint = nearest(name, vars(options))
        if name not in config.__dataclass_fields__ and hint:
            raise ValueError(f"unknown option --{name}{hint}")
    given = {name: yaml_file.plain_value(f"--{name}", value) for name, value in options.of_method.items()}
    own = fields.build(config, given, owner=f"method {options.method}")
    rank = {"lora_rank": None, "lr": getattr(options, "lr", "1e-5")} if options.full else {}
    steps = 1 if options.steps is None else options.steps
    values = declared.given(options, TuningConfig, steps=steps, **rank) | {"options": own}
    del values["options"]
    return fields.build(TuningConfig, values, owner="tune", options=own)


def _told(plan: "Plan") -> str:
    sizes = {
        "weights as they are": plan.frozen_bytes,
        "tuned, with the optimiser's state": plan.state_bytes,
        "examples": plan.data_bytes,
        "steps, as planned by the compiler": plan.step_bytes,
    }
    total = sum(sizes.values())
    lines = [f"{plan.parameters:,} parameters, {plan.trained:,} tuned; on one device:"]
    lines += [f"  {name:34} {size / 2**30:8.2f} GiB" for name, size in (sizes | {"together": total}).items()]
    verdict = "fits" if total <= plan.free_bytes else "does not fit"
    return "\n".join([*lines, f"it {verdict} into the {plan.free_bytes / 2**30:.2f} GiB that are free", ""])


def _digest(given: Sequence[Any]) -> str:
    from hashlib import sha256

    told = [(one.prompt, one.chosen, one.rejected, *([one.unsafe] if one.unsafe else [])) for one in given]
    return sha256(repr(told).encode()).hexdigest()[:16]
