"""Is it safety? The quantities of :mod:`jaxsafety.claims.updates` of SFT minus those of tuning on safe prompts alone.

The control is a model called ``benign``: the same method, rate, steps and base, no unsafe prompt. Margins were fixed
before ``experiments/update_control.yaml`` had been run, that about gradients before its second run, which measures
these. Fidelity: ours.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from jaxsafety.claims import contrasts as c
from jaxsafety.claims import gradients, updates
from jaxsafety.claims.evidence import Evidence, Model
from jaxsafety.claims.judging import Claim, Margin


def _beyond(quantity: Callable[..., c.Seeds], **options: str) -> Callable[[Evidence], c.Measurement]:
    """A quantity of SFT's update minus that of the control's."""
    return partial(c.between_methods, quantity=partial(quantity, **options), first="sft", second="benign")


_ENERGY = "share of |dW|^2 in the first eighth of directions that {}, SFT minus benign; mean over layers and matrices"


def _preference(evidence: Evidence, model: Model) -> c.Seeds:
    """ln of the second MLP matrix' gain on unsafe over that on safe inputs, mean over layers."""
    find = partial(evidence.find, "input_space", "gain", model=model, part="down")
    return np.log(find(condition="unsafe") / find(condition="safe")).mean(axis=0)


CLAIMS = (
    Claim(
        "safety_reads_unsafe",
        "Safety fine-tuning reads what unsafe prompts bring more than benign tuning does.",
        updates.BEYOND,
        _ENERGY.format("unsafe prompts' activations have most of"),
        measure=_beyond(updates.kept, space="unsafe"),
        margin=updates.POINTS,
    ),
    Claim(
        "safety_reads_weights",
        "Safety fine-tuning reads the inputs that the pretrained weights read most, more than benign tuning does.",
        updates.BEYOND,
        _ENERGY.format("the pretrained weights read most"),
        measure=_beyond(updates.kept, space="reads"),
        margin=updates.POINTS,
    ),
    Claim(
        "safety_writes_weights",
        "Safety fine-tuning writes the outputs that the pretrained weights write most, more than benign tuning does.",
        updates.BEYOND,
        _ENERGY.format("the pretrained weights write most"),
        measure=_beyond(updates.kept, space="writes"),
        margin=updates.POINTS,
    ),
    Claim(
        "safety_intruders",
        "Safety fine-tuning brings in more new leading directions, beyond chance, than benign tuning does.",
        updates.BEYOND,
        "intruders beyond those of a random update of its spectrum, SFT minus benign; mean over layers and matrices",
        measure=_beyond(updates.intruders),
        margin=updates.POINTS,
    ),
    Claim(
        "safety_prefers_unsafe",
        "Safety fine-tuning of the second MLP matrix answers unsafe prompts more than safe ones, beyond benign tuning.",
        updates.BEYOND,
        "ln of the mean |a dW| / |a| of the second MLP matrix on unsafe over that on safe inputs, SFT minus benign; "
        "mean over layers",
        measure=_beyond(_preference),
        margin=Margin(0.095, "the logarithm of a ratio of 1.1: a tenth more or less"),
    ),
    Claim(
        "safety_follows_gradient",
        "Safety fine-tuning lies where unsafe prompts' refusals become likelier, more than benign tuning does.",
        updates.BEYOND,
        _ENERGY.format("the gradient of refusals has most of") + " and both sides",
        measure=_beyond(gradients.kept),
        margin=updates.POINTS,
    ),
)
