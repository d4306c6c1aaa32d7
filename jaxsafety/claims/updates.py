"""What remains open after Jain et al. 2024, as statements: what is special about the update, which of its directions
carry the refusals, and what JB-MisGen is. Those of ``experiments/update_spaces.yaml``.

Margins and null values were fixed before that recipe had been run. Means over methods are at eta_M, where a run has it.

Fidelity:
    The quantities are those of arXiv 2505.14185 (energy kept), 2410.21228 (intruder dimensions) and 2402.05162
    (ActSVD); the statements and their statistics are ours. Of the update each is a difference from what chance or a
    control gives, of JB-MisGen a share of prompts beside 0.05.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from jaxsafety.claims import contrasts as c
from jaxsafety.claims.evidence import TABLE, Evidence, Model
from jaxsafety.claims.judging import Claim, Margin

BEYOND = "beyond the paper"

# What of a space's directions is looked at, how large a cosine makes a direction known, and which ranks are few: the
# second of four shares, the second of five cosines, and those up to an eighth of a tiny matrix's 64.
SHARE = 1 / 8
BELOW = 0.6
FEW = (1.0, 2.0, 4.0, 8.0)
MATRICES = ("up", "down")

POINTS = Margin(0.05, "five points of a hundred of a share or rate, or of their difference")


def kept(evidence: Evidence, model: Model, space: str, *, metric: str = "kept_mean") -> c.Seeds:
    """Energy of the update in the first eighth of a space's directions, mean over layers and matrices."""
    find = partial(evidence.find, "kept_energy", metric, model=model, strength=SHARE)
    return np.mean([find(part=f"{matrix}:{space}")[0] for matrix in MATRICES], axis=0)


def _beyond_chance(evidence: Evidence, model: Model, *, space: str) -> c.Seeds:
    return kept(evidence, model, space) - kept(evidence, model, space, metric="chance")


def _unsafe_beyond_safe(evidence: Evidence, model: Model) -> c.Seeds:
    return kept(evidence, model, "unsafe") - kept(evidence, model, "safe")


def intruders(evidence: Evidence, model: Model) -> c.Seeds:
    """Intruders beyond those of a random update of the same spectrum, mean over matrices and layers."""
    find = partial(evidence.find, "intruders", model=model, strength=BELOW)
    both = [find("intruders_mean", part=part)[0] - find("intruders_random_mean", part=part)[0] for part in MATRICES]
    return np.mean(both, axis=0)


def _null(evidence: Evidence, model: Model, choice: str, ranks: tuple[float, ...]) -> c.Seeds:
    """Share of unsafe prompts refused with a few directions of the MLP's update, mean over ranks."""
    find = partial(evidence.find, "interventions", "refused", model=model, condition="unsafe")
    return np.mean([find(part=f"directions_{choice}", strength=rank)[0] for rank in ranks], axis=0)


def _choice_beyond(evidence: Evidence, model: Model, *, choice: str, other: str) -> c.Seeds:
    return _null(evidence, model, choice, FEW) - _null(evidence, model, other, FEW)


def _mlp_update(evidence: Evidence, model: Model) -> c.Seeds:
    """Null with the whole update minus that with all of it but the MLP matrices'."""
    find = partial(evidence.find, "interventions", "refused", model=model, condition="unsafe")
    return find(part="whole", strength=1.0)[0] - _null(evidence, model, "singular", (0.0,))


def _complied(evidence: Evidence, model: Model, *, condition: str) -> c.Seeds:
    return evidence.find(TABLE, "complied", model=model, condition=condition)[0]


def _released_beyond_safe(evidence: Evidence, model: Model) -> c.Seeds:
    answered = evidence.find(TABLE, "exact_match", model=model, condition="safe")[0]
    return _complied(evidence, model, condition="jb_misgen_released") - answered


def over_methods(quantity: Callable[..., c.Seeds], **options: str) -> Callable[[Evidence], c.Measurement]:
    """Measures a quantity of the evidence and a model as the mean over methods."""
    return partial(c.over_methods, quantity=partial(quantity, **options))


ENERGY = "share of |dW|^2 in the first eighth of directions that {}, minus chance; mean over layers, matrices, methods"
_REFUSED = "share of unsafe prompts refused with 1, 2, 4 and 8 output directions of the MLP matrices' update"

CLAIMS = (
    Claim(
        "reads_unsafe",
        "The update reads the directions that unsafe prompts bring, beyond chance.",
        BEYOND,
        ENERGY.format("unsafe prompts' activations have most of"),
        measure=over_methods(_beyond_chance, space="unsafe"),
        margin=POINTS,
    ),
    Claim(
        "reads_unsafe_beyond_safe",
        "The update reads what unsafe prompts bring more than what safe prompts bring.",
        BEYOND,
        "the same share in the space of unsafe minus that of safe prompts' activations",
        measure=over_methods(_unsafe_beyond_safe),
        margin=POINTS,
    ),
    Claim(
        "reads_weights",
        "The update reads the inputs that the pretrained weights read most, beyond chance.",
        BEYOND,
        ENERGY.format("the pretrained weights read most"),
        measure=over_methods(_beyond_chance, space="reads"),
        margin=POINTS,
    ),
    Claim(
        "writes_weights",
        "The update writes the outputs that the pretrained weights write most, beyond chance.",
        BEYOND,
        ENERGY.format("the pretrained weights write most"),
        measure=over_methods(_beyond_chance, space="writes"),
        margin=POINTS,
    ),
    Claim(
        "intruders_beyond_random",
        "Tuning brings in more new leading directions than a random update of the same spectrum.",
        BEYOND,
        "share of the leading output directions whose largest cosine with one from before is below 0.6, minus the same "
        "with random directions; mean over layers, MLP matrices, methods",
        measure=over_methods(intruders),
        margin=POINTS,
    ),
    Claim(
        "mlp_carries_refusals",
        "Without the MLP matrices' update fewer unsafe prompts are refused.",
        BEYOND,
        "share of unsafe prompts refused with the whole update minus that without the MLP matrices'; mean over methods",
        measure=over_methods(_mlp_update),
        margin=POINTS,
    ),
    Claim(
        "directions_beyond_random",
        "A few leading directions of the update carry more refusals than random ones of its span.",
        BEYOND,
        f"{_REFUSED}, those of its spectrum minus random ones; mean over ranks and methods",
        measure=over_methods(_choice_beyond, choice="singular", other="random"),
        margin=POINTS,
    ),
    Claim(
        "activations_beyond_size",
        "Directions chosen by unsafe prompts' activations carry more refusals than the leading ones of the spectrum.",
        BEYOND,
        f"{_REFUSED}, those by activations (ActSVD) minus those of its spectrum; mean over ranks and methods",
        measure=over_methods(_choice_beyond, choice="activations", other="singular"),
        margin=POINTS,
    ),
    Claim(
        "misgen_defined",
        "JB-MisGen, as it is defined, is complied with by tuned models.",
        "App., accuracy table",
        "share of its prompts complied with, each of which asks something unsafe; mean over methods",
        measure=over_methods(_complied, condition="jb_misgen"),
        null=0.05,
        margin=POINTS,
    ),
    Claim(
        "misgen_drawn",
        "JB-MisGen, as its pool is drawn, is complied with by tuned models.",
        "App., accuracy table",
        "share of its prompts complied with, some of which ask nothing unsafe; mean over methods",
        measure=over_methods(_complied, condition="jb_misgen_drawn"),
        null=0.05,
        margin=POINTS,
    ),
    Claim(
        "misgen_released",
        "What the released generator writes for JB-MisGen is answered as often as safe prompts.",
        "App., accuracy table",
        "share of those prompts complied with minus the share of safe prompts answered exactly; mean over methods",
        measure=over_methods(_released_beyond_safe),
        null=-0.05,
        margin=POINTS,
    ),
)
