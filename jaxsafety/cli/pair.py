"""``jaxsafety analyze weights | activations | merge``: the command lines of the analyses of two checkpoints.

jax is imported only once the options are known to be good.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsafety.study.pairs.opened import Pair

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
        _ADD[name](verb)
        verb.add_argument("--compilation_cache", default="~/.cache/jaxsafety", metavar="DIR",
                          help="where compiled programs are kept between runs; 'off' for nowhere")  # fmt: skip
    return parser.parse_args(arguments)


_OUT = {
    "weights": "run directory; may be that of `analyze activations` of the same checkpoints",
    "activations": "run directory; may be that of `analyze weights` of the same checkpoints",
    "merge": "directory of the merged checkpoint, which must not exist yet",
}


def _add_weights(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--attention", action="store_true", help="measure the attention's matrices, too")
    verb.add_argument("--energy", type=float, default=0.9, help="share that leading directions hold (default: 0.9)")
    verb.add_argument("--method", default="gram", help="gram (default), full, or randomized for updates of low rank")
    verb.add_argument("--rank", type=int, default=256, help="triplets of --method randomized (default: 256)")


def _add_activations(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--prompts", type=Path, required=True, metavar="FILE",
                      help="labelled JSONL, such as `jaxsafety prompts --out FILE` writes")  # fmt: skip
    verb.add_argument("--template", default="chat", help="chat (default): TUNED's own, for both; or raw")
    verb.add_argument("--answers", type=int, default=0, metavar="TOKENS",
                      help="write answers of so many tokens; takes the whole models (default: 0, none)")  # fmt: skip
    verb.add_argument("--max_tokens", type=int, default=512, help="of a prompt; what is beyond is cut (default: 512)")
    verb.add_argument("--batch_tokens", type=int, default=4096, help="places of a batch (default: 4096)")
    verb.add_argument("--dtype", default="float32", help="of products and weights: float32 (default) or bfloat16")
    verb.add_argument("--directions", type=int, default=16, help="of the update to project inputs on (default: 16)")


def _add_merge(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--alpha", type=float, required=True, help="0 is the base, 1 the tuned model, 1.5 beyond it")
    verb.add_argument("--part", default="whole", help="whole (default), mlp, mlp_matrices, up, down, attention, or "
                      "null_space of the MLPs' matrices")  # fmt: skip
    verb.add_argument("--rank", type=int, help="leading directions of every matrix of that part (default: all)")
    verb.add_argument("--energy", type=float, default=0.9, help="that the base's range holds (default: 0.9)")
    verb.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of TUNED)")


_ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "weights": _add_weights,
    "activations": _add_activations,
    "merge": _add_merge,
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

    pair = opened.open_pair(options.base, options.tuned)
    with signals.deferred(launch.say_stopping):
        {"weights": _weights, "activations": _activations, "merge": _merge}[options.analysis](options, pair)
    return 0


def _weights(options: argparse.Namespace, pair: "Pair") -> None:
    from jaxsafety.study.pairs import opened, weights

    config = weights.WeightsConfig(options.attention, options.energy, options.method, options.rank)
    with opened.enter(options.out, pair, "weights"), _recorded(options.out, "weights", asdict(config)):
        weights.write(pair, options.out, config)
        report(options.out)


def _activations(options: argparse.Namespace, pair: "Pair") -> None:
    from jaxsafety.formats import hf_tokenizer, prompts
    from jaxsafety.rundir import manifest_file
    from jaxsafety.study.pairs import activations, opened

    config = activations.ActivationsConfig(
        template=options.template, answers=options.answers, max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens, compute_dtype=options.dtype, directions=options.directions,
    )  # fmt: skip
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


def _merge(options: argparse.Namespace, pair: "Pair") -> None:
    from typing import get_args

    from jaxsafety.config.names import check_name
    from jaxsafety.formats import hf
    from jaxsafety.study.pairs import merge

    config = merge.MergeConfig(options.alpha, options.part, options.energy, options.rank)
    if options.dtype is not None:
        check_name("dtype", options.dtype, get_args(hf.ParamsDtype))
    merge.write(pair, options.out, config, dtype=options.dtype)
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
