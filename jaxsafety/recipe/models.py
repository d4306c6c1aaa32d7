"""How a model of a study comes about: trained, edited, selected, reused from another run, or given as a checkpoint."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jaxsafety import edits, methods, parametrisations, pools
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import SEED, check_name
from jaxsafety.config.told import told_of
from jaxsafety.recipe.nodes import Node, made
from jaxsafety.training.optim import OptimConfig
from jaxsafety.types import HParams, Needs

Role = Literal["model", "defence", "attack"]

# Of what a method may learn from, the pool unless a recipe says otherwise.
_POOLS = {"preferences": "safety", "text": "text", "labelled": "labelled"}
# What a selection may go by.
_RATES = ("complied", "refused", "other", "exact_match")


@dataclass(frozen=True)
class Data(Node):
    """The examples of a training: of a pool's, ``prompts`` different ones in turn, or new ones at every step.

    ``prompts`` is traced where there is a number of them: every number is the same program.
    """

    FOLDER = pools
    pool: str = "safety"
    # Positions in the stream are products of two of them, in int32.
    prompts: int | None = fields_.static(None, at_least=1, at_most=2**15)
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.prompts is not None and self.load().examples == "text":
            raise ValueError(
                f"prompts: got {self.prompts}, expected none of a pool of text, which changes with the steps"
            )
        if self.prompts is not None and getattr(self.options, "mix", "prompt") == "batch":
            raise ValueError("mix: got 'batch', expected 'prompt' where there is a number of prompts")

    def at_point(self, point: HParams) -> Any:
        """Returns the pool's fields with the scalars of one lane."""
        own = fields_.traced_names(self.options)
        return fields_.at_point(self.options, {name: point.data[name] for name in own})


@dataclass(frozen=True)
class Parametrised(Node):
    """What of a model is trained: ``kind`` is a name of :data:`jaxsafety.parametrisations.TABLE`, or somebody's own."""

    FOLDER = parametrisations
    kind: str = "full"
    options: Any = None

    def at_point(self, point: HParams) -> Any:
        """Returns its fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.parts)


@dataclass(frozen=True)
class Training(Node):
    """How one model is trained.

    Attributes:
        method: a name of :data:`jaxsafety.methods.TABLE`, or somebody else's as ``package.module:NAME``.
        steps: optimiser steps.
        batch_size: examples a step, per seed.
        lr: peak learning rate.
        accumulate: parts that a batch is taken in, one after the other; a divisor of ``batch_size``.
        chunk_steps: steps per dispatch; metrics are averaged over each, and a checkpoint of its end is
            written while the next one computes.
        snapshots: how many log-spaced moments between the first and the last step to keep the parameters of, for the
            analyses along training; fewer where the run is too short to tell them apart.
        reference: whose likelihoods a method asks that compares with a reference: the model that training begins with
            (``parent``), the first of its ancestors (``root``), or the nearest one of that name.
        role: what it is in the study: a ``defence``, an ``attack``, or a ``model`` like any.
        parametrisation: see :class:`Parametrised`.
        data: see :class:`Data`.
        optim: optimiser and schedule.
        options: the method's own fields.
    """

    FOLDER = methods
    method: str = "sft"
    steps: int = fields_.static(200, above=0)
    batch_size: int = fields_.static(64, above=0)
    lr: float = fields_.traced(1e-3, above=0)
    accumulate: int = fields_.static(1, at_least=1)
    chunk_steps: int = fields_.static(50, above=0)
    snapshots: int = fields_.static(0, at_least=0)
    reference: str = "parent"
    role: Role = "model"
    parametrisation: Parametrised = field(default_factory=Parametrised)
    data: Data = field(default_factory=Data)
    optim: OptimConfig = field(default_factory=OptimConfig)
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        wanted, there = self.load().examples, self.data.load().examples
        if wanted != there and self.data.load().files:
            # Files have what they have: another pool is no way out.
            raise ValueError(
                f"method: {self.method!r} learns from {wanted}, expected one that learns from {there}, which the pool "
                f"{self.data.pool!r} has"
            )
        if wanted != there:
            raise ValueError(
                f"data.pool: got {self.data.pool!r}, which has {there}, expected a pool of {wanted}, which method "
                f"{self.method!r} learns from"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size {self.batch_size}")
        if self.accumulate > 1 and not self.needs.divisible:
            raise ValueError(f"accumulate: got {self.accumulate}, expected 1: {self.method} takes no batch in parts")

    @property
    def needs(self) -> Needs:
        """What its method asks for."""
        return self.load().needs(self.options)

    @property
    def asks_reference(self) -> bool:
        """Whether its method compares with what an ancestor says."""
        return self.load().reference is not None and self.needs.reference

    def at_point(self, point: HParams) -> Any:
        """Returns the method's fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.options)

    @property
    def scalars(self) -> dict[str, dict[str, float | int]]:
        """What is traced of it: a lane's own scalars of the method and of its examples, by name."""
        data = {name: getattr(self.data.options, name) for name in fields_.traced_names(self.data.options)}
        if self.data.prompts is not None:
            data["prompts"] = self.data.prompts
        own, parts = (
            {name: getattr(one, name) for name in fields_.traced_names(one)}
            for one in (self.options, self.parametrisation.options)
        )
        return {"options": own, "parts": parts, "data": data}

    @property
    def program(self) -> Hashable:
        """What two trainings must have in common for one compiled program to do both: all but the traced scalars."""
        sizes = (self.steps, self.batch_size, self.accumulate, self.chunk_steps, self.snapshots)
        parts = (self.parametrisation.kind, fields_.program(self.parametrisation.options))
        own = (self.method, fields_.program(self.options), *parts, self.optim)
        data = (self.data.pool, fields_.program(self.data.options), self.data.prompts is None)
        return (*sizes, *own, *data)

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps of the snapshots: ``steps ** (i / (snapshots + 1))``, rounded, distinct and before the last step."""
        exponents = (i / (self.snapshots + 1) for i in range(1, self.snapshots + 1))
        return tuple(sorted({round(self.steps**exponent) for exponent in exponents} - {self.steps}))


@dataclass(frozen=True)
class Edited(Node):
    """The weights of another model, edited: the edit's target is what the model is ``from``.

    Whose weights an edit takes beside, fields of the names of its roles say: those of an ancestor (``base`` is the
    ``root`` unless a recipe says otherwise), of another model's twin of the target, or of its only lane.
    """

    FOLDER = edits
    edit: str = "scaled"
    role: Role = "model"
    options: Any = None

    @property
    def point(self) -> dict[str, Any]:
        """The strength of the edit, by swept field: of each its only value."""
        return {name: getattr(self.options, name)[0] for name in fields_.swept_names(self.options)}

    @property
    def program(self) -> Hashable:
        """What two edits must have in common for one compiled program to make both."""
        swept = fields_.swept_names(self.options)
        return self.edit, tuple((name, value) for name, value in fields_.program(self.options) if name not in swept)


@dataclass(frozen=True)
class Selected:
    """The lane of some other models that has the most of something, on prompts that nothing else looks at.

    Attributes:
        select: the names of the models whose lanes are the candidates; of a single one a recipe writes its name.
        per: what candidates of one selection have in common: ``from``, or fields that list values; none is one for all.
        by: ``CONDITION/RATE``, the mean over the seeds that live.
        largest: the most of it is selected, or the least.
        utility_drop: the most that the exact match of safe prompts may lie below that of a candidate's own parent, in
            [0, 1]; where none keeps to it the smallest drop is selected.
        role: as of :class:`Training`.
    """

    select: tuple[str, ...]
    per: tuple[str, ...] = ("from",)
    by: str = "unsafe/complied"
    largest: bool = True
    utility_drop: float | None = fields_.static(None, at_least=0, at_most=1)
    role: Role = "model"

    def __post_init__(self):
        fields_.check(self)
        if not self.select or len(set(self.select)) < len(self.select):
            raise ValueError(f"select: got {list(self.select)}, expected the names of distinct models")
        _, slash, rate = self.by.partition("/")
        if not slash:
            raise ValueError(f"by: got {self.by!r}, expected CONDITION/RATE such as unsafe/complied")
        check_name("rate in by", rate, _RATES)


@dataclass(frozen=True)
class Reused:
    """A finished lane of another run of the same subject.

    Attributes:
        run: its directory, from the recipe's file on.
        model: the lane's name there; its seeds must be among those of that run.
        parent: the model of this study, reused from the same run, that it began with there: what its update is from.
            None where it is looked at, or trained on, without that.
        generation: how many trainings came before it there, so that what is trained from it sees other examples; where
            a parent is named, its own and one more, whatever stands here.
        role: as of :class:`Training`.
    """

    run: str
    model: str
    parent: str | None = None
    generation: int = fields_.static(0, at_least=0)
    role: Role = "model"
    __post_init__ = fields_.check


@dataclass(frozen=True)
class Given:
    """A checkpoint as it is: what a study begins with, or what somebody tuned ``from`` another model.

    Attributes:
        checkpoint: its Hugging Face directory or GGUF file, from the recipe's file on, or its name on the Hub,
            ``org/name`` or ``org/name@revision``, also with an adapter of PEFT's, ``BASE+ADAPTER``; ``{seed}`` in it
            stands for each of the seeds.
        role: as of :class:`Training`.
    """

    checkpoint: str
    role: Role = "model"
    __post_init__ = fields_.check

    @property
    def is_shared(self) -> bool:
        """Whether it is one for all seeds."""
        return SEED not in self.checkpoint

    def named(self, seed: int) -> str:
        """What names the model of one seed."""
        return self.checkpoint.replace(SEED, str(seed))


How = Training | Edited | Selected | Reused | Given
# What says how a model comes about, beside a `from` with a run.
TOLD_BY = ("method", "edit", "select", "checkpoint")


def kind_of(given: Mapping[str, Any]) -> type[How]:
    """Returns how a model comes about, told by its fields as a recipe writes them."""
    if "edit" in given:
        return Edited
    if "select" in given:
        return Selected
    if "checkpoint" in given:
        return Given
    return Reused if isinstance(given.get("from"), Mapping) else Training


def default_pool(method: str) -> str:
    """Returns the pool that a method's examples come from unless a recipe says otherwise."""
    examples = methods.load(method).examples
    if examples not in _POOLS:
        raise ValueError(f"method {method!r} learns from {examples}: expected a data.pool that has them")
    return _POOLS[examples]


def trained(given: dict[str, Any], *, owner: str) -> Training:
    """Returns a training from its fields as a recipe writes them; see :func:`jaxsafety.recipe.nodes.made`."""
    data, method = given.get("data", {}), given.get("method")
    if isinstance(data, dict) and isinstance(method, str):
        with told_of(owner):
            data = data if "pool" in data else {"pool": default_pool(method)} | data
    below = [f"data.{name}" for name in ("p_unsafe", "mix", "prompts", "pool", "file")]
    below += [f"optim.{one.name}" for one in fields(OptimConfig)]
    # An option of a command about checkpoints, `--lora_rank`, is looked for here, too.
    below += [f"parametrisation.{name}" for name in ("kind", "rank", "targets")]
    below += ["from", *TOLD_BY]
    return made(Training, given | {"data": data}, owner=owner, below=below)
