"""The console script. Verbs over a recipe: run and its stages; over a run: status, claims, figure; and others.

``tune`` of a checkpoint and ``analyze weights | activations | merge`` of two are short forms of recipes and lie in
``short``, ``import`` of a GGUF file in ``converted``, ``sample`` and ``prompts`` in ``sample``, what ``list`` and
``explain`` print in ``listing`` and ``explained``, what ``new`` writes in ``starters``, how errors end in ``errors``.
jax is imported only once a verb needs it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsafety.cli import converted, declared, errors, explained, listing, sample, short, starters
from jaxsafety.cli.declared import path
from jaxsafety.config import tables
from jaxsafety.config.names import closest, nearest
from jaxsafety.engine import cluster
from jaxsafety.rundir import layout, printed

if TYPE_CHECKING:
    from jaxsafety.recipe.schema import Recipe

_STAGES = {
    "run": "run all stages of a recipe: pretrain, tune, evaluate, analyze, report",
    "pretrain": "train every model that begins afresh",
    "tune": "train every model that begins with another, parents first; with a Hugging Face "
    "directory and --data: a checkpoint (`jaxsafety tune DIR --data FILE --help`)",
    "evaluate": "judge every model on every condition and write the result tables",
    "analyze": "measure the mechanics of every model: clusters, update spaces, sensitivity, interventions, attacks; of "
    "two checkpoints: `jaxsafety analyze weights | activations | merge --help`",
    "report": "write report.html from the results and print the table",
}
_IMPORT = (
    "make a run of models that the paper's authors trained, from their PyTorch checkpoints; of a GGUF file: a Hugging "
    "Face directory (`jaxsafety import FILE.gguf --help`)"
)
_LIST = "list what a recipe can name: methods, pools, edits, attacks and so on, with their fields"
_EXPLAIN = "print what one of them is: formula, source, fidelity, fields"
_ENV = "print versions and devices, for bug reports"
_Handler = Callable[[argparse.Namespace, Sequence[str]], int]
_AGAIN = "; the same command continues from the last checkpoint"
_OVERRIDES = (
    "Any field of the recipe can be overridden, e.g. --models.sft.steps 800 (of all models: '--models.*.steps') "
    "--seeds [0,1]; see --print_config."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    # Before SciPy loads its OpenBLAS, which is jax's LAPACK on a CPU: called from several devices at once, its own
    # threads wait for each other, for seconds or for good.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Methods of one's own, `module:NAME`, lie where one works; a console script has its own folder there instead.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    given = sys.argv[1:] if arguments is None else list(arguments)
    arguments, shown = [word for word in given if word != declared.TRACEBACK], declared.TRACEBACK in given
    if arguments[:1] == ["analyze"] and arguments[1:2] and arguments[1] in short.ANALYSES:
        return _guarded_short(short.parse_analyze, arguments[1:], shown=shown)
    if arguments[:1] == ["analyze"] and arguments[1:] and not Path(arguments[1]).exists():
        hint = nearest(arguments[1], short.ANALYSES)
        if hint:
            print(f"jaxsafety: no recipe or analysis {arguments[1]!r}{hint}", file=sys.stderr)
            return 2
    if arguments[:1] == ["tune"] and short.is_tuning(arguments[1:]):
        return _guarded_short(short.parse_tune, arguments[1:], shown=shown)
    if arguments[:1] == ["import"] and converted.is_meant(arguments[1:]):
        return errors.guarded(lambda: converted.run(converted.parse(arguments[1:])), shown=shown)[0]
    parser, verbs = _parser()
    options, rest = parser.parse_known_args(arguments)
    _check_rest(rest, options.verb, verbs[options.verb])
    code, lost = _run(options, rest, shown=shown)
    if options.verb in _STAGES:
        sys.stdout.flush()
        sys.stderr.flush()
        cluster.leave(code, lost=lost)
    return code


def _run(options: argparse.Namespace, rest: Sequence[str], *, shown: bool) -> tuple[int, bool]:
    again = _AGAIN if options.verb in _STAGES else ""
    return errors.guarded(lambda: options.handler(options, rest), again=again, shown=shown)


def _guarded_short(
    parse: Callable[[Sequence[str]], argparse.Namespace], arguments: Sequence[str], *, shown: bool
) -> int:
    return errors.guarded(lambda: _short(parse(arguments)), again=_AGAIN, shown=shown)[0]


def _check_rest(rest: Sequence[str], verb: str, parser: declared.Parser) -> None:
    """Refuses words that are neither options of a verb nor, where it reads a recipe, fields of that."""
    if rest and verb not in (*_STAGES, "import"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    fields = [f"--{one.name}" for one in tables.fields_of("jaxsafety.recipe.schema", "Recipe")] if rest else []
    for word in (word for word in rest if word.startswith("--")):
        name = word.partition("=")[0].partition(".")[0]
        if name not in fields and closest(name, [*fields, *parser.known]) not in fields:
            parser.error(f"unrecognized arguments: {word}")


def _parser() -> tuple[declared.Parser, Mapping[str, declared.Parser]]:
    """The parser of all verbs, and that of each."""
    parser = declared.Parser(prog="jaxsafety", description="The mechanics of safety fine-tuning, in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, handler: _Handler, summary: str, **more: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=summary, **more)
        verb.set_defaults(handler=handler, format="table")
        return verb

    for name, summary in _STAGES.items():
        _add_stage(add(name, _stage, summary, description=f"{summary}. {_OVERRIDES}"))
    _add_import(add("import", _import, _IMPORT, description=f"{_IMPORT}. {_OVERRIDES}"))
    _add_readers(add)
    sample.add_to(add)
    listed = add("list", _list, _LIST)
    listed.add_argument("kind", nargs="?", metavar="KIND", help="one line for each of a kind alone: "
                        f"{', '.join(listing.FOLDERS)}, claims, figures")  # fmt: skip
    declared.add_format(listed)
    add("explain", _explain, _EXPLAIN).add_argument("name", help="such as npo, refusal_direction or lora")
    starters.add_to(add)
    declared.add_format(add("env", _env, _ENV))
    return parser, verbs.choices


def _add_stage(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("recipe", type=path, metavar="RECIPE | RUN", help="YAML recipe, or a run directory")
    stage.add_argument("--out", type=path, help="run directory (default: RUN, or runs/NAME)")
    stage.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
    declared.add_cache(stage)
    stage.add_argument("--dry_run", action="store_true", help="print models, programs, memory and time, and stop")
    stage.add_argument("--shard", metavar="I/N", help="run the i-th of n parts of the cells of a grid, from 1/n")
    stage.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no launcher tells; with it:")
    stage.add_argument("--processes", type=int, metavar="N", help="how many processes share the seeds of the run")
    stage.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")
    declared.add_format(stage)


def _add_import(imported: argparse.ArgumentParser) -> None:
    add = imported.add_argument
    add("recipe", type=path, help="YAML recipe that they belong to, such as experiments/official.yaml")
    add("--pretrained", required=True, metavar="FILE", help="the pretrained model; {seed} in a path stands for each of "
        "the recipe's seeds")  # fmt: skip
    add("--tuned", action="append", default=[], metavar="MODEL:POINT=FILE", help="a tuned model, by its names in the "
        "recipe; once for each")  # fmt: skip
    add("--out", type=path, help="run directory to make (default: runs/NAME)")
    declared.add_cache(imported)


def _add_readers(add: Callable[..., argparse.ArgumentParser]) -> None:
    for name, handler, summary in (
        ("status", _status, "show how far a run or every cell of a grid is"),
        ("claims", _claims, "judge the paper's statements by a run's analyses"),
    ):
        verb = add(name, handler, summary)
        several = {"nargs": "+", "help": "run directory; of several, claim by run"} if name == "claims" else {}
        verb.add_argument("run", type=path, **{"help": "run directory"} | several)
        declared.add_format(verb)
    figure = add("figure", _figure, "draw one figure of a run's analyses")
    figure.add_argument("name", help="such as clusters; an unknown name lists them all")
    figure.add_argument("run", type=path, help="run directory")
    figure.add_argument("--out", type=path, metavar="FILE", help="ends in .svg, .png or .pdf (default: NAME.svg)")


def _recipe(options: argparse.Namespace, overrides: Sequence[str]) -> "tuple[Recipe, Path]":
    """The recipe that is named, or that a named run directory records, and the directory to run it in."""
    from jaxsafety.recipe import yaml_file

    given, run = options.recipe, options.recipe.is_dir()
    if run:
        layout.check_run(given, grid=True)
    recipe = yaml_file.read(given / "config.yaml" if run else given, overrides=overrides)
    return recipe, options.out or (given if run else Path("runs") / recipe.name)


def _stage(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from jaxsafety.recipe import cells, yaml_file

    recipe, directory = _recipe(options, overrides)
    if options.shard is not None and not recipe.grid:
        raise ValueError(f"--shard {options.shard!r} divides the cells of a grid, and {options.recipe} has no `grid:`")
    if options.format != "table" and options.print_config:
        raise ValueError(f"--format {options.format}: a recipe is printed as YAML, expected no --print_config")
    chosen = cells.expand(recipe)
    chosen = chosen if options.shard is None else cells.shard(chosen, options.shard)
    if options.print_config:
        sys.stdout.write(yaml_file.to_yaml(recipe))
        return 0
    if options.verb in ("run", "evaluate", "analyze", "report"):
        import jaxsafety.report  # noqa: F401  (a missing extra is said before the work, not after it)
    place = _place(options)
    # Models over checkpoints are made one by one, and a CPU's cores share the work inside each.
    every = 1 if recipe.subject.of_files else len(recipe.seeds)
    seeds = every // (place.processes or 1) if place else every
    _configure_jax("off" if options.dry_run else options.compilation_cache, seeds=max(seeds, 1))
    if place:
        _keep_stdout()
        cluster.join(place)
    from jaxsafety.cli import launch

    if options.dry_run:
        return launch.forecast(recipe, chosen, directory, form=options.format)
    stages = tuple(_STAGES)[1:] if options.verb == "run" else (options.verb,)
    if recipe.grid:
        return launch.run_grid(recipe, chosen, directory, stages, form=options.format)
    return launch.run(recipe, directory, stages, form=options.format)


def _import(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    recipe, directory = _recipe(options, overrides)
    _configure_jax(options.compilation_cache, seeds=len(recipe.seeds))
    from jaxsafety.study import imported

    imported.write(recipe, directory, pretrained=options.pretrained, tuned=options.tuned)
    print(directory)
    return 0


def _short(options: argparse.Namespace) -> int:
    if not 1 <= options.devices <= _cores():
        most = f"{_cores()}, the cores that this process may use (accelerators are used without it)"
        raise ValueError(f"devices must be from 1 to {most}, got {options.devices}")
    _configure_jax("off" if options.dry_run else options.compilation_cache, seeds=options.devices)
    return short.run(options, tuple(_STAGES)[1:])


def _place(options: argparse.Namespace) -> cluster.Place | None:
    """Where this process stands in its run, None by itself: as a part of a grid, or to say only what would be done."""
    flags = cluster.from_flags(options.coordinator, options.processes, options.process)
    if options.shard is not None and flags:
        raise ValueError("--shard runs a part of a grid by itself, and --coordinator joins processes: give one of them")
    if options.shard is not None or options.dry_run:
        return None
    return flags or cluster.from_environment(os.environ)


def _keep_stdout() -> None:
    """Leaves standard output to what this program prints: Gloo, which connects CPUs, writes there who is connected."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _configure_jax(cache: str, *, seeds: int) -> None:
    """Sets what must be set before jax starts: a CPU device per core that seeds can use, and the compilation cache."""
    import jax

    from jaxsafety.engine import sweep

    jax.config.update("jax_num_cpu_devices", sweep.shard_count(seeds, _cores()))
    # Which of our lines every operation comes from would take a seventh of what a study compiles in.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if cache != "off" and (folder := _cache_folder(cache)):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cores() -> int:
    # The call is Linux's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_folder(named: str) -> Path | None:
    """The folder of compiled programs, made; None, and said, where it cannot be: jax would warn at every program."""
    try:
        folder = Path(named).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        problem = f"{folder} cannot be written"
    except (OSError, RuntimeError) as error:  # without a home that is known
        problem = str(error)
    print(
        f"jaxsafety: compiled programs are not kept ({problem}): --compilation_cache DIR names a place", file=sys.stderr
    )
    return None


def _claims(options: argparse.Namespace, _: Sequence[str]) -> int:
    from jaxsafety.report import claims_matrix, claims_table

    for run in options.run:
        layout.check_run(run)
    if len(options.run) == 1:
        sys.stdout.write(claims_table.text(options.run[0], form=options.format))
    else:
        sys.stdout.write(claims_matrix.text(options.run, form=options.format))
    return 0


def _figure(options: argparse.Namespace, _: Sequence[str]) -> int:
    from jaxsafety.report import sections

    layout.check_run(options.run)
    out = options.out or Path(f"{options.name}.svg")
    sections.write_figure(options.name, options.run, out)
    print(out)
    return 0


def _status(options: argparse.Namespace, _: Sequence[str]) -> int:
    from jaxsafety.rundir import status

    layout.check_run(options.run, grid=True)
    sys.stdout.write(status.render(status.read(options.run), options.format))
    return 0


def _list(options: argparse.Namespace, _: Sequence[str]) -> int:
    sys.stdout.write(listing.render(options.format, kind=options.kind))
    return 0


def _explain(options: argparse.Namespace, _: Sequence[str]) -> int:
    sys.stdout.write(explained.text(options.name))
    return 0


def _env(options: argparse.Namespace, _: Sequence[str]) -> int:
    from jaxsafety.rundir import machine, opening

    about = machine.environment()
    if options.format in ("table", "json"):
        print(json.dumps(about, indent=2))
    else:
        rows = [{"name": name, "value": value} for name, value in opening.flat(about).items()]
        sys.stdout.write(printed.records(rows, options.format))
    return 0
