"""Losses of the methods as functions of parameters and examples, by name."""

import numpy as np

from jaxsafety import keys, methods
from jaxsafety.training import answers, objective, stepping


def bound(name, model, *, reference=None, **options):
    """A method's loss ``(params, batch) -> (value, metrics)``."""
    method = methods.load(name)
    weights = {"weight_chosen": 1.0, "weight_rejected": 0.1} if name in ("dpo", "unlearn") else {}
    unbounded = {"ascent_bound": np.inf} if name == "unlearn" else {}
    config = method.Config(**(weights | unbounded | options))
    return objective.make_loss(method, model, config, reference=reference, key=keys.root(0))


def next_token(model):
    def loss(params, batch):
        value, seen = stepping.added(*answers.next_token(model, params, batch))
        return value, stepping.means(seen)

    return loss
