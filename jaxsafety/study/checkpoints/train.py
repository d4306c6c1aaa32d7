"""The models of a study of checkpoints: every seed of every lane by itself, one after the other, each a directory.

A model that is there is finished, and what it was made from is gone; a killed one goes on from the newest state.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from jaxsafety import keys
from jaxsafety.config.names import is_hub_name
from jaxsafety.formats import hf
from jaxsafety.formats.hf_tokenizer import SpecialTokens
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe import graph
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Edited, Given
from jaxsafety.rundir import progress, signals
from jaxsafety.study.checkpoints import edited, examples, files, inputs, job, opened, places, tuned
from jaxsafety.study.checkpoints.examples import Encoded
from jaxsafety.study.pipeline import Study


def train(study: Study, stage: str) -> None:
    """Makes the models of ``pretrain`` or ``tune`` that are not there, each after what it goes by.

    One that diverges stops none but those that go by it.

    Raises:
        ValueError: a tensor is not finite, something does not fit into memory, or a saved state is damaged.
        FloatingPointError: a training has diverged; the others are made.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; what was done is saved.
    """
    diverged: list[FloatingPointError] = []

    @lru_cache(maxsize=1)
    def given(lane: Lane, config: LlamaConfig) -> Encoded:
        """The examples of a lane, which its seeds share."""
        found = encoded(study, lane, config)
        for note in _notes(found, lane.name, study.recipe.subject.options.special_tokens):
            progress.say(note)
        return found

    for group in graph.groups(study.stage_lanes(stage)):
        for lane, seed in itertools.product(group, study.recipe.seeds):
            place, state = study.model(lane, seed), _state(study, lane, seed)
            needed = filter(None, (lane.parent, lane.reference, *lane.others.values()))
            if study.is_written(lane, seed) or not all(study.is_written(one, seed) for one in needed):
                continue
            signals.check(f"before {lane.name} seed {seed}")
            try:
                with _folders(place, study.adapter(lane, seed), state / "parts", within=study.directory):
                    _make(study, lane, seed, place, state, given)
            except FloatingPointError as error:
                progress.say(str(error))
                diverged.append(error)
    if diverged:
        more = f"; {len(diverged)} diverged in all, every other model that goes by none of them is made"
        raise FloatingPointError(f"{diverged[0]}{more * (len(diverged) > 1)}") from diverged[0]


def _notes(found: Encoded, name: str, special_tokens: SpecialTokens) -> Iterator[str]:
    """What the examples of a model may not be as somebody expects."""
    of = f"{found.count} examples of {name}"
    if found.truncated:
        yield f"{found.truncated} of {of} have more than {found.batch.chosen.tokens.shape[1]} tokens and are cut"
    if found.spelling:
        yield inputs.told_spelling(found.spelling, of, special_tokens)
    if found.alike:
        yield f"{found.alike} of {of} have two answers of the same tokens, between which nothing is learnt"
    if found.endless:
        yield (
            f"{found.endless} of {of} have an answer that no special token ends, so that none is learnt: a chat "
            "template writes one, such as eos_token, where the assistant has spoken"
        )


def forget(study: Study) -> None:
    """Removes what models that are there were made from: a kill may have come between the one and the other."""
    for lane in study.recipe.lanes:
        for seed in study.recipe.seeds:
            state = _state(study, lane, seed)
            if study.is_written(lane, seed):
                shutil.rmtree(state, ignore_errors=True)
                _drop_empty(state, within=study.directory)


def _state(study: Study, lane: Lane, seed: int) -> Path:
    """Where a model that is being made keeps what a killed run goes on from."""
    return study.leg(lane).checkpoints / f"seed_{seed}"


@contextmanager
def _folders(*places: Path, within: Path) -> Iterator[None]:
    """Makes the folder of the first place; none of these that is empty is left, whether what follows fails or not."""
    places[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _drop_empty(*places, within=within)


def _drop_empty(*places: Path, within: Path) -> None:
    """Removes the folders above some places that hold nothing."""
    for place in places:
        for folder in place.parents[: len(place.relative_to(within).parts) - 1]:
            with suppress(OSError):
                folder.rmdir()


def _make(
    study: Study, lane: Lane, seed: int, place: Path, state: Path, given: Callable[[Lane, LlamaConfig], Encoded]
) -> None:
    start, name = opened.of_lane(study, lane.parent, seed), f"{lane.name} seed {seed}"
    if isinstance(lane.how, Edited):
        trees = {"target": start}
        trees |= {role: opened.of_lane(study, other, seed) for role, other in lane.others.items()}
        edited.write(
            trees, place, lane.how, dtype=stored(study, lane), parts=state / "parts", key=keys.root(seed),
            name=name,
        )  # fmt: skip
        return
    written = study.exported(lane)
    adapter = None if written == "merged" else tuned.Adapter(study.adapter(lane, seed), *_named(study, lane, seed))
    model = None if written == "adapter" else place
    work = tuned.Work(name, study.leg(lane), state, model, stored(study, lane), adapter)
    other = lane.reference not in (None, lane.parent)
    reference = opened.of_lane(study, lane.reference, seed) if other else start
    own = job.of_lane(lane, study.about, seed)
    tuned.write(start, given(lane, start.config), work, own, places=places.local(), reference=reference)


def _named(study: Study, lane: Lane, seed: int) -> tuple[str, str | None]:
    """What PEFT finds the model by that a lane begins with: a name on the Hub and its commit, or a directory."""
    directory, how = study.model(lane.parent, seed), lane.parent.how
    named = how.named(seed) if isinstance(how, Given) else None
    if named in study.sources and is_hub_name(named) and study.sources[named].version == directory.name:
        return named.partition("@")[0], directory.name
    return str(directory.resolve()), None


def stored(study: Study, lane: Lane) -> hf.ParamsDtype:
    """Returns the type that a model is written in: ``subject.store``, or that of what it begins with.

    One that another edit goes on from is float32, so that a chain of edits rounds once.
    """
    goes_on = any(isinstance(other.how, Edited) and other.parent is lane for other in study.recipe.lanes)
    if isinstance(lane.how, Edited) and goes_on:
        return "float32"
    root = opened.of_lane(study, lane.root, study.recipe.seeds[0])
    return study.recipe.subject.options.store or root.tensors["embed", None].dtype.name


def encoded(study: Study, lane: Lane, config: LlamaConfig) -> Encoded:
    """Returns the examples that a model is trained on, as token ids."""
    given, most = files.of_training(lane.training, study.recipe.subject.options), inputs.longest(study, config)
    return examples.encode(given, inputs.tokenizer(study), max_tokens=most, vocab_size=config.vocab_size)
