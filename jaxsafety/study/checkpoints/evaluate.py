"""What the models of a study of checkpoints answer to its prompts, and their learning curves, as tidy rows."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxsafety.claims.agreement import cohen_kappa
from jaxsafety.claims.intervals import share_interval
from jaxsafety.engine import legs
from jaxsafety.formats import hf, hf_generation, rule_judge
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Given
from jaxsafety.rundir import atomic, results
from jaxsafety.rundir.layout import RESULT_FILES
from jaxsafety.study.checkpoints import answers, inputs, judges, opened
from jaxsafety.study.checkpoints.batches import Encoded, bucketed
from jaxsafety.study.checkpoints.judges import Answer
from jaxsafety.study.evaluate import run_labels
from jaxsafety.study.pipeline import Study
from jaxsafety.subjects.checkpoint import RULE

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
    _check_joined(study, given)
    results.write_results(curves, results.rows_to_frame(shared | row for row in _curve_rows(study)))
    atomic.atomic_write(shown, json.dumps(list(_shown(study, given)), ensure_ascii=False, indent=1))
    results.write_results(table, results.rows_to_frame(shared | row for row in _verdict_rows(study, given)))


@dataclass(frozen=True)
class Judged:
    """What a model of one seed answered, as ids and in words, and the verdicts of the judge that decides."""

    lane: Lane
    seed: int
    asked: Encoded
    ids: list[list[int]]
    answers: list[Answer]
    verdicts: list[Verdict]


def _answered(study: Study) -> Iterator[Judged]:
    """Every model with its answers, of every seed; of one that all seeds share the first."""
    if not study.recipe.evaluate.answers:
        return
    reader, asked = inputs.tokenizer(study), inputs.asked(study, models=inputs.given(study))
    for lane in study.recipe.lanes:
        for seed in study.recipe.seeds[: 1 if is_shared(lane) else None]:
            yield judged(study, lane, seed, asked, reader=reader)


def judged(study: Study, lane: Lane, seed: int, asked: Encoded, *, reader: Tokenizer) -> Judged:
    """Returns the answers of a model with their verdicts, and keeps them as lines of JSON, also for another judge.

    Raises:
        ValueError: as :func:`ids`, or a judge that fails or has no verdict on some answer, which then are there.
        Stopped: a signal has asked to stop; the answers before are kept.
    """
    seed = study.recipe.seeds[0] if is_shared(lane) else seed
    written, first = ids(study, lane, seed, asked, reader=reader), judges.of(study.recipe.subject.options)[0]
    stop = ends(opened.of_lane(study, lane, seed), reader)
    found = []
    for place, (prompt, own) in enumerate(zip(asked.prompts, written, strict=True)):
        text, is_cut = reader.text(own), len(own) >= study.recipe.evaluate.answers and own[-1] not in stop
        found.append(Answer(judges.answer_id(lane.name, seed, place, text), prompt, text, is_cut))
    verdicts = decided(found, answers_file(study, lane, seed).with_suffix(".jsonl"), judge=first)
    return Judged(lane, seed, asked, written, found, verdicts)


def decided(found: Sequence[Answer], file: Path, *, judge: str) -> list[Verdict]:
    """Returns what the judge that decides says of answers, and keeps both as lines of JSON, also for another judge.

    Raises:
        ValueError: a judge that fails or has no verdict on some answer, which then are there.
    """
    if not file.exists():
        atomic.atomic_write(file, _lines([one.row() for one in found]))
    verdicts = judges.decided(judge, found)
    told = (_told(one, verdict, judge) for one, verdict in zip(found, verdicts, strict=True))
    atomic.atomic_write(file, _lines(told))
    return verdicts


def _told(answer: Answer, verdict: Verdict, judge: str) -> dict[str, Any]:
    """An answer with its verdict, and of the built-in rule's other why."""
    why = rule_judge.reason(answer.text, prompt=answer.asked, is_cut=answer.is_cut)
    is_told = judge == RULE and verdict == "other"
    return answer.row(verdict=verdict, **({"reason": why} if is_told else {}))


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ids(study: Study, lane: Lane, seed: int, asked: Encoded, *, reader: Tokenizer) -> list[list[int]]:
    """Returns the token ids of what a model answers to prompts, written now where they are not there.

    An answer ends with what the model's own files end it with, or with the end-of-sequence token of ``reader``.

    Raises:
        ValueError: the model does not fit into memory, or the file of answers is damaged.
        Stopped: a signal has asked to stop; the answers before are kept.
    """
    about, seed = study.recipe.subject.options, study.recipe.seeds[0] if is_shared(lane) else seed
    own = opened.of_lane(study, lane, seed)
    return answers.write(
        own, bucketed(asked.ids, batch_tokens=about.batch_tokens),
        answers_file(study, lane, seed),
        max_new=study.recipe.evaluate.answers, stop=ends(own, reader),
        compute_dtype=about.dtype, label=f"answers of {lane.name} seed {seed}",
    )  # fmt: skip


def ends(own: hf.Checkpoint, reader: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a model's answers."""
    found = dict.fromkeys((*hf_generation.read_generation(own.directory).stop, reader.eos))
    return tuple(end for end in found if end is not None)


def answers_file(study: Study, lane: Lane, seed: int, *under: str) -> Path:
    """Returns where the ids of a model's answers lie, those ``under`` an attack in folders of their own."""
    return study.directory.joinpath("results", "answers", lane.name, *under, f"seed_{seed}.json")


def is_shared(lane: Lane) -> bool:
    """Whether a lane is the same model for all seeds."""
    return isinstance(lane.how, Given) and lane.how.is_shared


def is_copied(study: Study, lane: Lane) -> bool:
    """Whether a lane's rows stand for every seed: one model that those of several seeds are compared with.

    Where no model differs between the seeds there is one seed of everything, and nothing to have an interval of.
    """
    several = not all(map(is_shared, study.recipe.lanes))
    return several and lane.parent is None and is_shared(lane)


def _verdict_rows(study: Study, given: list[Judged]) -> Iterator[dict[str, Any]]:
    for one in given:
        verdicts = np.array(one.verdicts)
        values = {
            (label, metric): share_interval(int((verdicts[one.asked.of(label)] == metric).sum()), count)
            for label in one.asked.labels if (count := int(one.asked.of(label).sum()))
            for metric in get_args(Verdict)
        }  # fmt: skip
        bounds = ("", "_low", "_high", "_n")
        told = {
            (label, metric + bound): number
            for (label, metric), interval in values.items()
            for bound, number in zip(bounds, interval, strict=True)
        } | {("", name): value for name, value in _agreement(study, one).items()}
        for seed in study.recipe.seeds if is_copied(study, one.lane) else (one.seed,):
            lane = {"method": one.lane.label, "lr_name": one.lane.point, "lr": one.lane.lr, "seed": seed}
            for (label, metric), value in told.items():
                where = {"step": one.lane.steps, "condition": label, "metric": metric, "value": value}
                yield {"stage": "evaluate"} | lane | where


def _check_joined(study: Study, given: list[Judged]) -> None:
    for judge in judges.of(study.recipe.subject.options)[1:] if given else ():
        if not any(verdict for one in given for verdict in judges.verdicts(judge, one.answers)):
            like = given[0].answers[0].id
            raise ValueError(f"{judge} has no verdict on any answer: expected ids such as {like}")


def _agreement(study: Study, given: Judged) -> dict[str, float | None]:
    """How far every further judge agrees with the one that decides, on the answers that it has a verdict on."""
    found: dict[str, float | None] = {}
    for judge in judges.of(study.recipe.subject.options)[1:]:
        other = judges.verdicts(judge, given.answers)
        pairs = [pair for pair in zip(given.verdicts, other, strict=True) if pair[1] is not None]
        if not pairs:
            continue
        found[f"agreement:{judge}"] = sum(one == two for one, two in pairs) / len(pairs)
        found[f"kappa:{judge}"] = cohen_kappa(*map(list, zip(*pairs, strict=True)))
        found[f"judged:{judge}"] = len(pairs)
    return found


def _shown(study: Study, given: list[Judged]) -> Iterator[dict[str, Any]]:
    """The first prompts of every label, with the answers of the models of the first seed."""
    first = [own for own in given if own.seed == study.recipe.seeds[0]]
    asked = first[0].asked if first else None
    for label in asked.labels if asked else ():
        for place in np.flatnonzero(asked.of(label))[:_EXAMPLES]:
            told = [
                {"model": " ".join(filter(None, (one.lane.label, one.lane.point))),
                 "answer": one.answers[place].text, "verdict": one.verdicts[place]}
                for one in first
            ]  # fmt: skip
            prompt = "\n".join(turn.content for turn in asked.prompts[place].messages)
            yield {"condition": label, "prompt": prompt, "answers": told}


def _curve_rows(study: Study) -> Iterator[dict[str, Any]]:
    tuned = [study.leg(lane) for lane in study.recipe.lanes if lane.training is not None]
    for labels, values in legs.curves(tuned, seeds=study.recipe.seeds) if tuned else ():
        for name, value in values.items():
            yield labels | {"condition": "train", "metric": name, "value": value}
