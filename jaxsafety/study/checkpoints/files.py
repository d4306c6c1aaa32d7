"""The files of prompts and examples of a study of checkpoints: each read once, and how it was read."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from jaxsafety.config.names import nearest
from jaxsafety.formats import prompts
from jaxsafety.formats.datasets import Reading
from jaxsafety.formats.prompts import Prompt
from jaxsafety.recipe.models import Training
from jaxsafety.study.checkpoints import examples
from jaxsafety.study.checkpoints.examples import Example
from jaxsafety.study.pipeline import Study
from jaxsafety.subjects.checkpoint import Config

Columns = tuple[str, ...] | None


def check_columns(study: Study) -> None:
    """Refuses, in a ValueError, a name of ``subject.columns`` that no file of a study has."""
    named = study.recipe.subject.options.columns or ()
    there = {column: None for reading, _ in _readings(study) if named for column in reading.columns}
    for theirs in (one.partition("=")[2] for one in named):
        if theirs not in there:
            has = f"they have {', '.join(there)}" if there else "there is none"
            raise ValueError(f"columns: no file has a column {theirs!r}: {has}{nearest(theirs, there)}")


def readings(study: Study) -> list[str]:
    """Returns how the files of a study are read, in lines, each file's once."""
    return list(dict.fromkeys(line for reading, found in _readings(study) for line in reading.told(found)))


def _readings(study: Study) -> Iterator[tuple[Reading, str]]:
    """Every file's with what was found there."""
    about = study.recipe.subject.options
    if about.prompts is not None:
        given, reading = _prompts(about.prompts, _stamp(about.prompts), about.columns)
        labels = Counter(prompt.label for prompt in given)
        yield reading, f"{len(given):,} prompts, {', '.join(f'{labels[one]:,} {one}' for one in labels)}"
    for how in (lane.training for lane in study.recipe.lanes if lane.training is not None):
        given, reading = _of_file(how, about)
        unsafe = sum(example.unsafe for example in given)
        yield reading, f"{len(given):,} examples{f', {unsafe:,} labelled unsafe' if unsafe else ''}"


def of_training(how: Training, about: Config) -> list[Example]:
    """Returns the examples that a model is trained on."""
    return _of_file(how, about)[0][: how.data.prompts]


def _of_file(how: Training, about: Config) -> tuple[list[Example], Reading]:
    file = Path(how.data.options.file or about.pairs)
    return _examples(file, _stamp(file), how.needs.rejected, about.columns)


def _stamp(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


@cache
def _examples(file: Path, _: int | None, pairs: bool, columns: Columns) -> tuple[list[Example], Reading]:
    """A file as it is at a moment, read once for all that look at it."""
    return examples.read(file, pairs=pairs, columns=columns or ())


@cache
def _prompts(file: Path, _: int | None, columns: Columns) -> tuple[list[Prompt], Reading]:
    """See :func:`_examples`."""
    return prompts.read(file, columns=columns or ())


def of_prompts(about: Config) -> list[Prompt]:
    """Returns the prompts that models are asked."""
    return _prompts(about.prompts, _stamp(about.prompts), about.columns)[0]
