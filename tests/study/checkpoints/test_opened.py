"""Checkpoints that can be one model before and after: what differs is named on both sides; each is told from others."""

import json
import shutil

import pytest

from jaxsafety.formats import hf
from jaxsafety.rundir import opening
from jaxsafety.study.checkpoints import opened


@pytest.fixture
def alike(checkpoints):
    """Checks a checkpoint beside the first one."""

    def check(other, one=checkpoints[0]):
        sides = hf.open_checkpoint(one), hf.open_checkpoint(other)
        opened.check_alike(*sides)
        return sides

    return check


def test_two_of_one_architecture_are_alike(alike, checkpoints):
    one, other = alike(checkpoints[1])
    assert one.config == other.config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 408}, "different vocabularies: vocab_size is 400 and 408"),
        ({"layers": 2}, "different architectures: layers is 3 and 2"),
        ({"mlp_width": 64}, "different architectures: mlp_width is 48 and 64"),
        ({"tied": True}, "different architectures: tied is False and True"),
    ],
)
def test_checkpoints_that_differ_are_refused(alike, checkpoints, another, changed, message):
    other = another(**changed)
    with pytest.raises(ValueError, match=f"^{checkpoints[0]} and {other} have {message}"):
        alike(other)


def test_a_longer_context_is_no_difference(alike, another):
    assert alike(another(max_tokens=256))[1].config.max_tokens == 256


def test_one_checkpoint_is_no_two(alike, checkpoints):
    with pytest.raises(ValueError, match="is given as two models"):
        alike(checkpoints[0] / ".." / checkpoints[0].name)


def test_a_fingerprint_is_that_of_weights_and_configuration(checkpoints, tmp_path):
    one, other = (opened.fingerprint(hf.open_checkpoint(place)) for place in checkpoints)
    copy = shutil.copytree(checkpoints[1], tmp_path / "copy")
    assert opened.fingerprint(hf.open_checkpoint(copy)) == other != one
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert opened.fingerprint(hf.open_checkpoint(copy)) not in (one, other)


def test_other_options_are_named(tmp_path):
    opening.record_config(tmp_path / "weights.yaml", {"energy": 0.9, "attention": False})
    opening.record_config(tmp_path / "weights.yaml", {"energy": 0.9, "attention": False})
    with pytest.raises(ValueError, match=r"energy is 0.9 there and 0.8 here"):
        opening.record_config(tmp_path / "weights.yaml", {"energy": 0.8, "attention": False})


def test_what_grows_is_added_and_nothing_else_changes(tmp_path):
    path = tmp_path / "config.yaml"
    grown = [
        opening.record_config(path, {"a": {"b": 1} | more, "n": n}, grows=r"a\..*|n")
        for more, n in (({}, 0), ({"c": None}, 0), ({"c": 2}, 0), ({"c": 2}, 3))
    ]
    assert grown == [False, False, True, True]
    for config, message in (
        ({"a": {"b": 1}, "n": 3}, "a.c is 2 there and None here"),
        ({"a": {"b": 1, "c": 2}, "n": 0}, "n is 3 there and 0 here"),
        ({"a": {"b": 1, "c": 2, "d": 4}, "n": 5}, "a.d is None there and 4 here; n is 3 there and 5 here"),
        ({"a": {"b": 1, "c": 2}, "n": 3, "m": 1}, "m is None there and 1 here"),
    ):
        with pytest.raises(ValueError, match=message):
            opening.record_config(path, config, grows=r"a\..*|n")
