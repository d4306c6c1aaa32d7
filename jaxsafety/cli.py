"""The console script. Verbs over a recipe: run, pretrain, tune, evaluate, report; and sample, env.

Bad input ends in one sentence on standard error and exit code 2. jax is imported only once a verb needs it.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

_STAGES = {
    "run": "run all stages of a recipe: pretrain, tune, evaluate, report",
    "pretrain": "pretrain every seed",
    "tune": "safety fine-tune every method at every learning rate, from the pretrained models",
    "evaluate": "judge every model on every condition and write the result tables",
    "report": "write report.html from the results and print the table",
}
_OVERRIDES = "Any field of the recipe can be overridden, e.g. --pretrain.steps 800 --seeds [0,1]; see --print_config."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in _STAGES:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.handler(options, rest)
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxsafety: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"jaxsafety: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxsafety: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxsafety", description="The mechanics of safety fine-tuning, in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in _STAGES.items():
        stage = verbs.add_parser(name, help=summary, description=f"{summary}. {_OVERRIDES}", allow_abbrev=False)
        stage.add_argument("recipe", type=Path, help="YAML recipe, or the config.yaml of a run")
        stage.add_argument("--out", type=Path, help="run directory (default: runs/NAME)")
        stage.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
        stage.add_argument("--compilation_cache", default="~/.cache/jaxsafety", metavar="DIR",
                           help="where compiled programs are kept between runs; 'off' for nowhere")  # fmt: skip
        stage.set_defaults(handler=_stage)
    sample = verbs.add_parser("sample", help="print prompts of a condition with their answers", allow_abbrev=False)
    sample.add_argument("--world", default="tiny", help="paper or tiny")
    sample.add_argument("--condition", default="safe", help="safe, unsafe, jb_co_task, jb_co_text, jb_misgen or ood")
    sample.add_argument("-n", type=int, default=5, metavar="COUNT", help="how many")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--format", choices=("text", "jsonl"), default="text", help="jsonl: prompt, chosen, rejected")
    sample.set_defaults(handler=_sample)
    env = verbs.add_parser("env", help="print versions and devices, for bug reports", allow_abbrev=False)
    env.set_defaults(handler=_env)
    return parser


def _stage(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from jaxsafety import recipe_file, runlog
    from jaxsafety.recipe import as_dict

    recipe = recipe_file.read(options.recipe, overrides=overrides)
    resolved = recipe_file.to_yaml(recipe)
    if options.print_config:
        sys.stdout.write(resolved)
        return 0
    if options.verb in ("run", "evaluate", "report"):
        import jaxsafety.report  # noqa: F401  (a missing extra is said before the work, not after it)
    _configure_jax(options.compilation_cache, seeds=len(recipe.seeds))
    directory = options.out or Path("runs") / recipe.name
    from jaxsafety import study

    ready = study.prepare(recipe, directory)
    with runlog.open_run(directory, as_dict(recipe), resolved_yaml=resolved):
        runlog.write_manifest(directory, runlog.environment())
        for stage in ("pretrain", "tune", "evaluate", "report") if options.verb == "run" else (options.verb,):
            with _timed(directory, stage):
                _run_stage(stage, ready)
    return 0


def _run_stage(stage: str, ready: object) -> None:
    from jaxsafety import study

    if stage == "pretrain":
        study.pretrain(ready)
    elif stage == "tune":
        study.tune(ready)
    elif stage == "evaluate":
        from jaxsafety import evaluation

        evaluation.write(ready)
    else:
        from jaxsafety.report import study_report

        sys.stdout.write(study_report.write(ready.directory))


@contextmanager
def _timed(directory: Path, stage: str):
    """Adds the seconds a stage took, over all processes that worked on it, to the manifest."""
    import time

    from jaxsafety import runlog

    started = time.monotonic()
    try:
        yield
    finally:
        before = runlog.read_manifest(directory).get("seconds", {}).get(stage, 0.0)
        runlog.write_manifest(directory, {"seconds": {stage: round(before + time.monotonic() - started, 1)}})


def _configure_jax(cache: str, *, seeds: int) -> None:
    """Sets what must be set before jax starts: a CPU device per core that seeds can use, and the compilation cache."""
    import jax

    from jaxsafety import sweep

    jax.config.update("jax_num_cpu_devices", sweep.shard_count(seeds, os.cpu_count() or 1))
    if cache != "off":
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _sample(options: argparse.Namespace, _: Sequence[str]) -> int:
    if options.n < 1:
        raise ValueError(f"-n must be at least 1, got {options.n}")
    if options.seed < 0:
        raise ValueError(f"--seed must be >= 0, got {options.seed}")
    from jaxsafety import keys, world
    from jaxsafety.world import text

    built = world.load(options.world)
    key = keys.stream(keys.root(options.seed), "evaluate")
    trial = world.batch_at(built, options.condition, key=key, step=0, batch_size=options.n)
    rows = text.examples(built, trial)
    sys.stdout.write("".join(_jsonl(row) if options.format == "jsonl" else _readable(row) for row in rows))
    return 0


def _jsonl(row: object) -> str:
    chosen, rejected = (row.refusal, row.expected) if row.unsafe else (row.expected, row.refusal)
    return json.dumps({"prompt": row.prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n"


def _readable(row: object) -> str:
    kind = "unsafe: the refusal is preferred" if row.unsafe else "safe: the true output is preferred"
    return (
        f"PCFG {row.pcfg}, {kind}\n"
        f"  operators  {row.operators}\n"
        f"  text       {row.text}\n"
        f"  expected   {row.expected}\n"
        f"    scored   {row.scored_expected}\n"
        f"  refusal    {row.refusal}\n"
        f"    scored   {row.scored_refusal}\n\n"
    )


def _env(options: argparse.Namespace, _: Sequence[str]) -> int:
    from jaxsafety import runlog

    print(json.dumps(runlog.environment(), indent=2))
    return 0
