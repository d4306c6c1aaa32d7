"""What a study of checkpoints reads: its models, tokenizer, prompts and examples, checked before any work, on record.

A run is of the files that it began with: one edited between two starts of it is noticed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxsafety.formats import hf, hf_config, hf_generation, hf_names, hf_tokenizer, hf_write, prompts
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.formats.hf_tokenizer import SpecialTokens, Tokenizer
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.models.lora import OUTER, TARGETS
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Given, Training
from jaxsafety.rundir import layout, manifest_file, opening, progress
from jaxsafety.study.checkpoints import answers, batches, files, judges, opened
from jaxsafety.study.checkpoints.batches import Encoded
from jaxsafety.study.checkpoints.opened import Model
from jaxsafety.study.pipeline import Study
from jaxsafety.subjects.checkpoint import Config

_RECORD = "inputs.yaml"


def check(study: Study) -> None:
    """Checks all that a study reads; nothing is loaded, and no device touched.

    Raises:
        FileNotFoundError: a directory or a file is missing.
        ValueError: a checkpoint that cannot be read, or of another architecture; no template, prompts or examples; a
            file that is none; a batch larger than the examples, a matrix that an adapter names and the model lacks.
    """
    recipe, about = study.recipe, study.about
    if jax.process_count() > 1:
        raise ValueError(f"a study of checkpoints runs in one process, got {jax.process_count()}: give each some seeds")
    _check_place(study.directory)
    models = given(study)
    first, *others = models
    own = {study.located(Given(about.checkpoint).named(seed)).resolve() for seed in recipe.seeds}
    if not own & {model.directory.resolve() for model in models}:
        raise ValueError(
            f"subject.checkpoint: got {about.checkpoint}, which no model of the recipe is, expected "
            f"{first.directory}, or another one of its models"
        )
    for other in others:
        opened.check_alike(first, other, vocabulary=not opened.is_of_weights(recipe))
    for model in models if not all(isinstance(lane.how, Given) for lane in recipe.lanes) else ():
        hf_write.companions(model.directory, tokenizer=about.tokenizer)
    _check_export(study)
    trained = [lane for lane in recipe.lanes if lane.training is not None]
    if trained or about.prompts is not None:
        _check_texts(study, models)
    for label, node in recipe.analyses.items():
        if node.load().reads and about.prompts is None:
            raise ValueError(f"analyses.{label} reads prompts, and there are none: expected subject.prompts")
    for lane in trained:
        _check_training(lane.training, lane, about, first)
    files.check_columns(study)
    if about.judges is not None and not recipe.evaluate.answers:
        raise ValueError(f"judges: got {', '.join(about.judges)}, and there are no answers: expected evaluate.answers")
    judges.check(judges.of(about))


def _check_export(study: Study) -> None:
    """Checks that nothing reads a model of which the adapter alone is written."""
    recipe = study.recipe
    if recipe.subject.options.export == "merged":
        return
    trained = [lane for lane in recipe.lanes if lane.training is not None]
    if whole := next((lane for lane in trained if lane.training.parametrisation.kind != "lora"), None):
        raise ValueError(f"subject.export: models.{whole.label} has no adapter, expected merged")
    if recipe.subject.options.export == "both":
        return
    readers = [f"models.{lane.label}" for lane in recipe.lanes
               if any(one in trained for one in (lane.parent, lane.reference, *lane.others.values()))]  # fmt: skip
    readers += ["evaluate.answers"] * bool(recipe.evaluate.answers) + [f"analyses.{label}" for label in recipe.analyses]
    if readers:
        raise ValueError(f"subject.export: got 'adapter', and {readers[0]} reads models themselves: expected both")


def _check_place(directory: Path) -> None:
    """Checks that a run directory is no model's, and that no models lie there that no run has made."""
    if (directory / CONFIG_FILE).exists():
        raise ValueError(f"{directory} is a model directory: choose another place for the run (--out)")
    models = directory / layout.MODELS
    if models.exists() and not any((directory / name).exists() for name in ("config.yaml", _RECORD)):
        raise ValueError(f"{models} is there, and no run has made it: choose another place for the run (--out)")


def _check_texts(study: Study, models: Sequence[hf.Checkpoint]) -> None:
    """Checks the tokenizer and the prompts, where there are any, and says what may not be as somebody expects."""
    reader, about, count = tokenizer(study), study.recipe.subject.options, study.recipe.evaluate.answers
    for note in hf_tokenizer.differences(reader):
        progress.say(note)
    if about.prompts is None:
        return
    encoded = asked(study, models=models)
    placed = batches.bucketed(encoded.ids, batch_tokens=about.batch_tokens)
    for model in models if count else ():
        answers.check_window(model, placed, max_new=count)
    for note in _notes(encoded, reader, models if count else ()):
        progress.say(note)


def _notes(encoded: Encoded, reader: Tokenizer, answering: Sequence[hf.Checkpoint]) -> Iterator[str]:
    if encoded.truncated:
        most = max(map(len, encoded.ids))
        yield (
            f"{encoded.truncated} of {len(encoded.prompts)} prompts have more than {most} tokens: their first token "
            "and their end are kept"
        )
    if encoded.spelling:
        yield told_spelling(encoded.spelling, f"{len(encoded.prompts)} prompts", reader.special_tokens)
    for model in answering:
        yield from _notes_on_answers(hf_generation.read_generation(model.directory), reader)


def _notes_on_answers(given: hf_generation.Generation, reader: Tokenizer) -> Iterator[str]:
    if given.unfollowed:
        asked = " and ".join(f"{name} {value}" for name, value in given.unfollowed.items())
        yield f"{given.file} asks for {asked}, which greedy answers here do not follow"
    if given.stop and reader.eos is not None and reader.eos not in given.stop:
        yield (
            f"answers end with the tokenizer's {reader.special['eos_token']}, too, which {given.file} does not name as "
            "eos_token_id, so that transformers would go on"
        )


def told_spelling(count: int, of: str, special_tokens: SpecialTokens) -> str:
    """Returns the sentence that ``count`` of something, a number and a plural, spell control tokens."""
    act = "act as such, as in transformers (special_tokens: text makes them text)"
    acts = act if special_tokens == "control" else "are encoded as text"
    return f"{count} of {of} spell special tokens of the model, which {acts}"


def given(study: Study) -> list[Model]:
    """Returns the checkpoints that a study is given, each once, the first model's before others."""
    lanes = [lane for lane in study.recipe.lanes if isinstance(lane.how, Given)]
    named = [(lane, study.model(lane, seed)) for lane in lanes for seed in study.recipe.seeds]
    found: dict[Path, Model] = {}
    of: dict[Path, dict[str, None]] = {}
    for lane, place in named:
        known = place.resolve()
        of.setdefault(known, {})[lane.name] = None
        if known in found:
            continue
        try:
            found[known] = opened.of_directory(study.recipe, place)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"models.{lane.label}: {error}") from error
    if twice := next((names for names in of.values() if len(names) > 1), None):
        raise ValueError(f"models {' and '.join(twice)} are one checkpoint: expected a model and what it became")
    return list(found.values())


def _check_adapter(how: Training, where: str, about: Config, first: hf.Checkpoint) -> None:
    """Refuses an adapter for PEFT of matrices that lie in one tensor, of which PEFT has one adapter."""
    joined = sorted(set(how.parametrisation.options.targets) & set(hf_names.FUSED))
    if about.export != "merged" and joined and hf_config.is_fused(first.directory):
        raise ValueError(
            f"{where}.parametrisation.targets: got {', '.join(joined)}, which {first.directory} stores joined, so that "
            "PEFT has no adapter of each: expected targets without them, or subject.export merged"
        )


def _check_training(how: Training, lane: Lane, about: Config, first: hf.Checkpoint) -> None:
    where, count = f"models.{lane.label}", len(files.of_training(how, about))
    if how.data.prompts is not None and how.data.prompts > count:
        raise ValueError(f"{where}.data.prompts: got {how.data.prompts}, expected at most the {count} there are")
    if how.batch_size > count:
        there = "examples there are" if how.data.prompts is None else "examples of data.prompts"
        raise ValueError(f"{where}.batch_size: got {how.batch_size}, expected at most the {count} {there}")
    if how.needs.unsafe and not any(example.unsafe for example in files.of_training(how, about)):
        raise ValueError(
            f"{where}: none of its {count} examples is labelled unsafe, from which {how.method} learns to refuse: "
            'expected lines with `"label": "unsafe"`'
        )
    if how.parametrisation.kind == "lora":
        _check_adapter(how, where, about, first)
        there = {path.rpartition("/")[2] for path, _ in first.tensors} & {*TARGETS, *OUTER}
        if first.config.tied and (named := set(how.parametrisation.options.targets) & set(OUTER)):
            raise ValueError(
                f"{where}.parametrisation.targets: got {min(named)!r}, and the model's unembedding is its embedding: "
                "expected matrices of its layers"
            )
        if lacking := sorted(set(how.parametrisation.options.targets) - there):
            raise ValueError(f"{where}.parametrisation.targets: the model has no {lacking[0]!r}")


def tokenizer(study: Study) -> Tokenizer:
    """Returns what reads and writes the text of all models."""
    about = study.about
    place = about.tokenizer or study.located(Given(about.checkpoint).named(study.recipe.seeds[0]))
    found = hf_tokenizer.open_tokenizer(place, raw=about.template == "raw", special_tokens=about.special_tokens)
    if about.template == "chat" and found.template is None:
        raise ValueError(
            f"no chat template in {place}: expected a model with one, another subject.tokenizer, or template raw"
        )
    return found


def longest(study: Study, own: LlamaConfig) -> int:
    """Returns the most inputs of a sequence that a model is to read."""
    return min(study.recipe.subject.options.max_tokens, own.max_tokens)


def asked(study: Study, *, models: Sequence[hf.Checkpoint]) -> Encoded:
    """Returns the prompts of a study as token ids, short enough for all of some models."""
    given = files.of_prompts(study.recipe.subject.options)
    most = min(longest(study, model.config) for model in models)
    return batches.encode(given, tokenizer(study), max_tokens=most, vocab_size=models[0].config.vocab_size)


def unchanged(study: Study) -> dict[str, Any]:
    """Returns what tells the files that a run reads from others, once they are those on record; nothing is written.

    Raises:
        ValueError: one has changed since the run began.
    """
    told, what = dict(_told(study)), "whose files have changed since it began"
    opening.check_config(study.directory / _RECORD, told, grows=".*", what=what)
    return told


def record(study: Study, told: dict[str, Any]) -> None:
    """Records what :func:`unchanged` has found of the files, and how many prompts there are; says how files were read.

    Raises:
        OSError: it cannot be written.
    """
    opening.record_config(study.directory / _RECORD, told, grows=".*")
    if study.recipe.subject.options.prompts is not None:
        encoded = asked(study, models=given(study))
        counted = {"asked": len(encoded.prompts), "truncated": encoded.truncated, "spelling": encoded.spelling}
        manifest_file.write_manifest(study.directory, {"prompts": counted})
    for line in files.readings(study):
        _say(line)


@cache
def _say(line: str) -> None:
    """Says a line once, however many cells of a grid read a file."""
    progress.say(line)


def _told(study: Study) -> Iterator[tuple[str, Any]]:
    recipe, about = study.recipe, study.recipe.subject.options
    # The first of several names of one directory, as the tokenizer's may be another.
    names = {source.directory: name for name, source in reversed(list(study.sources.items()))}
    for checkpoint in given(study):
        name = names.get(checkpoint.directory, str(checkpoint.directory))
        yield name, opened.fingerprint(checkpoint)
        if name in study.sources and study.sources[name].version is not None:
            yield f"version of {name}", study.sources[name].version
        if recipe.evaluate.answers:
            yield f"ends of {name}", str(hf_generation.read_generation(checkpoint.directory).stop)
    if about.prompts is not None:
        yield "prompts", _digest(prompts.to_jsonl(files.of_prompts(about)))
    if about.prompts is not None or any(lane.training is not None for lane in recipe.lanes):
        reader = tokenizer(study)
        yield "tokenizer", _digest(f"{reader.encoder.to_str()} {reader.template} {sorted(reader.special.items())}")
    for lane in recipe.lanes:
        if lane.training is not None:
            yield f"examples of {lane.name}", _digest(repr(files.of_training(lane.training, about)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
