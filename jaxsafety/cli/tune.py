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
from jaxsafety.cli import listing

if TYPE_CHECKING:
    from jaxsafety.study.tuning.options import TuningConfig
    from jaxsafety.study.tuning.run import Plan

# Options that are fields of the TuningConfig as they are.
_AS_GIVEN = (
    *("method", "batch_size", "accumulate", "lora_alpha", "warmup", "weight_decay", "max_tokens", "chunk_steps"),
    *("template", "dtype", "seed"),
)


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
    add("--batch_size", type=int, default=8, help="examples of a step (default: 8)")
    add("--accumulate", type=int, default=1, help="parts that a batch is taken in (default: 1)")
    add("--full", action="store_true", help="tune all parameters, not an adapter")
    add("--lora_rank", type=int, default=16, help="of the adapter (default: 16)")
    add("--lora_alpha", type=float, default=32.0, help="the adapter counts alpha / rank times (default: 32)")
    add("--lora_targets", default="q,k,v,o,gate,up,down", help="matrices that have an adapter (default: all seven)")
    add("--lr", type=float, help="peak learning rate (default: 1e-4, with --full 1e-5)")
    add("--warmup", type=float, default=0.1, help="share of the steps over which it rises (default: 0.1)")
    add("--weight_decay", type=float, default=0.0, help="of the layers' matrices, with --full (default: 0)")
    add("--max_tokens", type=int, default=1024, help="of a prompt with its answer; more is cut (default: 1024)")
    add("--chunk_steps", type=int, default=10, metavar="STEPS",
        help="between rows of metrics, and between the points where it can be stopped (default: 10)")  # fmt: skip
    add("--template", default="chat", help="chat (default): the checkpoint's own; or raw")
    add("--dtype", default="float32", help="of products and weights: float32 (default) or bfloat16")
    add("--no_recompute", action="store_true", help="keep all activations for the gradient: faster, more memory")
    add("--seed", type=int, default=0, help="of the adapter and the order of examples (default: 0)")
    add("--devices", type=int, default=1, help="CPU devices to share the model; accelerators are all used (default: 1)")
    add("--dry_run", action="store_true", help="say what it needs of memory, load and write nothing")
    add("--compilation_cache", default="~/.cache/jaxsafety", metavar="DIR",
        help="where compiled programs are kept between runs; 'off' for nowhere")  # fmt: skip
    options, rest = parser.parse_known_args(arguments)
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
    placed = places.local()
    if options.dry_run:
        sys.stdout.write(_told(run.plan(opened.config, encoded, config, places=placed)))
        return 0
    recorded = {**asdict(config), **asdict(config.options), "lora_targets": ",".join(config.lora_targets)}
    del recorded["options"]
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
    return TuningConfig(
        options=own,
        steps=1 if options.steps is None else options.steps,
        lora_rank=None if options.full else options.lora_rank,
        lora_targets=tuple(name.strip() for name in options.lora_targets.split(",") if name.strip()),
        lr=options.lr if options.lr is not None else (1e-5 if options.full else 1e-4),
        recompute=not options.no_recompute,
        **{name: getattr(options, name) for name in _AS_GIVEN},
    )


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
