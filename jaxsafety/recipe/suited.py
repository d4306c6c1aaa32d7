"""What a study has by default, and may have, by what it is about."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxsafety import analysis, attacks, pools
from jaxsafety.config.names import check_name
from jaxsafety.recipe.graph import default_models
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Data, Edited, Given, Reused, Selected, Training
from jaxsafety.recipe.nodes import AnalysisConfig, AttackConfig, SubjectConfig, default_attacks, default_edits
from jaxsafety.types import Subject

# Where models are files, a later one goes by these of an earlier one.
_OF_FILES = "expected `checkpoint: RUN/models/NAME/seed_{seed}`, as what another run has made is a directory"


def default_nodes(place: str, about: SubjectConfig) -> dict[str, Any]:
    """Returns the edits, attacks or analyses that a study of a subject has where its recipe names none."""
    if about.of_files or not about.load().speaks:
        return {}
    return _DEFAULTS[place]()


def _default_analyses() -> dict[str, AnalysisConfig]:
    return {name: AnalysisConfig(name) for name in analysis.DEFAULT}


_DEFAULTS = {"edits": default_edits, "attacks": default_attacks, "analyses": _default_analyses}


def models(about: SubjectConfig, given: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the models of a study as a recipe writes them, with what the subject adds; None are those by default."""
    subject = about.load()
    if given is None:
        given = {} if about.of_files or not subject.speaks else default_models()
    return dict(given) if subject.models is None else subject.models(about.options, given)


def check(recipe: Any) -> None:
    """Checks that nothing is asked of a recipe's subject that it cannot have.

    Raises:
        ValueError: a condition, a model, a pool, an edit, an attack or an analysis that it has not.
    """
    subject: Subject = recipe.subject.load()
    if recipe.subject.of_files:
        _check_files(recipe)
        return
    conditions = subject.conditions + (() if subject.further is None else subject.further(recipe.subject.options))
    for name in recipe.evaluate.conditions:
        check_name("condition in evaluate.conditions", name, conditions)
    if recipe.evaluate.answers:
        raise ValueError(f"evaluate.answers: got {recipe.evaluate.answers}, expected 0 but in a study of checkpoints")
    for lane in recipe.lanes:
        _check_lane(lane, conditions)
        if not subject.speaks and lane.training is not None:
            _check_wordless(lane.training.data, f"models.{lane.label}.data.pool")
    for label, node in recipe.analyses.items():
        own = node.load()
        if own.about == "files":
            raise ValueError(f"analyses.{label}: {node.analysis} is of checkpoints, and the study of {_kind(recipe)}")
        if not subject.speaks and (own.about not in ("update", "further") or own.reads):
            raise ValueError(
                f"analyses.{label}: models of {_kind(recipe)} read no text: expected analyses of weights alone"
            )
    for place in ("edits", "attacks"):
        if not subject.speaks and (label := next(iter(getattr(recipe, place)), None)):
            raise ValueError(f"{place}.{label}: models of {_kind(recipe)} read no text: expected no {place}")


def _kind(recipe: Any) -> str:
    return recipe.subject.kind


def _check_lane(lane: Lane, conditions: Sequence[str]) -> None:
    how, where = lane.how, f"models.{lane.label}"
    if isinstance(how, Given):
        raise ValueError(f"{where}.checkpoint: expected a study of checkpoints, such as `subject: {{checkpoint: DIR}}`")
    if isinstance(how, Selected):
        check_name(f"condition in {where}.by", how.by.partition("/")[0], conditions)
    if isinstance(how, Edited) and how.load().reads:
        raise ValueError(f"{where}.edit: {how.edit} may look at activations, expected it among `edits` alone")
    if isinstance(how, Training) and how.data.load().files:
        raise ValueError(f"{where}.data.pool: {how.data.pool} is of checkpoints: expected a pool of the subject's own")
    if isinstance(how, Training) and (drawn := how.data.load().conditions) is not None:
        for name in drawn(how.data.options):
            check_name(f"condition that pool {how.data.pool!r} of {where} draws", name, conditions)


def _check_wordless(data: Data, where: str) -> None:
    # Somebody's own pool may well have preferences without words.
    if data.pool in pools.TABLE and data.load().examples in ("preferences", "text"):
        raise ValueError(f"{where}: got {data.pool!r}, which draws text, expected a pool of the subject's own")


def _check_files(recipe: Any) -> None:
    """Checks a study of checkpoints."""
    if label := next(iter(recipe.edits), None):
        raise ValueError(
            f"edits.{label}: got one in a study of checkpoints, expected none: give the edited model a name below "
            "`models`"
        )
    for label, node in recipe.attacks.items():
        _check_attack(label, node, recipe)
    for label, node in recipe.analyses.items():
        if node.load().about != "files":
            raise ValueError(
                f"analyses.{label}: {node.analysis} is of models in memory, expected one of checkpoints: "
                f"{', '.join(analysis.OF_CHECKPOINTS)}"
            )
    for (label, node), (other, twin) in itertools.combinations(recipe.analyses.items(), 2):
        both = any(lane.is_among(node.on) and lane.is_among(twin.on) for lane in recipe.lanes)
        if node.analysis == twin.analysis and both:
            raise ValueError(
                f"analyses.{other}: analyses.{label} asks {node.analysis} of the same models: expected others in `on`"
            )
    if recipe.evaluate.conditions:
        raise ValueError("evaluate.conditions: expected none, as a prompt's label says its condition")
    if recipe.evaluate.on:
        raise ValueError("evaluate.on: expected none in a study of checkpoints, which judges every model")
    if recipe.evaluate.answers and recipe.subject.options.prompts is None:
        raise ValueError(f"evaluate.answers: got {recipe.evaluate.answers}, and there are no subject.prompts to answer")
    for lane in recipe.lanes:
        for problem in _of_files(lane, recipe):
            raise ValueError(f"models.{lane.label}{problem}")


def _check_attack(label: str, node: AttackConfig, recipe: Any) -> None:
    if node.load().written is None:
        known = [name for name in attacks.TABLE if attacks.load(name).written is not None]
        raise ValueError(
            f"attacks.{label}: {node.attack} is not made on written answers, as a study of checkpoints has them, "
            f"expected one that is: {', '.join(known)}"
        )
    if recipe.subject.options.prompts is None:
        raise ValueError(f"attacks.{label}: there are no prompts to attack, expected subject.prompts")
    if not recipe.evaluate.answers:
        raise ValueError(
            f"attacks.{label}: attacks are judged by answers, expected evaluate.answers, their most tokens"
        )


def _of_files(lane: Lane, recipe: Any) -> Iterator[str]:
    """What keeps a lane from being one over a checkpoint."""
    match lane.how:
        case Selected():
            yield ".select: got a selection, expected none in a study of checkpoints"
        case Reused():
            yield f".from: got a model of another run, {_OF_FILES}"
        case Edited() as how if not how.load().leafwise:
            yield f".edit: {how.edit} looks at whole models, expected one that goes matrix by matrix"
        case Training() as how:
            yield from _trained_on_files(how, lane, recipe)


def _trained_on_files(how: Training, lane: Lane, recipe: Any) -> Iterator[str]:
    method = how.load()
    if not how.data.load().files:
        yield f".data.pool: {how.data.pool} is of a world, expected pairs"
    elif how.data.options.file is None and recipe.subject.options.pairs is None:
        yield ": there are no examples to train on, expected subject.pairs or data.file"
    if lane.parent is None:
        yield " has no `from`: expected the model that training begins with"
    if how.parametrisation.kind not in ("full", "lora"):
        yield f".parametrisation: got {how.parametrisation.kind!r}, expected full or lora over a checkpoint"
    if method.examples != "preferences":
        yield f".method: {how.method} learns from {method.examples}, expected one that learns from preferences"
    if method.data is not None and how.asks_reference:
        yield (
            f".method: {how.method} asks a reference about examples that it transforms at every step, and a "
            "checkpoint's reference is read once: expected a method without one of the two"
        )
    if how.snapshots:
        yield f".snapshots: got {how.snapshots}, expected 0 over a checkpoint"
