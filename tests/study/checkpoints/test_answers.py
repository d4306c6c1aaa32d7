"""Answers: the model's own greedy continuation, kept batch by batch, and the refusals of what cannot be written."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxsafety.formats import hf
from jaxsafety.models import llama
from jaxsafety.rundir import signals
from jaxsafety.study.checkpoints import answers
from jaxsafety.study.checkpoints.batches import bucketed

NEW = 5


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return hf.open_checkpoint(checkpoints[0])


@pytest.fixture(scope="module")
def prompts():
    drawn = np.random.default_rng(0)
    return [drawn.integers(5, 400, length).tolist() for length in (3, 40, 17)]


@pytest.fixture(scope="module")
def batches(prompts):
    return bucketed(prompts, batch_tokens=64)


def write(checkpoint, batches, file, *, stop=(), max_new=NEW):
    return answers.write(
        checkpoint, batches, file, max_new=max_new, stop=stop, compute_dtype="float32", label="answers"
    )


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    """The likeliest next token of the whole text, one forward pass a token."""
    _, params = hf.load(checkpoint.directory, dtype="float32")
    run, found = jax.jit(partial(llama.apply, config=checkpoint.config)), []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(NEW):
            padded = np.array([text + [0] * (64 - len(text))], np.int32)
            text.append(int(run(params, padded).logits[0, len(text) - 1].argmax()))
        found.append(text[len(prompt) :])
    return found


def test_answers_are_greedy(checkpoint, batches, expected, tmp_path):
    assert write(checkpoint, batches, tmp_path / "a.json") == expected
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def test_padding_takes_no_place_of_the_window(checkpoint, prompts, expected, tmp_path):
    """The prompt of 40 tokens is padded to 64, and fills a window of 44 with what is fed back of its answer."""
    short = replace(checkpoint, config=replace(checkpoint.config, max_tokens=44))
    (batch,) = bucketed(prompts[1:2], batch_tokens=64)
    assert write(short, [batch], tmp_path / "a.json") == expected[1:2]
    with pytest.raises(ValueError, match=r"up to 45 tokens, and .* takes 44"):
        write(short, [batch], tmp_path / "b.json", max_new=NEW + 1)


def test_an_answer_ends_with_what_ends_it(checkpoint, batches, expected, tmp_path):
    stop = (expected[1][2], expected[2][0])
    found = write(checkpoint, batches, tmp_path / "a.json", stop=stop)
    for got, whole in zip(found, expected, strict=True):
        ends = [place for place, number in enumerate(whole) if number in stop]
        assert got == (whole[: ends[0] + 1] if ends else whole)
    assert len(found[1]) <= 3 and len(found[2]) == 1


def test_a_killed_run_writes_the_rest_alone(checkpoint, batches, expected, tmp_path, monkeypatch):
    def stop(where):
        raise signals.Stopped(15, where)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "check", stop)
        with pytest.raises(signals.Stopped):
            write(checkpoint, batches, tmp_path / "a.json")
    kept = json.loads((tmp_path / "a.json").read_text())
    assert 0 < sum(answer is not None for answer in kept) < 3
    assert write(checkpoint, batches, tmp_path / "a.json") == expected
    # All are there: the model is not loaded again.
    monkeypatch.setattr(hf, "load", None)
    assert write(checkpoint, batches, tmp_path / "a.json") == expected


@pytest.mark.parametrize("content", ["", "[", "3", "[[1]]", '{"a": 1}'])
def test_a_damaged_file_is_named(checkpoint, batches, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a.json does not hold the answers to these 3 prompts: remove it"):
        write(checkpoint, batches, tmp_path / "a.json")


def test_what_is_too_long_is_refused_before_the_model_is_loaded(checkpoint, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(ValueError, match=r"prompts and answers have up to 139 tokens, and .* takes 128"):
        write(checkpoint, batches, tmp_path / "a.json", max_new=100)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(checkpoint, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "load", None)
    monkeypatch.setattr(answers.memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match=r"needs .* GiB in float32, and the device has .* GiB free: .*or no answers"):
        write(checkpoint, batches, tmp_path / "a.json")
