"""Statistics of models that are trained further from others: what that changes of them, whoever they are from.

A lane of such a model is told by words of its point, such as ``prompts=10``; where it is from several models, one of
these words is ``from=NAME``.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from jaxsafety.claims.contrasts import Measurement, Seeds
from jaxsafety.claims.evidence import TABLE, Evidence, Model, Unmeasured, label

# Names of models, each with words.
Lanes = Sequence[tuple[str, Sequence[str]]]

_FROM = "from="


def rate(evidence: Evidence, model: Model, *, metric: str = "complied", condition: str = "unsafe") -> Seeds:
    """A rate of the accuracy table by seed, in [0, 1]."""
    return evidence.find(TABLE, metric, model=model, condition=condition)[0]


def lanes(evidence: Evidence, name: str, words: Sequence[str] = ()) -> list[Model]:
    """Returns the lanes of a model whose points have all of these words.

    Raises:
        Unmeasured: there is none.
    """
    every = (*evidence.models, *evidence.others)
    found = [one for one in every if one.method == name and all(_has(one, word) for word in words)]
    if not found:
        raise Unmeasured(f"no {' '.join((name, *words))} in this run")
    return found


def parent(evidence: Evidence, child: Model) -> Model:
    """Returns the model that a lane of a model from several is from.

    Raises:
        Unmeasured: it is not among the tuned models of the run.
    """
    every = (*evidence.models, *evidence.others)
    told = [one for one in every if _has(child, _FROM + ".".join(filter(None, one[:2])))]
    if not told:
        raise Unmeasured(f"no model that {label(child)} is from in this run")
    return told[0]


def gained(
    evidence: Evidence, *, name: str, words: Sequence[str] = (), metric: str = "complied", condition: str = "unsafe"
) -> Measurement:
    """A rate of a model minus that of what it is from; mean over its lanes that have the words."""
    find = partial(rate, evidence, metric=metric, condition=condition)
    found = lanes(evidence, name, words)
    return Measurement(np.mean([find(one) - find(parent(evidence, one)) for one in found], axis=0))


def beyond(
    evidence: Evidence, *, first: Lanes, second: Lanes, metric: str = "complied", condition: str = "unsafe"
) -> Measurement:
    """A rate of some lanes minus that of as many others, of means over either: each told by names and words.

    Raises:
        Unmeasured: not as many of each.
    """
    sides = [_every(evidence, side) for side in (first, second)]
    if len(sides[0]) != len(sides[1]):
        raise Unmeasured(f"{len(sides[0])} lanes beside {len(sides[1])}")
    means = [
        np.mean([rate(evidence, one, metric=metric, condition=condition) for one in side], axis=0) for side in sides
    ]
    return Measurement(means[0] - means[1])


def at_equal(
    evidence: Evidence, *, of: Lanes, others: Lanes, equal: str, metric: str = "complied", condition: str = "unsafe"
) -> Measurement:
    """A rate of one lane minus that of others where these have the same exact match of a condition.

    Between the others, in the order of their exact match, either is taken to be linear; beyond them it is that of the
    last. So two ways of giving up a part of what a model can do are compared where they give up as much.

    Raises:
        Unmeasured: several lanes of the one, or fewer than two others.
    """
    sides = [_every(evidence, side) for side in (of, others)]
    if len(sides[0]) != 1 or len(sides[1]) < 2:
        raise Unmeasured(f"{len(sides[0])} lanes beside {len(sides[1])}, not one beside several")
    find = partial(rate, evidence, metric=metric, condition=condition)
    kept = partial(rate, evidence, metric="exact_match", condition=equal)
    (one,), rest = sides
    xs, ys = (np.stack([measure(other) for other in rest], axis=1) for measure in (kept, find))
    order = np.argsort(xs, axis=1)
    curves = zip(kept(one), np.take_along_axis(xs, order, axis=1), np.take_along_axis(ys, order, axis=1), strict=True)
    return Measurement(find(one) - np.array([np.interp(x, *curve) for x, *curve in curves]))


def _every(evidence: Evidence, side: Lanes) -> list[Model]:
    return [one for name, words in side for one in lanes(evidence, name, words)]


def _has(model: Model, word: str) -> bool:
    # Values may have dots of their own.
    return f".{word}." in f".{model.lr_name}."
