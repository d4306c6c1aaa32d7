"""What the models of a study of checkpoints answer to its prompts, and their learning curves, as tidy rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxsafety.engine import legs
from jaxsafety.formats import hf, hf_generation, prompts
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Given
from jaxsafety.rundir import atomic, results
from jaxsafety.rundir.layout import RESULT_FILES
from jaxsafety.study.checkpoints import answers, inputs
from jaxsafety.study.checkpoints.batches import Encoded, bucketed
from jaxsafety.study.evaluate import run_labels
from jaxsafety.study.pipeline import Study

# Of every label, the prompts whose answers a report shows.
_EXAMPLES = 2


def write(study: Study) -> None:
    """Writes ``RESULT_FILES``: the curves, the answers of all models to the prompts, and how often they refuse.

    Raises:
        ValueError: a model does not fit into memory or is too short for prompt and answer; a damaged file.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the answers before are kept.
    """
    folder, shared = study.directory / "results", run_labels(study)
    curves, shown, table = (folder / name for name in RESULT_FILES)
    given = list(_answered(study))
    results.write_results(curves, results.rows_to_frame(shared | row for row in _curve_rows(study)))
    atomic.atomic_write(shown, json.dumps(list(_shown(study, given)), ensure_ascii=False, indent=1))
    results.write_results(table, results.rows_to_frame(shared | row for row in _verdict_rows(study, given)))


def _answered(study: Study) -> Iterator[tuple[Lane, int, Encoded, list[str]]]:
    """Every model with the prompts and its answers in words, of every seed; of one that all seeds share the first."""
    if not study.recipe.evaluate.answers:
        return
    reader, asked = inputs.tokenizer(study), inputs.asked(study, models=inputs.given(study))
    for lane in study.recipe.lanes:
        for seed in study.recipe.seeds[: 1 if is_shared(lane) else None]:
            texts = [reader.text(own) for own in ids(study, lane, seed, asked, reader=reader)]
            told = prompts.answers_to_jsonl(asked.prompts, {"answer": texts})
            atomic.atomic_write(_answers_file(study, lane, seed).with_suffix(".jsonl"), told)
            yield lane, seed, asked, texts


def ids(study: Study, lane: Lane, seed: int, asked: Encoded, *, reader: Tokenizer) -> list[list[int]]:
    """Returns the token ids of what a model answers to prompts, written now where they are not there.

    An answer ends with what the model's own files end it with, or with the end-of-sequence token of ``reader``.

    Raises:
        ValueError: the model does not fit into memory, or the file of answers is damaged.
        Stopped: a signal has asked to stop; the answers before are kept.
    """
    about, seed = study.recipe.subject.options, study.recipe.seeds[0] if is_shared(lane) else seed
    own = hf.open_checkpoint(study.model(lane, seed))
    ends = dict.fromkeys((*hf_generation.read_generation(own.directory).stop, reader.eos))
    return answers.write(
        own, bucketed(asked.ids, batch_tokens=about.batch_tokens),
        _answers_file(study, lane, seed),
        max_new=study.recipe.evaluate.answers, stop=tuple(end for end in ends if end is not None),
        compute_dtype=about.dtype, label=f"answers of {lane.name} seed {seed}",
    )  # fmt: skip


def _answers_file(study: Study, lane: Lane, seed: int) -> Path:
    return study.directory / "results" / "answers" / lane.name / f"seed_{seed}.json"


def is_shared(lane: Lane) -> bool:
    """Whether a lane is the same model for all seeds."""
    return isinstance(lane.how, Given) and lane.how.is_shared


def is_copied(study: Study, lane: Lane) -> bool:
    """Whether a lane's rows stand for every seed: one model that those of several seeds are compared with.

    Where no model differs between the seeds there is one seed of everything, and nothing to have an interval of.
    """
    several = not all(map(is_shared, study.recipe.lanes))
    return several and lane.parent is None and is_shared(lane)


def _verdict_rows(study: Study, given: list[tuple[Lane, int, Encoded, list[str]]]) -> Iterator[dict[str, Any]]:
    for lane, first, asked, texts in given:
        verdicts = np.array([prompts.verdict(text) for text in texts])
        for seed in study.recipe.seeds if is_copied(study, lane) else (first,):
            for label in asked.labels:
                for metric in get_args(prompts.Verdict):
                    value = float((verdicts[asked.of(label)] == metric).mean())
                    labels = {"method": lane.label, "lr_name": lane.point, "lr": lane.lr, "seed": seed}
                    where = {"step": lane.steps, "condition": label, "metric": metric, "value": value}
                    yield {"stage": "evaluate"} | labels | where


def _shown(study: Study, given: list[tuple[Lane, int, Encoded, list[str]]]) -> Iterator[dict[str, Any]]:
    """The first prompts of every label, with the answers of the models of the first seed."""
    first = [own for own in given if own[1] == study.recipe.seeds[0]]
    asked = first[0][2] if first else None
    for label in asked.labels if asked else ():
        for place in np.flatnonzero(asked.of(label))[:_EXAMPLES]:
            told = [
                {"model": " ".join(filter(None, (lane.label, lane.point))), "answer": texts[place],
                 "verdict": prompts.verdict(texts[place])}
                for lane, _, _, texts in first
            ]  # fmt: skip
            prompt = "\n".join(turn.content for turn in asked.prompts[place].messages)
            yield {"condition": label, "prompt": prompt, "answers": told}


def _curve_rows(study: Study) -> Iterator[dict[str, Any]]:
    tuned = [study.leg(lane) for lane in study.recipe.lanes if lane.training is not None]
    for labels, values in legs.curves(tuned, seeds=study.recipe.seeds) if tuned else ():
        for name, value in values.items():
            yield labels | {"condition": "train", "metric": name, "value": value}
