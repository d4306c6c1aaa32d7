"""Pairs that can be one: what differs is named on both sides; a directory has one pair and its options."""

import json
import shutil

import pytest

from jaxsafety.rundir import opening
from jaxsafety.study.pairs import opened


def test_a_pair_of_one_architecture_opens(checkpoints):
    pair = opened.open_pair(*checkpoints)
    assert pair.config == pair.tuned.config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 408}, "different vocabularies: vocab_size is 400 and 408"),
        ({"layers": 2}, "different architectures: layers is 3 and 2"),
        ({"mlp_width": 64}, "different architectures: mlp_width is 48 and 64"),
        ({"tied": True}, "different architectures: tied is False and True"),
    ],
)
def test_checkpoints_that_differ_are_refused(checkpoints, another, changed, message):
    with pytest.raises(ValueError, match=message):
        opened.open_pair(checkpoints[0], another(**changed))


def test_a_longer_context_is_no_difference(checkpoints, another):
    assert opened.open_pair(checkpoints[0], another(max_tokens=256)).tuned.config.max_tokens == 256


def test_one_checkpoint_is_no_pair(checkpoints):
    with pytest.raises(ValueError, match="is given as both checkpoints"):
        opened.open_pair(checkpoints[0], checkpoints[0] / ".." / checkpoints[0].name)


def test_no_model_directory(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        opened.open_pair(checkpoints[0], tmp_path)


def test_a_model_type_that_is_not_known(checkpoints, tmp_path):
    shutil.copytree(checkpoints[1], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(ValueError, match=r"model_type is 'lama', expected one of .*did you mean 'llama'"):
        opened.open_pair(checkpoints[0], tmp_path / "other")


def test_a_directory_belongs_to_one_pair(checkpoints, another, tmp_path):
    out, pair = tmp_path / "out", opened.open_pair(*checkpoints)
    for _ in range(2):
        with opened.enter(out, pair, "weights"):
            pass
    other = opened.open_pair(checkpoints[0], another())
    message = r"another configuration \(pair.tuned.directory is"
    with pytest.raises(ValueError, match=message), opened.enter(out, other, "weights"):
        pass


def test_other_weights_at_the_same_place_are_noticed(checkpoints, tmp_path):
    for side, name in zip(checkpoints, ("base", "tuned"), strict=True):
        shutil.copytree(side, tmp_path / name)
    places = tmp_path / "base", tmp_path / "tuned"
    with opened.enter(tmp_path / "out", opened.open_pair(*places), "weights"):
        pass
    shutil.copyfile(places[0] / "model.safetensors", places[1] / "model.safetensors")
    changed = opened.open_pair(*places)
    with pytest.raises(ValueError, match=r"pair.tuned.fingerprint"), opened.enter(tmp_path / "out", changed, "weights"):
        pass


def test_other_options_are_named(tmp_path):
    opening.record_config(tmp_path / "weights.yaml", {"energy": 0.9, "attention": False})
    opening.record_config(tmp_path / "weights.yaml", {"energy": 0.9, "attention": False})
    with pytest.raises(ValueError, match=r"energy is 0.9 there and 0.8 here"):
        opening.record_config(tmp_path / "weights.yaml", {"energy": 0.8, "attention": False})
