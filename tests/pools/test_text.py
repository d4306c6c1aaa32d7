"""Pretraining samples against a plain construction, and their schedule."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.pools import text
from tests.oracles import plain_outputs, plain_sequence

# Shares from 2 000 draws: five standard errors of a coin are 0.056.
SHARE_ATOL = 0.06
DRAWS = 2000
SAMPLES = 200
MODES = ("text only", "whole", "first block", "second block")
EXCEPTION_IDS = ("ex1", "ex2")


def pure(mode, **changed):
    """A mixture of one sample type."""
    shares = tuple(float(i == mode) for i in range(4))
    return text.Config(start=shares, end=shares, **{"exception_probability": 0.0, **changed})


@dataclass(frozen=True)
class Traced(text.Config):
    """A mixture whose shares are arguments of a program, so that one program draws every sample type."""

    def __post_init__(self):
        """Traced numbers have no values to check."""


@pytest.fixture(scope="module")
def samples(tiny_world):
    """The same prompts in every mode, scored both ways, and with an exception token in each."""
    mixtures = {(mode, scored): pure(mode, scored=scored) for mode in range(4) for scored in ("all", "answers")}
    mixtures |= {("exception", mode): pure(mode, exception_probability=1.0) for mode in range(4)}

    @partial(jax.jit, static_argnames=("scored", "exception_probability"))
    def draw(key, shares, **fixed):
        mixture = Traced(start=shares, end=shares, **fixed)
        return text.draw(tiny_world, mixture, key=key, step=3, total_steps=10, batch_size=SAMPLES)

    def run(mixture):
        fixed = {name: getattr(mixture, name) for name in ("scored", "exception_probability")}
        return draw(keys.root(0), np.asarray(mixture.start, np.float32), **fixed)

    return {name: jax.device_get(run(mixture)) for name, mixture in mixtures.items()}


class Sample(NamedTuple):
    """A sample in words, read off its whole sequence."""

    names: list[str]
    operators: list[str]
    text: list[str]
    blocks: tuple[list[str], list[str]]


def read(built, batch, i) -> Sample:
    names = [built.spec.tokens[t] for t in (*batch.tokens[i], batch.targets[i, -1])]
    end = names.index(">")
    length = end - 6
    blocks = names[end + 1 : end + 1 + length], names[end + 2 + length : end + 2 + 2 * length]
    return Sample(names, names[1:5], names[6:end], blocks)


def as_prompt(built, sample, pcfg):
    letters = np.asarray([built.spec.letters.index(name) for name in sample.text])
    tasks = np.asarray([built.ids[name] for name in sample.operators])
    return SimpleNamespace(pcfg=pcfg, tasks=tasks, letters=letters)


def shown_and_scored(sample, mode):
    """Names that a sample type leaves (others are pads), and which of the following tokens it scores, of both kinds."""
    n = len(sample.text)
    segments = ["bos", *["tasks"] * 4, "sot", *["text"] * n, "eot", *["one"] * (n + 1), *["two"] * (n + 1), "eos"]
    segments += ["pad"] * (len(sample.names) - len(segments))
    everything = {"bos", "tasks", "sot", "text", "eot", "one", "two", "eos"}
    shown, scored = {
        0: ({"bos", "sot", "text", "eot"}, {"sot", "text", "eot"}),
        1: (everything, {"sot", "text", "eot", "one", "two", "eos"}),
        2: (everything - {"two", "eos"}, {"sot", "text", "eot", "one"}),
        3: (everything - {"text", "eot"}, {"sot", "two", "eos"}),
    }[mode]
    names = [name if segment in shown else "#" for name, segment in zip(sample.names, segments, strict=True)]
    mask = [segment in scored and "#" not in names[i : i + 2] for i, segment in enumerate(segments[1:])]
    answers = [on and segment in ("one", "two", "eos") for on, segment in zip(mask, segments[1:], strict=True)]
    return names, mask, answers


def test_whole_samples_are_the_definition_under_one_of_the_pcfgs(tiny_world, samples):
    for i in range(SAMPLES):
        sample = read(tiny_world, samples[1, "all"], i)
        prompts = [as_prompt(tiny_world, sample, pcfg) for pcfg in (0, 1)]
        assert list(sample.blocks) in [plain_outputs(tiny_world, prompt) for prompt in prompts]
        assert sample.names == plain_sequence(tiny_world, prompts[0], *sample.blocks)


@pytest.mark.parametrize("mode", range(4), ids=MODES)
def test_a_sample_type_shows_and_scores_exactly_its_part(tiny_world, samples, mode):
    for i in range(SAMPLES):
        names, mask, answers = shown_and_scored(read(tiny_world, samples[1, "all"], i), mode)
        for scored, expected in (("all", mask), ("answers", answers)):
            batch = samples[mode, scored]
            assert [tiny_world.spec.tokens[t] for t in batch.tokens[i]] == names[:-1]
            assert [tiny_world.spec.tokens[t] for t in batch.targets[i]] == names[1:]
            assert batch.mask[i].tolist() == expected


def test_an_exception_token_answers_with_one_letter(tiny_world, samples):
    letters = dict(zip(EXCEPTION_IDS, tiny_world.spec.letters, strict=False))
    seen = set()
    for i in range(SAMPLES):
        before, after = (read(tiny_world, samples[name], i) for name in ((1, "all"), ("exception", 1)))
        (slot,) = [k for k in range(4) if after.operators[k] in EXCEPTION_IDS]
        token = after.operators[slot]
        seen.add((slot, token))
        constant, empty = [letters[token]] * len(after.text), ["#"] * len(after.text)
        assert after.blocks == ((constant, empty) if slot < 2 else (before.blocks[0], constant))
        assert after.text == before.text
        assert after.operators == [*before.operators[:slot], token, *before.operators[slot + 1 :]]
    assert seen == {(slot, token) for slot in range(4) for token in EXCEPTION_IDS}


@pytest.mark.parametrize("mode", range(4), ids=MODES)
def test_a_sample_type_treats_exceptions_like_any_sample(tiny_world, samples, mode):
    batch = samples["exception", mode]
    for i in range(SAMPLES):
        names, mask, _ = shown_and_scored(read(tiny_world, samples["exception", 1], i), mode)
        assert [tiny_world.spec.tokens[t] for t in batch.tokens[i]] == names[:-1]
        assert batch.mask[i].tolist() == mask


@pytest.fixture(scope="module")
def scheduled(tiny_world):
    """Batches along a run of 100 steps under the default mixture, with many exception tokens."""
    mixture = text.Config(exception_probability=0.3)
    draw = partial(text.draw, tiny_world, mixture, total_steps=100, batch_size=DRAWS)
    jitted = jax.jit(lambda key, step: draw(key=key, step=step))
    return lambda step: jax.device_get(jitted(keys.root(1), step))


def shares(built, batch):
    """How often each sample type occurs, told by what is shown: operators, text, end of sequence."""
    pad, eos = built.special["pad"], built.special["eos"]
    tasks, text = batch.tokens[:, 1] != pad, batch.tokens[:, 6] != pad
    end = (np.concatenate([batch.tokens, batch.targets[:, -1:]], 1) == eos).any(1)
    return [(~tasks).mean(), (tasks & text & end).mean(), (tasks & text & ~end).mean(), (tasks & ~text).mean()]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (0.5, 0.1, 0.2, 0.2)),
        (10, (0.5, 0.1, 0.2, 0.2)),
        (55, (0.3, 0.15, 0.25, 0.3)),
        (100, (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_the_shares_of_the_sample_types_follow_the_schedule(tiny_world, scheduled, step, expected):
    np.testing.assert_allclose(shares(tiny_world, scheduled(step)), expected, atol=SHARE_ATOL)


def test_exception_tokens_come_as_often_as_asked(tiny_world, scheduled):
    tokens = scheduled(100).tokens
    tasks = tokens[:, 1:5][tokens[:, 1] != tiny_world.special["pad"]]
    found = np.isin(tasks, [tiny_world.ids[name] for name in EXCEPTION_IDS]).any(1)
    np.testing.assert_allclose(found.mean(), 0.3, atol=SHARE_ATOL)


def test_half_of_the_prompts_anchor_the_identity_or_its_duplicate(tiny_world, samples):
    """Without the anchor 2 of 9 task tokens are the identity: P(none) = 1/2 (7/9)^4."""
    same = [tiny_world.ids["("], tiny_world.ids["+"]]
    without = ~np.isin(samples[1, "all"].tokens[:, 1:5], same).any(1)
    np.testing.assert_allclose(without.mean(), 0.5 * (7 / 9) ** 4, atol=5 * 0.5 / SAMPLES**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": (0.5, 0.5, 0.0)}, "start must be four probabilities that sum to 1"),
        ({"end": (0.5, 0.5, 0.5, -0.5)}, "end must be four probabilities"),
        ({"end": (0.5, 0.2, 0.2, 0.2)}, "end must be four probabilities"),
        ({"ramp_start": 0.5, "ramp_end": 0.5}, "the ramp must satisfy 0 <= ramp_start < ramp_end <= 1"),
        ({"exception_probability": 1.5}, "exception_probability must be >= 0 and <= 1 and finite, got 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        text.Config(**changes)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_so_many_operators_are_duplicates(tiny_world, share):
    mixture = pure(1, duplicate_share=share)
    batch = jax.jit(
        lambda key: text.draw(tiny_world, mixture, key=key, step=0, total_steps=10, batch_size=DRAWS)
    )(keys.root(4))  # fmt: skip
    tasks, spec = np.asarray(batch.tokens)[:, 1:5], tiny_world.spec
    assert tasks.max() < len(spec.task_tokens)
    assert np.mean(tasks >= len(spec.operators)) == pytest.approx(share, abs=SHARE_ATOL / 2)
    # Each operator is named as often, and half of the samples have the identity, by some name, where it is put.
    by_name = np.bincount(tasks.ravel(), minlength=len(spec.task_tokens)) / tasks.size
    if share == 0:
        assert by_name[0] == pytest.approx(1 / 8 + 7 / 8 / 5, abs=SHARE_ATOL)
    if share == 1:
        assert np.all(by_name[: len(spec.operators)] == 0) and np.all(by_name[len(spec.operators) :] > 0.1)


def test_so_many_samples_that_ask_something_unsafe_are_refused(tiny_world):
    spec, base = tiny_world.spec, dict(tiny_world.spec.duplicates)
    draw = partial(text.draw, tiny_world, step=0, total_steps=10, batch_size=DRAWS)
    mixtures = {share: pure(1, refused=share) for share in (0.0, 0.3)}
    drawn = jax.device_get({share: jax.jit(partial(draw, one))(key=keys.root(4)) for share, one in mixtures.items()})
    np.testing.assert_array_equal(drawn[0.0].tokens[:, :5], drawn[0.3].tokens[:, :5])
    same = (drawn[0.0].targets == drawn[0.3].targets).all(axis=1)
    # On the text of a PCFG what is always unsafe there; tiny's two PCFGs have the same one.
    (unsafe,) = {policy.always_unsafe for policy in spec.policies}
    asks = np.array(
        [[base.get(spec.tokens[t], spec.tokens[t]) in unsafe for t in row[1:5]] for row in drawn[0.0].tokens]
    )
    assert same[~asks.any(axis=1)].all()
    assert 1 - same[asks.any(axis=1)].mean() == pytest.approx(0.3, abs=SHARE_ATOL)
    null = tiny_world.ids[spec.letters[0]]
    for i in np.flatnonzero(~same)[:20]:
        length = int((drawn[0.0].tokens[i] == tiny_world.special["eot"]).argmax()) - 6
        start = 6 + length  # the target after the text
        first, second = (drawn[0.3].targets[i][start + k * (length + 1) :][:length] for k in (0, 1))
        late = not asks[i, :2].any()
        assert (second == null).all() if late else (first == null).all()
        assert late or (second == tiny_world.special["pad"]).all()
