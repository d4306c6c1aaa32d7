"""What a checkpoint is tuned with, checked before any device work."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxsafety import methods
from jaxsafety.config import fields as fields_
from jaxsafety.config.fields import static
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
    steps: int = static(at_least=1)
    options: Any = None
    batch_size: int = static(8, at_least=1)
    accumulate: int = static(1, at_least=1)
    lora_rank: int | None = static(16, at_least=1)
    lora_alpha: float = static(32.0, above=0)
    lora_targets: tuple[str, ...] = tuple(TARGETS)
    lr: float = static(1e-4, above=0)
    warmup: float = static(0.1, at_least=0, below=1)
    weight_decay: float = static(0.0, at_least=0)
    max_tokens: int = static(1024, at_least=1)
    chunk_steps: int = static(10, at_least=1)
    template: Literal["chat", "raw"] = "chat"
    dtype: ComputeDtype = "float32"
    recompute: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.options is None:
            object.__setattr__(self, "options", self.load().Config())
        if not isinstance(self.options, self.load().Config):
            raise ValueError(f"options must be the Config of method {self.method!r}, got {self.options!r}")
        fields_.check_apart(self.load().Config, [one.name for one in fields(self)], owner=f"method {self.method!r}")
        fields_.check(self)
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size {self.batch_size}")
        if self.accumulate > 1 and not self.needs.divisible:
            raise ValueError(f"accumulate: got {self.accumulate}, expected 1: {self.method} takes no batch in parts")
        if self.load().examples != "preferences":
            raise ValueError(
                f"method: got {self.method}, which learns from {self.load().examples}, expected one that learns from "
                "preferences, which the examples of a checkpoint are"
            )
        if self.load().data is not None and self.load().reference is not None:
            raise ValueError(
                f"{self.method} asks a reference about examples that it transforms at every step: expected a method "
                "without one of the two, since a checkpoint's reference is read once"
            )
        if not self.lora_targets:
            raise ValueError(f"lora_targets: got none, expected some of {', '.join(TARGETS)}")
        for name in self.lora_targets:
            check_name("lora_targets", name, tuple(TARGETS))
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
