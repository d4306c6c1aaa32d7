"""What a checkpoint is tuned with, checked before any device work."""

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from jaxsafety import methods
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import check_name
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.lora import TARGETS
from jaxsafety.types import Method, Needs


@dataclass(frozen=True)
class TuningConfig:
    """How a checkpoint is tuned.

    Attributes:
        method: a name of :data:`jaxsafety.methods.TABLE`, or somebody else's as ``package.module:NAME``.
        options: the method's own fields, its ``Config``; None is all of its defaults.
        steps: optimiser steps, at least 1.
        batch_size: examples of a step, at least 1.
        accumulate: parts that a batch is taken in, one after the other; a divisor of ``batch_size``.
        lora_rank: of the adapter's factors; None tunes all parameters.
        lora_alpha: the factors' product counts ``lora_alpha / lora_rank`` times.
        lora_targets: matrices that have factors, among q, k, v, o, gate, up and down.
        lr: peak of the learning rate's schedule, > 0.
        warmup: share of the steps over which the rate rises, in [0, 1).
        weight_decay: of the layers' matrices, where these are tuned themselves.
        max_tokens: inputs of a sequence; what is beyond is cut.
        chunk_steps: steps of a dispatch, between which progress is told, a row of metrics written, the state saved
            where that is due and a signal heard; at least 1.
        template: ``chat`` or ``raw``.
        dtype: what products are rounded to, and what the weights are held in; an optimiser's state, the adapter and,
            where all parameters are tuned, the copy that updates are added to are float32.
        recompute: whether layers are run again for their gradients.
        seed: of the adapter and of the order of the examples.
    """

    method: str
    steps: int
    options: Any = None
    batch_size: int = 8
    accumulate: int = 1
    lora_rank: int | None = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = tuple(TARGETS)
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_tokens: int = 1024
    chunk_steps: int = 10
    template: str = "chat"
    dtype: ComputeDtype = "float32"
    recompute: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.options is None:
            object.__setattr__(self, "options", self.load().Config())
        if not isinstance(self.options, self.load().Config):
            raise ValueError(f"options must be the Config of method {self.method!r}, got {self.options!r}")
        fields_.check_apart(self.load().Config, [one.name for one in fields(self)], owner=f"method {self.method!r}")
        check_name("dtype", self.dtype, get_args(ComputeDtype))
        check_name("template", self.template, ("chat", "raw"))
        for name in ("steps", "batch_size", "accumulate", "max_tokens", "chunk_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size {self.batch_size}")
        if self.accumulate > 1 and not self.needs.divisible:
            raise ValueError(f"accumulate: got {self.accumulate}, expected 1: {self.method} takes no batch in parts")
        if self.load().data is not None and self.load().reference is not None:
            raise ValueError(
                f"{self.method} asks a reference about examples that it transforms at every step: expected a method "
                "without one of the two, since a checkpoint's reference is read once"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if not self.lora_targets:
            raise ValueError(f"lora_targets: got none, expected some of {', '.join(TARGETS)}")
        for name in self.lora_targets:
            check_name("lora_targets", name, tuple(TARGETS))
        for name in ("lr", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if not (math.isfinite(self.lr) and math.isfinite(self.lora_alpha)):
            raise ValueError(f"lr and lora_alpha must be finite, got {self.lr} and {self.lora_alpha}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def load(self) -> Method:
        """Returns the method."""
        return methods.load(self.method)

    @property
    def pairs(self) -> bool:
        """Whether examples need a rejected answer."""
        return self.needs.rejected

    @property
    def needs(self) -> Needs:
        """What the method asks for."""
        return self.load().needs(self.options)

    @property
    def scale(self) -> float:
        """Of the adapter's product; 1 without one."""
        return 1.0 if self.lora_rank is None else self.lora_alpha / self.lora_rank
