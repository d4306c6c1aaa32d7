"""A study as data: frozen dataclasses composed from the modules' own configs, read from YAML and written back.

Every field is checked when it is built, before any device work: a ValueError in one sentence names the field, what it
got and what it expects.
"""

import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jaxsafety import claims
from jaxsafety.config.fields import check, static
from jaxsafety.config.names import check_name
from jaxsafety.recipe import graph, suited
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Training
from jaxsafety.recipe.nodes import PLACES, Node, nodes, subject
from jaxsafety.types import Strategy

# Names of results and of figures that no label may take.
_TAKEN = (
    *("interventions", "evaluate", "curves", "causal", "directions", "transfer", "dynamics", "jailbreaks", "matrix"),
    *("input_alignment", "spectrum", "separation"),
)

# The state counts its steps in int32.
_MOST_STEPS = 2**31 - 1
# Of anything else; the prompts of the learning curves come from a step of their stream that no table may reach.
_MOST = 2**20


def _require_limits(config: Any, section: str) -> None:
    """Refuses integers that no machine could count or hold, which would end in a traceback, or in no end."""
    for name in (one.name for one in fields(config)):
        value, most = getattr(config, name), _MOST_STEPS if name.endswith("steps") else _MOST
        numbers = value if isinstance(value, tuple) else (value,)
        if largest := max((n for n in numbers if isinstance(n, int) and n > most), default=None):
            raise ValueError(f"{section}.{name} must be at most {most}, got {largest}")


def _require_plain(what: str, name: str) -> None:
    """Checks a name that becomes a directory."""
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{what} must be a plain file name, got {name!r}")


def _require_label(what: str, label: str) -> None:
    """Checks a label, which becomes part of file names, of figures' texts and of other names."""
    if not re.fullmatch(r"[\w.+-]{1,64}", label) or label in (".", ".."):
        raise ValueError(f"{what} must be at most 64 letters, digits and any of _ . + -, got {label!r}")


def _section(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").lower()


@dataclass(frozen=True)
class EvaluateConfig:
    """The accuracy table: fresh prompts per condition and seed.

    Attributes:
        prompts: prompts per condition and seed, a multiple of ``batch_size``.
        batch_size: prompts a forward pass.
        conditions: which conditions to draw; none is all that the subject has.
        on: names of the models, or of single lanes, that are judged; none is all. Whom a selection has not chosen need
            not be.
        probe_prompts: prompts per condition of the learning curves' read-out at every chunk end.
        answers: tokens that every model over a checkpoint writes after each prompt, greedily, at most; 0 for none.
    """

    prompts: int = static(1024, above=0)
    batch_size: int = static(256, above=0)
    conditions: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    probe_prompts: int = static(64, above=0)
    answers: int = static(0, at_least=0)

    def __post_init__(self):
        check(self, prefix="evaluate.")
        if self.prompts % self.batch_size:
            raise ValueError(
                f"evaluate.prompts must be a multiple of evaluate.batch_size, got {self.prompts} and {self.batch_size}"
            )
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"evaluate.conditions must name distinct conditions, got {list(self.conditions)}")


@dataclass(frozen=True)
class AnalyzeConfig:
    """The prompts of the analyses, attacks and edits.

    Attributes:
        prompts: prompts per condition and seed that models are analysed on, and as many held-out ones for the means of
            clusters; at most half of ``evaluate.prompts`` and a multiple of ``evaluate.batch_size``.
        response_positions: first positions of the answer that the ``response`` features average over (the paper: 10).
        attack_prompts: of these, prompts per condition that are attacked.
        edit_prompts: of these, prompts per condition that each edited model is judged on.
        base: what the update of a model is taken from: the ``root`` of its ancestors, or its ``parent``.
    """

    prompts: int = static(256, above=0)
    response_positions: int = static(10, above=0)
    attack_prompts: int = static(32, above=0)
    edit_prompts: int = static(32, above=0)
    base: Literal["root", "parent"] = "root"

    def __post_init__(self):
        check(self, prefix="analyze.")
        for name in ("attack_prompts", "edit_prompts"):
            if (count := getattr(self, name)) > self.prompts:
                raise ValueError(f"analyze.{name} must be at most analyze.prompts ({self.prompts}), got {count}")


@dataclass(frozen=True)
class Recipe:
    """A whole study.

    Attributes:
        name: names the run directory ``runs/NAME``.
        subject: what it is about, see :mod:`jaxsafety.subjects`.
        seeds: every seed has its own initialisation, data and evaluation draws.
        strategy: how seeds share the devices (see :mod:`jaxsafety.engine.sweep`).
        models: label to how a model comes about, see :mod:`jaxsafety.recipe.graph`; resolved, with all defaults. None
            are the paper's, or what the subject begins with.
        evaluate, analyze: what models are judged and analysed on.
        edits, attacks, analyses: label to what every model is put through, see :mod:`jaxsafety.recipe.nodes`; None is
            all of the paper's that the subject can have.
        claims: sets of statements that the results are judged by, names of :data:`jaxsafety.claims.TABLE` or somebody
            else's as ``package.module:CLAIMS``; None are all of ours where the subject has what they are about.
        grid: dotted field to the values it takes; every combination is a study, see :mod:`jaxsafety.recipe.cells`.
    """

    name: str = "study"
    subject: Any = field(default_factory=lambda: {"world": "tiny"})
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    strategy: Strategy = "auto"
    models: dict[str, Any] | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    edits: dict[str, Any] | None = None
    attacks: dict[str, Any] | None = None
    analyses: dict[str, Any] | None = None
    claims: tuple[str, ...] | None = None
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self):
        check(self)
        if not self.seeds:
            raise ValueError("seeds must name at least one seed, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct, got {list(self.seeds)}")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds must be >= 0 and < 2^32, got {list(self.seeds)}")
        _require_plain("name", self.name)
        object.__setattr__(self, "subject", subject(self.subject))
        object.__setattr__(self, "models", suited.models(self.subject, self.models))
        found = {label: graph.resolved(given, self.lanes_of(label), as_dict) for label, given in self.models.items()}
        object.__setattr__(self, "models", found)
        for config in (self.evaluate, self.analyze):
            _require_limits(config, _section(config))
        for lane in self.lanes:
            if lane.training is not None:
                _require_limits(lane.training, f"models.{lane.label}")
        prompts, drawn, batch = self.analyze.prompts, self.evaluate.prompts, self.evaluate.batch_size
        if 2 * prompts > drawn or prompts % batch:
            raise ValueError(
                f"analyze.prompts must be at most half of evaluate.prompts ({drawn}) and a multiple of "
                f"evaluate.batch_size ({batch}), got {prompts}"
            )
        for place in PLACES:
            given = getattr(self, place)
            given = suited.default_nodes(place, self.subject) if given is None else given
            object.__setattr__(self, place, nodes(place, given))
        if not self.evaluate.conditions:
            conditions = self.subject.load().conditions
            object.__setattr__(self, "evaluate", replace(self.evaluate, conditions=conditions))
        suited.check(self)
        for label in (*self.edits, *self.attacks, *self.analyses):
            _require_label("label of an edit, an attack or an analysis", label)
        _check_rows(self)
        if self.claims is None:
            object.__setattr__(self, "claims", claims.DEFAULT if self.subject.load().speaks else ())
        named = [claim.name for name in self.claims for claim in claims.load(name)]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"claims must have distinct names, got {twice[0]!r} twice")

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Every model at every point of its values, parents first."""
        return graph.expand(self.models)

    def lanes_of(self, label: str) -> tuple[Lane, ...]:
        """Returns the lanes of one model."""
        return tuple(lane for lane in self.lanes if lane.label == label)

    @property
    def tuned(self) -> tuple[Lane, ...]:
        """The lanes that begin with another model."""
        return tuple(lane for lane in self.lanes if lane.parent is not None)

    @property
    def compared(self) -> dict[str, Training]:
        """The trainings whose gradients are compared, by the name of the first model of each: of different methods or
        fields, all on safe and unsafe prompts to be answered and refused."""
        found: dict[str, Training] = {}
        seen = set()
        for lane in self.tuned:
            how = lane.training
            if how is None or not how.data.load().refuses or (key := (how.method, repr(how.options))) in seen:
                continue
            seen.add(key)
            found.setdefault(lane.label, how)
        return found

    @property
    def defences(self) -> tuple[str, ...]:
        """The models that claims are about: those whose role it is, or else all that are trained from a first one."""
        told = [lane.label for lane in self.lanes if lane.how.role == "defence"]
        first = [lane.label for lane in self.tuned if lane.training is not None and lane.parent is lane.root]
        return tuple(dict.fromkeys(told or first))

    @property
    def read_out(self) -> tuple[str, ...]:
        """The conditions of the learning curves: what is to be complied with, and what is to be refused."""
        return self.subject.load().conditions[:2]

    @property
    def conditions(self) -> dict[str, Any]:
        """Every condition that models are judged and analysed on: safe, unsafe, the others, then attacks' own."""
        names = dict.fromkeys((*self.read_out, *self.evaluate.conditions))
        return {name: name for name in names} | {
            label: one.condition for label, one in self.attacks.items() if one.condition is not None
        }

    @property
    def evaluated(self) -> dict[str, Any]:
        """The conditions of the accuracy table: those of ``evaluate``, then attacks' own."""
        own = {name: condition for name, condition in self.conditions.items() if not isinstance(condition, str)}
        return {name: name for name in self.evaluate.conditions} | own


def _check_rows(recipe: Recipe) -> None:
    """Refuses what result rows could not tell apart, and prompts that there are none of."""
    taken = {*recipe.analyses, *recipe.subject.load().conditions, *recipe.evaluate.conditions, *_TAKEN}
    drawn = {label for label, one in recipe.edits.items() if one.load().section}
    own = {*recipe.attacks} | drawn
    if twice := taken & own | drawn & {*recipe.attacks} | set(_TAKEN) & set(recipe.analyses):
        raise ValueError(f"{min(twice)!r} is the label of something else already: choose another")
    places = {f"{place}.{label}": one.on for place in PLACES for label, one in getattr(recipe, place).items()}
    known = dict.fromkeys([*recipe.models, *(lane.name for lane in recipe.lanes)])
    for where, on in {"evaluate": recipe.evaluate.on, **places}.items():
        for name in on:
            check_name(f"model or lane in {where}.on", name, known)
        if len(set(on)) < len(on):
            raise ValueError(f"{where}.on must name distinct models, got {list(on)}")
    for label, attack in recipe.attacks.items():
        if len(set(attack.conditions)) < len(attack.conditions):
            raise ValueError(f"attacks.{label}.conditions must be distinct, got {list(attack.conditions)}")
        # Of files, the prompts' own labels are known once they are read.
        for name in () if recipe.subject.of_files else attack.conditions:
            check_name(f"condition in attacks.{label}.conditions", name, recipe.conditions)
    for label, one in recipe.analyses.items():
        count = getattr(one.options, "prompts", 0)
        if isinstance(count, int) and count > recipe.analyze.prompts:
            raise ValueError(
                f"analyses.{label}.prompts must be at most analyze.prompts ({recipe.analyze.prompts}), got {count}"
            )


def as_dict(config: Any) -> Any:
    """Returns a config as plain dicts, lists and scalars, ready for YAML; a node's own fields beside the others."""
    if isinstance(config, Node):
        own = {one.name: as_dict(getattr(config, one.name)) for one in fields(config) if one.name != "options"}
        return own | as_dict(config.options)
    if hasattr(config, "__dataclass_fields__"):
        return {f.name: as_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config
