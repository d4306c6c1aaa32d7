"""Does the update go where unsafe prompts' refusals become likelier before tuning? Statements about its gradients.

Margins were fixed before :mod:`jaxsafety.analysis.gradient_spaces` had measured anything, when the results of
:mod:`jaxsafety.claims.updates` were known. Tuning begins along such a gradient, so that more than chance is expected of
any training; what the same tuning without unsafe prompts gives stands in :mod:`jaxsafety.claims.benign`.

Fidelity: ours.
"""

from functools import partial

import numpy as np

from jaxsafety.claims import contrasts as c
from jaxsafety.claims import updates
from jaxsafety.claims.evidence import Evidence, Model
from jaxsafety.claims.judging import Claim, Margin

_SIDES = ("reads", "writes")


def _kept(evidence: Evidence, model: Model, side: str, *, of: str = "unsafe", metric: str = "kept_mean") -> c.Seeds:
    find = partial(evidence.find, "gradient_spaces", metric, model=model, strength=updates.SHARE)
    return np.mean([find(part=f"{matrix}:{of}:{side}")[0] for matrix in updates.MATRICES], axis=0)


def kept(evidence: Evidence, model: Model, *, of: str = "unsafe") -> c.Seeds:
    """Energy of the update in the first eighth of the directions of a gradient, mean over sides, layers, matrices."""
    return np.mean([_kept(evidence, model, side, of=of) for side in _SIDES], axis=0)


def _beyond_chance(evidence: Evidence, model: Model, *, side: str) -> c.Seeds:
    return _kept(evidence, model, side) - _kept(evidence, model, side, metric="chance")


def _unsafe_beyond_safe(evidence: Evidence, model: Model) -> c.Seeds:
    return kept(evidence, model) - kept(evidence, model, of="safe")


def _follows(evidence: Evidence, model: Model) -> c.Seeds:
    find = partial(evidence.find, "gradient_spaces", "cosine", model=model)
    return np.mean([find(part=f"{matrix}:unsafe").mean(axis=0) for matrix in updates.MATRICES], axis=0)


CLAIMS = (
    Claim(
        "reads_gradient",
        "The update reads the inputs by which unsafe prompts push towards refusals before tuning, beyond chance.",
        updates.BEYOND,
        updates.ENERGY.format("the gradient of refusals reads most"),
        measure=updates.over_methods(_beyond_chance, side="reads"),
        margin=updates.POINTS,
    ),
    Claim(
        "writes_gradient",
        "The update writes the outputs that unsafe prompts push towards before tuning, beyond chance.",
        updates.BEYOND,
        updates.ENERGY.format("the gradient of refusals writes most"),
        measure=updates.over_methods(_beyond_chance, side="writes"),
        margin=updates.POINTS,
    ),
    Claim(
        "gradient_unsafe_beyond_safe",
        "The update lies where unsafe prompts push towards refusals more than where safe prompts would.",
        updates.BEYOND,
        "the same share in the directions of the gradient of unsafe minus those of safe prompts' refusals, whose "
        "tokens are the same; mean over both sides, layers, matrices, methods",
        measure=updates.over_methods(_unsafe_beyond_safe),
        margin=updates.POINTS,
    ),
    Claim(
        "follows_gradient",
        "The update goes the way that unsafe prompts' refusals become likelier before tuning.",
        updates.BEYOND,
        "cosine of the update and the gradient of refusals' likelihood; mean over layers, MLP matrices, methods",
        measure=updates.over_methods(_follows),
        margin=Margin(0.05, "a cosine of 0.05"),
    ),
)
