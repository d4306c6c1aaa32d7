"""What runs the stages of a recipe, by what it is about: models stacked in memory, or files, each by itself."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxsafety.formats import sources
from jaxsafety.formats.sources import Places, Source
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.models import Given
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import layout, opening
from jaxsafety.study import analyze, evaluate, pipeline, train
from jaxsafety.study.checkpoints import analyze as analyze_files
from jaxsafety.study.checkpoints import evaluate as evaluate_files
from jaxsafety.study.checkpoints import inputs, strengths
from jaxsafety.study.checkpoints import train as train_files
from jaxsafety.study.pipeline import Study

# What answers that are there can be judged by again; what nothing goes by before prompts are read, and what nothing
# does before a model is trained, either.
_JUDGES = r"subject\.judges"
_OF_PROMPTS = r"evaluate\.answers|subject\.(prompts|columns|batch_tokens)"
_OF_TEXT = r"|subject\.(tokenizer|template|max_tokens|dtype)"


def prepare(recipe: Recipe, directory: Path, places: Places) -> Study:
    """Makes a recipe ready to run, and checks what it reads; ``places`` are those of models that it names.

    Raises:
        ImportError: an extra is missing.
        ValueError: a bad grammar, model, strategy, checkpoint or file.
        OSError: a file cannot be read.
    """
    if not recipe.subject.of_files:
        return pipeline.prepare(recipe, directory)
    study = replace(made(recipe, directory), sources=_found(recipe, places))
    inputs.check(study)
    strengths.check(study)
    return study


def made(recipe: Recipe, directory: Path) -> Study:
    """Returns a study whose results are there: what they were made from may be gone, and is not looked at."""
    return Study(recipe, None, "map", directory)


def _found(recipe: Recipe, places: Places) -> dict[str, Source]:
    """The sources of all models and tokenizers that a recipe names."""
    about, named = recipe.subject.options, []
    for given in (Given(about.checkpoint), *(lane.how for lane in recipe.lanes if isinstance(lane.how, Given))):
        named += [given.named(seed) for seed in recipe.seeds]
    named += [str(about.tokenizer)] if about.tokenizer is not None else []
    return {name: sources.find(name, places, store=about.store) for name in dict.fromkeys(named)}


def work(study: Study) -> Mapping[str, Callable[[Study], None]]:
    """Returns what runs each stage but the report."""
    files = study.recipe.subject.of_files
    make = train_files.train if files else train.train
    training = {stage: partial(make, stage=stage) for stage in ("pretrain", "tune")}
    judge, measure = (evaluate_files, analyze_files) if files else (evaluate, analyze)
    return training | {"evaluate": judge.write, "analyze": measure.write}


def record(study: Study) -> None:
    """Records in the run directory what the study is of, or checks that this is on record.

    Raises:
        ValueError: another study is, or a file that it reads has changed.
        OSError: it cannot be written.
    """
    path, config = study.directory / "config.yaml", as_dict(study.recipe)
    if not study.recipe.subject.of_files:
        opening.record_config(path, config, defaults=as_read_today(study.directory))
        opening.keep_files(study.directory / layout.FILES, pipeline.own_files(study.recipe))
        return
    allowed = {"grows": _grows(study), "free": _free(study)}
    more, told = opening.check_config(path, config, **allowed), inputs.unchanged(study)
    # Before what is asked is on record: a kill in between leaves nothing that passes for finished.
    if more and path.exists():
        analyze_files.reopen(study)
    opening.record_config(path, config, **allowed)
    inputs.record(study, told)
    train_files.forget(study)


def as_read_today(directory: Path) -> dict[str, Any]:
    """Returns the recipe on record with the defaults of fields that came after it; nothing where none can be read."""
    with suppress(ValueError):
        recipe = yaml_file.recorded(directory)
        return {} if recipe is None else as_dict(recipe)
    return {}


def _grows(study: Study) -> str:
    """What a study of checkpoints may be asked beside what its run began with, as it has pieces of its own.

    A field of an attack that is there may be 0, and is no less asked for.
    """
    there = "|".join(map(re.escape, as_read_today(study.directory).get("attacks") or ()))
    return r"analyses\..*|attacks\." + (rf"(?!({there})\.)" if there else "") + ".*"


def _free(study: Study) -> str:
    """What of a recipe over checkpoints nothing in its run goes by yet, or is done again, and so may be another."""
    if analyze_files.has_read(study):
        return _JUDGES
    trained = any(lane.training is not None for lane in study.recipe.lanes)
    return f"{_JUDGES}|{_OF_PROMPTS}" + ("" if trained else _OF_TEXT)
