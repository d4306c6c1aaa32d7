"""``jaxsafety tune DIR`` and ``analyze weights | activations | merge``: short forms of recipes over checkpoints.

Each writes the recipe that it stands for, and runs it: ``--print_config`` shows it. jax is imported only once the
options are known to be good.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsafety import methods
from jaxsafety.cli import declared, listing, written
from jaxsafety.cli.declared import path
from jaxsafety.config.names import with_adapter
from jaxsafety.rundir import layout, printed

if TYPE_CHECKING:
    from jaxsafety.recipe.schema import Recipe

ANALYSES = {
    "weights": "where the update of every matrix lies in the spaces of the base, its spectrum and rank",
    "activations": "how the models' activations on safe, unsafe and jailbreak prompts cluster, layer by layer",
    "merge": "write base + alpha * update, or a part of the update, as a checkpoint",
}
_OUT = {
    "weights": "run directory; may be that of `analyze activations` of the same checkpoints",
    "activations": "run directory; may be that of `analyze weights` of the same checkpoints",
    "merge": "run directory; the merged model will be RUN/models/merged/seed_0",
}
# Of a run, where what a tuning writes lies.
_FOLDERS = {
    "merged": (layout.MODELS,),
    "adapter": (layout.ADAPTERS,),
    "both": (layout.ADAPTERS, layout.MODELS),
}


def is_tuning(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``tune`` are about a checkpoint.

    Examples or a method are named, or a directory that is no run, a GGUF file, or a model with an adapter.
    """
    if any(word.partition("=")[0] in ("--data", "--method") for word in arguments):
        return True
    given = Path(arguments[0]) if arguments else Path("")
    is_model = given.is_dir() and not (given / "config.yaml").exists()
    adapted = bool(arguments) and with_adapter(arguments[0], beside=Path.cwd())[1] is not None
    return bool(arguments) and (is_model or adapted or given.suffix == ".gguf")


def parse_tune(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options of ``tune``; a wrong one ends the process with exit code 2."""
    parser = declared.Parser(
        prog="jaxsafety tune",
        description="Fine-tune a checkpoint.",
        epilog=f"methods, and the options that each has beside the others:\n{listing.told(methods.TABLE, prefix='--')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("start", type=declared.model, metavar="MODEL", help=declared.MODEL)
    add("--data", type=path, required=True, metavar="FILE", help="JSONL, JSON, CSV or Parquet of prompt, "
        "chosen and rejected, of messages, or of a set that is known by its columns")  # fmt: skip
    add("--method", required=True, help="a method of the list below, or somebody else's as package.module:NAME")
    add("--out", type=path, required=True, metavar="RUN", help="run directory; models will be in RUN/models/tuned")
    add("--steps", type=int, help="optimiser steps (default: those of --epochs)")
    add("--epochs", type=float, default=1.0, help="passes over the examples (default: 1)")
    add("--full", action="store_true", help="tune all parameters, not an adapter; --lr is 1e-5 then")
    declared.add(parser, written.OPTIONS["tune"])
    add("--seeds", default="0", help="numbers separated by commas, each of an adapter and an order of the examples "
        "(default: 0)")  # fmt: skip
    add("--devices", type=int, default=1, help="CPU devices to share the model; accelerators are all used (default: 1)")
    add("--dry_run", action="store_true", help="say what it needs of memory, load and write nothing")
    declared.add_shared(parser)
    options, rest = parser.parse_known_args([*declared.words(arguments), *arguments])
    options.of_method, options.verb = _pairs(parser, rest), "tune"
    return options


def parse_analyze(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options of ``weights BASE TUNED --out DIR`` and so on; a wrong one ends in exit code 2."""
    parser = declared.Parser(prog="jaxsafety analyze", description="Analyse a checkpoint and its tuned version.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ANALYSIS")
    for name, summary in ANALYSES.items():
        verb = verbs.add_parser(name, help=summary, description=f"Two checkpoints: {summary}.")
        verb.add_argument("base", type=declared.model, metavar="BASE", help=f"before tuning: {declared.MODEL}")
        verb.add_argument("tuned", type=declared.model, metavar="TUNED", help="the one after")
        verb.add_argument("--out", type=path, required=True, metavar="RUN", help=_OUT[name])
        if name == "activations":
            verb.add_argument(
                "--prompts",
                type=path,
                required=True,
                metavar="FILE",
                help="labelled prompts, as `jaxsafety prompts --out FILE` writes them, or a "
                "set that is known by its columns; JSONL, JSON, CSV or Parquet",
            )
            verb.add_argument("--judges", metavar="JUDGE,...", help="who says whether answers refuse, the first "
                              "decides: rule (default), package.module:function, a file of verdicts")  # fmt: skip
        if name == "merge":
            _add_merge(verb)
        declared.add(verb, written.OPTIONS[name])
        declared.add_shared(verb)
        if name == "weights":
            verb.add_argument("--dry_run", action="store_true", help="list the pairs of tensors, and what is left out")
        verb.set_defaults(dry_run=False, devices=1)
    options, rest = parser.parse_known_args([*arguments[:1], *declared.words(arguments), *arguments[1:]])
    if rest:
        verbs.choices[options.verb].error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _add_merge(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--alpha", required=True, help="0 is the base, 1 the tuned model (of that part), above 1 beyond it")
    add("--part", default="whole", help="whole, mlp, mlp_matrices, up, down or attention, or null_space: of the MLPs' "
        "matrices what is written into the null space of the base (default: whole)")  # fmt: skip
    declared.add(verb, [written.ENERGY])
    add("--rank", help="singular directions that are kept of the part in every matrix (default: all)")


def _pairs(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """Fields of the method, whose names and types only the method knows."""
    found, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest) or (not equals and rest[0].startswith("--")):
            parser.error(f"unrecognized arguments: {' '.join([name, *rest])}")
        found[name.removeprefix("--")] = value if equals else rest.pop(0)
    return found


def _list_pairs(recipe: "Recipe", options: argparse.Namespace) -> None:
    from jaxsafety.formats import sources
    from jaxsafety.study.checkpoints import opened, weights

    places = sources.from_environment(os.environ)
    sides = [
        opened.of_directory(recipe, sources.find(named, places).directory) for named in (options.base, options.tuned)
    ]
    opened.check_alike(*sides, vocabulary=False)
    found = weights.planned(*sides, recipe.analyses["weights"].options)
    if options.format != "table":
        sys.stdout.write(printed.records(found, options.format))
        return
    for measured, what in ((True, "measured"), (False, "left out")):
        rows = [{name: "" if value is None else value for name, value in row.items() if name != "measured"}
                for row in found if row["measured"] == measured]  # fmt: skip
        sys.stdout.write(f"{len(rows)} {what}\n{printed.records(rows, 'markdown') if rows else ''}")


def run(options: argparse.Namespace, stages: Sequence[str]) -> int:
    """Runs the recipe that a command stands for, through these stages, or shows it; returns the exit code.

    Raises:
        ValueError: a bad option, checkpoint, example, prompt or tensor.
        FloatingPointError: training has diverged.
        OSError: a file cannot be read or written.
        ImportError: an extra is missing.
        Stopped: a signal has asked to stop.
    """
    import jaxsafety.report  # noqa: F401  (a missing extra is said before the work, not after it)
    from jaxsafety.cli import launch
    from jaxsafety.recipe import cells, yaml_file

    recipe = written.recipe(options)
    if options.print_config:
        sys.stdout.write(yaml_file.to_yaml(recipe))
        return 0
    if options.dry_run and options.verb == "weights":
        _list_pairs(recipe, options)
        return 0
    if options.dry_run:
        return launch.forecast(recipe, cells.expand(recipe), options.out, form=options.format)
    # A merge is a model, of which there is nothing to report.
    launch.run(recipe, options.out, stages[:2] if options.verb == "merge" else stages, form=options.format)
    made = {"tune": written.TUNED, "merge": written.MERGED}.get(options.verb) if options.format == "table" else None
    for lane in recipe.lanes_of(made) if made else ():
        for seed in recipe.seeds:
            for folder in _FOLDERS[recipe.subject.options.export if options.verb == "tune" else "merged"]:
                print(options.out / folder / lane.name / f"seed_{seed}")
    return 0
