"""``jaxsafety analyze weights | activations | merge``: the command lines of the analyses of two checkpoints.

jax is imported only once the options are known to be good.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsafety.cli import declared

if TYPE_CHECKING:
    from jaxsafety.study.pairs.activations import ActivationsConfig
    from jaxsafety.study.pairs.merge import MergeConfig
    from jaxsafety.study.pairs.opened import Pair
    from jaxsafety.study.pairs.weights import WeightsConfig

VERBS = {
    "weights": "where the update of every matrix lies in the spaces of the base, its spectrum and rank",
    "activations": "how the models' activations on safe, unsafe and jailbreak prompts cluster, layer by layer",
    "merge": "write base + alpha * update, or a part of the update, as a checkpoint",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options of ``weights BASE TUNED --out DIR`` and so on; a wrong one ends in exit code 2 and usage."""
    parser = argparse.ArgumentParser(
        prog="jaxsafety analyze", description="Analyse a checkpoint and its tuned version."
    )
    verbs = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=f"Two checkpoints: {summary}.", allow_abbrev=False)
        verb.add_argument("base", type=Path, metavar="BASE", help="Hugging Face directory before tuning")
        verb.add_argument("tuned", type=Path, metavar="TUNED", help="the one after")
        verb.add_argument("--out", type=Path, required=True, metavar="DIR", help=_OUT[name])
        if name == "activations":
            verb.add_argument("--prompts", type=Path, required=True, metavar="FILE",
                              help="labelled JSONL, such as `jaxsafety prompts --out FILE` writes")  # fmt: skip
        declared.add(verb, f"jaxsafety.study.pairs.{name}", f"{name.capitalize()}Config")
        declared.add_shared(verb)
    return parser.parse_args([*arguments[:1], *declared.words(arguments), *arguments[1:]])


_OUT = {
    "weights": "run directory; may be that of `analyze activations` of the same checkpoints",
    "activations": "run directory; may be that of `analyze weights` of the same checkpoints",
    "merge": "directory of the merged checkpoint, which must not exist yet",
}


def run(options: argparse.Namespace) -> int:
    """Runs one of the analyses; returns the exit code.

    Raises:
        ValueError: a bad option, checkpoint, prompt or tensor.
        OSError: a file cannot be read or written.
        ImportError: an extra is missing.
        Stopped: a signal has asked to stop.
    """
    import jaxsafety.report  # noqa: F401  (a missing extra is said before the work, not after it)
    from jaxsafety.cli import launch
    from jaxsafety.rundir import signals
    from jaxsafety.study.pairs import opened

    config = _config(options)
    if options.print_config:
        own = {"prompts": str(options.prompts)} if options.analysis == "activations" else {}
        return declared.print_config(asdict(config) | own | {"out": str(options.out)})
    pair = opened.open_pair(options.base, options.tuned)
    with signals.deferred(launch.say_stopping):
        {"weights": _weights, "activations": _activations, "merge": _merge}[options.analysis](options, pair, config)
    return 0


def _config(options: argparse.Namespace) -> Any:
    """The record of an analysis' options, checked."""
    from jaxsafety.config import fields
    from jaxsafety.study.pairs import activations, merge, weights

    records = {
        "weights": weights.WeightsConfig,
        "activations": activations.ActivationsConfig,
        "merge": merge.MergeConfig,
    }
    config = records[options.analysis]
    return fields.build(config, declared.given(options, config), owner=f"analyze {options.analysis}")


def _weights(options: argparse.Namespace, pair: "Pair", config: "WeightsConfig") -> None:
    from jaxsafety.study.pairs import opened, weights

    with opened.enter(options.out, pair, "weights"), _recorded(options.out, "weights", asdict(config)):
        weights.write(pair, options.out, config)
        report(options.out)


def _activations(options: argparse.Namespace, pair: "Pair", config: "ActivationsConfig") -> None:
    from jaxsafety.formats import hf_tokenizer, prompts
    from jaxsafety.rundir import manifest_file
    from jaxsafety.study.pairs import activations, opened

    given = prompts.read(options.prompts)
    tokenizer = hf_tokenizer.open_tokenizer(options.tuned, raw=config.template == "raw")
    if config.template == "chat" and tokenizer.template is None:
        raise ValueError(f"no chat template in {options.tuned}: expected a tuned model with one, or --template raw")
    recorded = asdict(config) | {"prompts": sha256(prompts.to_jsonl(given).encode()).hexdigest()[:16]}
    with opened.enter(options.out, pair, "activations"), _recorded(options.out, "activations", recorded):
        encoded = activations.write(pair, options.out, config, given, tokenizer)
        counted = {"prompts": len(encoded.prompts), "truncated_prompts": encoded.truncated}
        manifest_file.write_manifest(options.out, {"activations": counted})
        report(options.out)


def _merge(options: argparse.Namespace, pair: "Pair", config: "MergeConfig") -> None:
    from jaxsafety.study.pairs import merge

    merge.write(pair, options.out, config)
    print(options.out)


@contextmanager
def _recorded(directory: Path, name: str, options: dict[str, Any]):
    """Records what an analysis was asked for, what it runs on, and the seconds it takes, over all its processes."""
    from jaxsafety.rundir import manifest_file, opening

    opening.record_config(directory / f"{name}.yaml", options)
    with manifest_file.timed(directory, name, {}):
        yield


def report(directory: Path) -> int:
    """Writes the report of a pair's analyses and prints its main numbers; returns the exit code."""
    from jaxsafety.report import pair_report

    sys.stdout.write(pair_report.write(directory))
    return 0
