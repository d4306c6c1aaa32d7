"""Losses of the methods as functions of parameters and examples, by name."""

import numpy as np

from jaxsafety import keys, methods
from jaxsafety.config import fields
from jaxsafety.training import answers, objective, stepping


def bound(name, model, *, reference=None, aux=None, progress=0.0, **options):
    """A method's loss ``(params, batch) -> (value, metrics)``; options that are arrays are a lane's own."""
    method = methods.load(name)
    weights = {"weight_chosen": 1.0, "weight_rejected": 0.1} if name in ("dpo", "unlearn") else {}
    unbounded = {"ascent_bound": np.inf} if name == "unlearn" else {}
    scalars = {name: value for name, value in options.items() if hasattr(value, "dtype")}
    plain = {name: value for name, value in options.items() if name not in scalars}
    config = fields.at_point(method.Config(**(weights | unbounded | plain)), scalars)
    given = {"reference": reference, "aux": aux, "progress": progress}
    return objective.make_loss(method, model, config, key=keys.root(0), **given)


def next_token(model):
    def loss(params, batch):
        value, seen = stepping.added(*answers.next_token(model, params, batch))
        return value, stepping.means(seen)

    return loss
