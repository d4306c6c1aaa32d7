"""The analyses and attacks of a study of checkpoints: each of every model of every seed, in pieces that are kept."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.recipe.lane import Lane
from jaxsafety.rundir import atomic, results
from jaxsafety.rundir.layout import ANALYSIS_FILE, RESULT_FILES
from jaxsafety.study.checkpoints import attacks, evaluate, inputs, opened, rows
from jaxsafety.study.checkpoints.attempts import Attempt
from jaxsafety.study.checkpoints.batches import Encoded
from jaxsafety.study.checkpoints.evaluate import is_copied, is_shared
from jaxsafety.study.checkpoints.opened import Looked
from jaxsafety.study.evaluate import run_labels
from jaxsafety.study.pipeline import Study

# What the pieces of an analysis that goes by verdicts were measured by.
_MARK = "verdicts.sha256"


def write(study: Study) -> None:
    """Writes ``results/analyze.parquet``: every analysis of every model, and every attack on it.

    Finished pieces are not repeated, and neither are answers.

    Raises:
        ValueError: a tensor is not finite, or something does not fit into memory; a judge fails or has no verdict.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the pieces before are kept.
    """
    asked, reader = None, None
    if study.recipe.subject.options.prompts is not None:
        asked, reader = inputs.asked(study, models=inputs.given(study)), inputs.tokenizer(study)
    for label, node in study.recipe.analyses.items():
        for lane in study.recipe.lanes:
            for seed in study.recipe.seeds[: 1 if _is_one(study, lane) else None]:
                if lane.is_among(node.on):
                    node.load().measure(_looked(study, label, lane, seed, asked, reader), node.options)
    for label, node in study.recipe.attacks.items():
        for lane in study.recipe.lanes:
            if lane.is_among(node.on):
                _attack(study, label, lane, asked, reader)
    frames = results.read_results(_pieces(study), schema=results.ANALYSIS_SCHEMA)
    shared = [lane for lane in study.recipe.lanes if is_copied(study, lane)]
    results.write_results(
        study.directory / "results" / ANALYSIS_FILE, rows.of_every_seed(frames, shared, study.recipe.seeds),
        schema=results.ANALYSIS_SCHEMA,
    )  # fmt: skip


def _attack(study: Study, label: str, lane: Lane, asked: Encoded, reader: Tokenizer) -> None:
    """Writes the rows of an attack on a lane, whose judge may be another one than when they were written before."""
    base = _base(study, lane) or lane
    is_one = is_shared(lane) and (is_shared(base) or not study.recipe.attacks[label].load().written.base)
    for seed in study.recipe.seeds[: 1 if is_one else None]:
        attempt = Attempt(study, label, lane, base, seed, asked, reader)
        rows.write(_folder(study, label, lane, seed) / "answers.parquet",
                   attacks.measured(attempt, labels=_labels(study, lane, seed)))  # fmt: skip


def _folder(study: Study, label: str, lane: Lane, seed: int) -> Path:
    return study.directory / "results" / "analyze" / label / lane.name / f"seed_{seed}"


def _labels(study: Study, lane: Lane, seed: int) -> dict[str, Any]:
    return run_labels(study) | {
        "method": lane.label, "lr_name": lane.point, "lr": lane.lr, "seed": seed, "step": lane.steps
    }  # fmt: skip


def _is_one(study: Study, lane: Lane) -> bool:
    """Whether all that an analysis of a lane looks at is the same for all seeds."""
    base = _base(study, lane)
    return is_shared(lane) and (base is None or is_shared(base))


def _base(study: Study, lane: Lane) -> Lane | None:
    """What the update of a lane is from; None for one that begins with none."""
    return None if lane.parent is None else lane.ancestor(study.recipe.analyze.base)


def has_read(study: Study) -> bool:
    """Whether something of what models do on prompts has been measured, or written."""
    folder = study.directory / "results"
    read = [label for label, node in study.recipe.analyses.items() if node.load().reads]
    return any(place.is_dir() for place in (folder / "answers", *(folder / "analyze" / label for label in read)))


def reopen(study: Study) -> None:
    """Removes what the stages end with, so that they go on to what the study has been asked since."""
    for name in (*RESULT_FILES, ANALYSIS_FILE):
        (study.directory / "results" / name).unlink(missing_ok=True)


def _pieces(study: Study) -> list[Path]:
    folder = study.directory / "results" / "analyze"
    labels = (*study.recipe.analyses, *study.recipe.attacks)
    return [piece for label in labels for piece in sorted((folder / label).rglob("*.parquet"))]


def _looked(study: Study, label: str, lane: Lane, seed: int, asked: Encoded | None, reader: Tokenizer | None) -> Looked:
    """What an analysis is given of one model."""
    base, about, own = _base(study, lane), study.recipe.subject.options, opened.of_lane(study, lane, seed)
    found = Looked(
        f"{lane.name} seed {seed}", own, base and opened.of_lane(study, base, seed),
        _folder(study, label, lane, seed), _labels(study, lane, seed), about,
    )  # fmt: skip
    if asked is None or not study.recipe.evaluate.answers:
        return replace(found, encoded=asked)
    given = evaluate.judged(study, lane, seed, asked, reader=reader)
    _keep_measured_by(given.verdicts, found.folder)
    return replace(found, encoded=asked, answers=given.ids, verdicts=tuple(given.verdicts))


def _keep_measured_by(verdicts: Sequence[str], folder: Path) -> None:
    """Removes pieces that were measured by other verdicts, such as those of another judge."""
    mark, own = folder / _MARK, hashlib.sha256(" ".join(verdicts).encode()).hexdigest()
    if not mark.exists() or mark.read_text() != own:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        atomic.atomic_write(mark, own)
