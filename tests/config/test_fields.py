"""Fields of a Config: bounds, types, and which of them make another program."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import methods
from jaxsafety.config import fields, tables
from jaxsafety.config.fields import check, static, traced
from jaxsafety.methods import dpo
from jaxsafety.training.optim import OptimConfig


@dataclass(frozen=True)
class Config:
    """Made up.

    Attributes:
        beta: a scalar, which
            takes two lines.
        layers: some indices.
    """

    beta: float = traced(0.5, above=0, at_most=2)
    bound: float = traced(1.0, above=0, infinite=True)
    layers: tuple[int, ...] = static((0, 1), at_least=0)
    depth: int = 3
    kind: Literal["sum", "mean"] = "sum"
    strict: bool = False
    __post_init__ = check


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be > 0 and <= 2 and finite, got 0"),
        ({"beta": 2.5}, "beta must be > 0 and <= 2 and finite, got 2.5"),
        ({"beta": math.nan}, "beta must be > 0 and <= 2 and finite, got nan"),
        ({"bound": 0.0}, "bound must be > 0, got 0"),
        ({"layers": [0, -1]}, "layers must be >= 0 and finite, got -1"),
        ({"kind": "meen"}, "unknown kind 'meen': expected one of sum, mean; did you mean 'mean'?"),
        ({"beta": "fast"}, "beta must be a number, got 'fast'"),
        ({"beta": True}, "beta must be a number, got True"),
        ({"depth": 2.0}, "depth must be an integer, got 2.0"),
        ({"strict": 1}, "strict must be true or false, got 1"),
        ({"layers": 3}, "layers must be a list, got 3"),
        ({"layers": ["a"]}, "layers must be an integer, got 'a'"),
        ({"bta": 1.0}, "it has beta, bound, layers, depth, kind, strict; did you mean 'beta'?"),
        ({"depth": None}, "depth is empty: give it a value or leave the field out"),
    ],
)
def test_bad_values_are_one_sentence_that_names_owner_and_field(values, message):
    with pytest.raises(ValueError) as caught:
        fields.build(Config, values, owner="mine")
    assert message in str(caught.value) and str(caught.value).startswith("mine")


def test_plain_values_become_the_declared_types():
    built = fields.build(Config, {"beta": "3e-1", "bound": math.inf, "layers": [2], "depth": 4}, owner="mine")
    assert built == Config(beta=0.3, bound=math.inf, layers=(2,), depth=4)
    assert isinstance(fields.build(Config, {"beta": 1}, owner="mine").beta, float)


def test_traced_fields_are_a_lanes_and_static_ones_a_programs():
    assert fields.traced_names(Config) == ("beta", "bound")
    one, other = Config(beta=0.1), Config(beta=0.2)
    assert fields.program(one) == fields.program(other) != fields.program(Config(depth=4))
    # A lane's scalar is not checked again: it may be traced.
    assert fields.at_point(one, {"beta": "a tracer"}).beta == "a tracer" and one.beta == 0.1


@pytest.mark.parametrize("name", sorted(methods.TABLE))
def test_what_the_source_declares_is_what_the_method_has(name):
    """Help texts read the source, so that they need not import jax; every field has a sentence there."""
    config = methods.load(name).Config
    entry = re.compile(r"(?P<name>\w+) \((?P<kind>\w+), default (?P<default>.*?)\): .+")
    declared = [entry.fullmatch(line).groupdict() for line in tables.declared(methods.TABLE[name])]
    assert [field["name"] for field in declared] == list(config.__dataclass_fields__)
    assert {field["name"] for field in declared if field["kind"] == "traced"} == set(fields.traced_names(config))
    assert tables.summary(methods.TABLE[name])
    assert [field["default"] for field in declared] == [repr(getattr(config(), field["name"])) for field in declared]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dbo", "unknown method 'dbo': expected one of pretrain, sft, dpo, unlearn, .*; did you mean 'dpo'"),
        ("nowhere.at_all:METHOD", "there is no module 'nowhere.at_all' on the path of Python"),
        ("..x:METHOD", "'..x' is no module, expected package.module:METHOD"),
        ("jaxsafety.losses:nll", "method 'jaxsafety.losses:nll' is a function, expected a jaxsafety.types.Method"),
        ("jaxsafety.losses:METHOD", "module 'jaxsafety.losses' has no 'METHOD'"),
    ],
)
def test_a_method_that_is_not_there_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        methods.load(name)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_and_a_lanes_arrays_are_numbers():
    assert OptimConfig(warmup=np.float32(0.25)).warmup == 0.25
    with pytest.raises(ValueError, match=r"got warmup 2\.0"):
        OptimConfig(warmup=np.float32(2.0))
    built = jax.vmap(lambda weight: dpo.Config(weight_chosen=weight).weight_chosen)(jnp.arange(3.0))
    assert built.shape == (3,)
