"""A study as data: frozen dataclasses composed from the modules' own configs, read from YAML and written back.

Every field is checked when it is built, before any device work: a ValueError in one sentence names the field, what it
got and what it expects.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from jaxsafety import methods
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import check_name
from jaxsafety.models import gpt
from jaxsafety.models.gpt import Block, GPTConfig, Positions, Preset
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.training.optim import OptimConfig
from jaxsafety.types import HParams, Method, Strategy
from jaxsafety.world.batches import Mixture
from jaxsafety.world.conditions import ConditionName
from jaxsafety.world.spec import World, WorldName

# What results and checkpoints call the model before tuning.
PRETRAINED = "pretrained"

# The state counts its steps in int32.
_MOST_STEPS = 2**31 - 1
# Of anything else; the prompts of the learning curves come from a step of their stream that no table may reach.
_MOST = 2**20
# Layers times width squared, a twelfth of the weights in the blocks: beyond, they would be 200 GB a model.
_MOST_MATRIX = 2**32


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{_section(config)}.{name} must be > 0 and finite, got {value}")


def _require_limits(config: Any) -> None:
    """Refuses integers that no machine could count or hold, which would end in a traceback, or in no end."""
    for name in (one.name for one in fields(config)):
        value, most = getattr(config, name), _MOST_STEPS if name.endswith("steps") else _MOST
        numbers = value if isinstance(value, tuple) else (value,)
        if largest := max((n for n in numbers if isinstance(n, int) and n > most), default=None):
            raise ValueError(f"{_section(config)}.{name} must be at most {most}, got {largest}")


def _require_plain(what: str, name: str) -> None:
    """Checks a name that becomes a directory."""
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{what} must be a plain file name, got {name!r}")


def _section(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _require_chunks(config: Any) -> None:
    steps, chunk = config.steps, config.chunk_steps
    if steps % chunk:
        raise ValueError(f"{_section(config)}.steps must be a multiple of chunk_steps, got {steps} and {chunk}")


@dataclass(frozen=True)
class ModelConfig:
    """The GPT: a preset, and what differs from it (None keeps the preset's value).

    Attributes:
        preset: ``tiny`` (3 layers, 4 heads, width 64), ``small`` (3, 4, 96) or ``paper`` (6, 6, 192).
        block: ``paper`` (skip branches start from the normalised input) or ``pre_ln``.
        positions: ``sinusoidal``, ``learned`` or ``rope``.
        layers, heads, width: sizes.
        compute_dtype: ``float32``, or ``bfloat16`` for the matrix products of training, forward and backward, DPO's
            reference included; their sums, parameters, norms, softmax, losses, gradients and optimiser stay float32.
            What is read from a model (learning curves' rates, evaluation, analyses) is computed in float32 from its
            float32 parameters, whatever it was trained in.
    """

    preset: Preset = "tiny"
    block: Block = "paper"
    positions: Positions = "sinusoidal"
    layers: int | None = None
    heads: int | None = None
    width: int | None = None
    compute_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        check_name("compute_dtype of a model", self.compute_dtype, get_args(ComputeDtype))

    def build(self, world: World) -> GPTConfig:
        """Returns the model's static configuration for the vocabulary and window of ``world``, in float32.

        Training alone replaces ``compute_dtype``, so that nothing can be measured in another by oversight.

        Raises:
            ValueError: a size that cannot be built, or a model that no memory holds.
        """
        sizes = {name: getattr(self, name) for name in ("layers", "heads", "width") if getattr(self, name) is not None}
        config = gpt.preset(
            self.preset,
            vocab_size=world.vocab_size,
            max_tokens=world.max_tokens,
            block=self.block,
            positions=self.positions,
            **sizes,
        )
        if (size := config.layers * config.width**2) > _MOST_MATRIX:
            raise ValueError(f"model.layers times model.width squared must be at most {_MOST_MATRIX}, got {size}")
        return config


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining on the world's mixture.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step, per seed.
        learning_rate: peak learning rate.
        chunk_steps: steps per dispatch; metrics are averaged and a checkpoint written at each chunk's end.
        mixture: sample types and their schedule.
        optim: optimiser and schedule.
    """

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    chunk_steps: int = 50
    mixture: Mixture = field(default_factory=Mixture)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        _require_positive(self, "steps", "batch_size", "learning_rate", "chunk_steps")
        _require_chunks(self)


@dataclass(frozen=True)
class MethodConfig:
    """One safety fine-tuning method of a study; a recipe writes the method's own fields beside these.

    Attributes:
        method: a name of :data:`jaxsafety.methods.TABLE`, or somebody else's as ``package.module:NAME``.
        p_unsafe: probability in [0, 1] that a prompt is unsafe.
        options: the method's own fields, its ``Config``; None is all of its defaults.
    """

    method: str = "sft"
    p_unsafe: float = 0.5
    options: Any = None

    def __post_init__(self):
        config = self.load().Config
        if not 0 <= self.p_unsafe <= 1:
            raise ValueError(f"p_unsafe of a method must be in [0, 1], got {self.p_unsafe}")
        if self.options is None:
            object.__setattr__(self, "options", config())
        if not isinstance(self.options, config):
            raise ValueError(f"options of method {self.method!r} must be its Config, got {self.options!r}")

    def load(self) -> Method:
        """Returns the method."""
        return methods.load(self.method)

    def at_point(self, point: HParams) -> Any:
        """Returns the method's fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.options)


def method_config(label: str, value: Any) -> MethodConfig:
    """Returns a method of a study from its fields as a recipe writes them.

    Without ``method`` the label is the method's name.

    Raises:
        ValueError: no such method, a field that it does not have, a bad value.
    """
    if isinstance(value, MethodConfig):
        return value
    where = f"tune.methods.{label}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold fields such as `method: sft`, got {value!r}")
    if "objective" in value:
        raise ValueError(f"{where}.objective is called {where}.method")
    named = {"method": label} if label in methods.TABLE else {}
    own = named | {name: given for name, given in value.items() if name in ("method", "p_unsafe")}
    if "method" not in own:
        raise ValueError(f"{where} has no method: expected {', '.join(methods.TABLE)}, or package.module:NAME")
    node = fields_.build(MethodConfig, own, owner=where)
    rest = {name: given for name, given in value.items() if name not in own}
    return replace(node, options=fields_.build(node.load().Config, rest, owner=where))


def _default_methods() -> dict[str, MethodConfig]:
    return {name: MethodConfig(name) for name in methods.TABLE}


@dataclass(frozen=True)
class TuneConfig:
    """Safety fine-tuning: every method at every learning rate, from the pretrained model of the same seed.

    Attributes:
        steps, batch_size, chunk_steps: as in pretraining.
        learning_rates: name to peak learning rate; one compiled program runs them all.
        snapshots: how many log-spaced moments between the first and the last step to keep the parameters of, for the
            analyses along training; fewer where the run is too short to tell them apart.
        mix: toss the safe/unsafe coin per ``prompt`` or, as the paper, per ``batch``.
        methods: label to :class:`MethodConfig`, or to its fields as a recipe writes them.
        optim: optimiser and schedule.
    """

    steps: int = 200
    batch_size: int = 64
    chunk_steps: int = 50
    learning_rates: dict[str, float] = field(default_factory=lambda: {"eta_M": 1e-3, "eta_S": 1e-4})
    snapshots: int = 4
    mix: Literal["prompt", "batch"] = "prompt"
    methods: dict[str, Any] = field(default_factory=_default_methods)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        _require_positive(self, "steps", "batch_size", "chunk_steps")
        _require_chunks(self)
        if not self.learning_rates or not self.methods:
            raise ValueError("tune needs at least one learning rate and one method")
        given = {label: method_config(label, value) for label, value in self.methods.items()}
        object.__setattr__(self, "methods", given)
        for label in self.methods:
            _require_plain("label of a method", label)
            if label == PRETRAINED:
                raise ValueError(f"{PRETRAINED!r} is the untuned model's label: choose another for the method")
        for name, value in self.learning_rates.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"tune.learning_rates.{name} must be > 0 and finite, got {value}")
        if self.snapshots < 0:
            raise ValueError(f"tune.snapshots must be >= 0, got {self.snapshots}")

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps of the snapshots: ``steps ** (i / (snapshots + 1))``, rounded, distinct and before the last step."""
        exponents = (i / (self.snapshots + 1) for i in range(1, self.snapshots + 1))
        return tuple(sorted({round(self.steps**exponent) for exponent in exponents} - {self.steps}))


@dataclass(frozen=True)
class EvaluateConfig:
    """The accuracy table: fresh prompts per condition and seed.

    Attributes:
        prompts: prompts per condition and seed, a multiple of ``batch_size``.
        batch_size: prompts a forward pass.
        conditions: which conditions to draw.
        probe_prompts: prompts per condition of the learning curves' read-out at every chunk end.
    """

    prompts: int = 1024
    batch_size: int = 256
    conditions: tuple[ConditionName, ...] = get_args(ConditionName)
    probe_prompts: int = 64

    def __post_init__(self):
        _require_positive(self, "prompts", "batch_size", "probe_prompts")
        if self.prompts % self.batch_size:
            raise ValueError(
                f"evaluate.prompts must be a multiple of evaluate.batch_size, got {self.prompts} and {self.batch_size}"
            )
        for name in self.conditions:
            check_name("condition", name, get_args(ConditionName))
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"evaluate.conditions must name distinct conditions, got {list(self.conditions)}")


@dataclass(frozen=True)
class AnalyzeConfig:
    """The analyses of every model, see :mod:`jaxsafety.analysis`.

    Attributes:
        prompts: prompts per condition and seed that features, inputs and verdicts are measured on, and as many held-out
            ones for the centroids; at most half of ``evaluate.prompts`` and a multiple of ``evaluate.batch_size``.
        response_positions: first positions of the answer that the ``response`` features average over (the paper: 10).
        energy: share of a squared spectrum that counts as a matrix's range, in (0, 1].
        directions: leading directions of the update that projections are written for; half as many span the spaces that
            are compared between methods.
        sensitivity_prompts: prompts per condition of the gradient norms, at most ``prompts``.
        jacobian_prompts: prompts per condition of the Jacobians' spectral norms, at most ``sensitivity_prompts``.
        gradient_prompts: safe prompts, and as many unsafe ones, that the methods' gradients are compared on; at most
            ``prompts``.
        intervention_prompts: prompts per condition that each intervention is judged on, at most ``prompts``.
        alphas: multiples of the update.
        ranks: ranks that the update is truncated to.
        soft_tokens: numbers of soft tokens; 0 is the prompt as it is.
        soft_steps: attack steps after which the attack is judged, ascending; the last one is its length.
        attack_prompts: unsafe prompts that soft tokens attack, at most ``prompts``.
        prefill_depths: tokens of the complied answer that the prefill attack gives away.
    """

    prompts: int = 256
    response_positions: int = 10
    energy: float = 0.9
    directions: int = 16
    sensitivity_prompts: int = 64
    jacobian_prompts: int = 8
    gradient_prompts: int = 64
    intervention_prompts: int = 32
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    soft_tokens: tuple[int, ...] = (0, 1, 2, 4)
    soft_steps: tuple[int, ...] = (0, 5, 10, 20)
    attack_prompts: int = 32
    prefill_depths: tuple[int, ...] = (0, 1, 2, 4)

    def __post_init__(self):
        sizes = ("prompts", "response_positions", "directions")
        subsets = ("sensitivity_prompts", "gradient_prompts", "intervention_prompts", "attack_prompts")
        _require_positive(self, *sizes, *subsets, "jacobian_prompts")
        for name, limit in (*((name, "prompts") for name in subsets), ("jacobian_prompts", "sensitivity_prompts")):
            if getattr(self, name) > getattr(self, limit):
                raise ValueError(
                    f"analyze.{name} must be at most analyze.{limit} ({getattr(self, limit)}), "
                    f"got {getattr(self, name)}"
                )
        if not 0 < self.energy <= 1:
            raise ValueError(f"analyze.energy must be in (0, 1], got {self.energy}")
        for name, least in (("alphas", 0), ("ranks", 1), ("soft_tokens", 0), ("soft_steps", 0), ("prefill_depths", 0)):
            values = getattr(self, name)
            ascending = list(values) == sorted(set(values))
            if not values or not ascending or not all(math.isfinite(v) and v >= least for v in values):
                raise ValueError(f"analyze.{name} must be ascending numbers of at least {least}, got {list(values)}")
        if self.soft_steps[-1] < 1:
            raise ValueError(f"analyze.soft_steps must end with at least 1 step, got {list(self.soft_steps)}")


@dataclass(frozen=True)
class Recipe:
    """A whole study.

    Attributes:
        name: names the run directory ``runs/NAME``.
        world: ``paper`` or ``tiny``.
        grammars: text conditions read from the user's own grammar files, by path (relative to the recipe's file).
        seeds: every seed has its own initialisation, data and evaluation draws.
        strategy: how seeds share the devices (see :mod:`jaxsafety.engine.sweep`).
        model, pretrain, tune, evaluate, analyze: the stages.
        grid: dotted field to the values it takes; every combination is a study, see :mod:`jaxsafety.recipe.cells`.
    """

    name: str = "study"
    world: WorldName = "tiny"
    grammars: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    strategy: Strategy = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("seeds must name at least one seed, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct, got {list(self.seeds)}")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds must be >= 0 and < 2^32, got {list(self.seeds)}")
        _require_plain("name", self.name)
        for config in (self.model, self.pretrain, self.tune, self.evaluate, self.analyze):
            _require_limits(config)
        prompts, drawn, batch = self.analyze.prompts, self.evaluate.prompts, self.evaluate.batch_size
        if 2 * prompts > drawn or prompts % batch:
            raise ValueError(
                f"analyze.prompts must be at most half of evaluate.prompts ({drawn}) and a multiple of "
                f"evaluate.batch_size ({batch}), got {prompts}"
            )


def as_dict(config: Any) -> Any:
    """Returns a config as plain dicts, lists and scalars, ready for YAML; a method's own fields beside the others."""
    if isinstance(config, MethodConfig):
        return {"method": config.method, "p_unsafe": config.p_unsafe} | as_dict(config.options)
    if hasattr(config, "__dataclass_fields__"):
        return {f.name: as_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_dict(value) for value in config]
    return config
