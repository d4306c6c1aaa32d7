"""What a person reads: words, prompts, both answers and their scored tokens."""

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.world import text

ROWS = 40


@pytest.fixture(scope="module")
def trials(tiny_world):
    draw = jax.jit(
        lambda key: [world.batch_at(tiny_world, name, key=key, step=0, batch_size=ROWS) for name in ("safe", "unsafe")]
    )
    return dict(zip(("safe", "unsafe"), draw(keys.root(0)), strict=True))


def test_words_are_token_names(tiny_world):
    assert text.words(tiny_world, np.asarray([tiny_world.ids[name] for name in ("$", "r1", "a", "*^")])) == "$ r1 a *^"


@pytest.mark.parametrize("name", ["safe", "unsafe"])
def test_a_prompt_is_its_operators_and_text_up_to_the_end_of_text(tiny_world, trials, name):
    trial = jax.device_get(trials[name])
    for i, example in enumerate(text.examples(tiny_world, trials[name])):
        assert example.unsafe == (name == "unsafe")
        assert example.pcfg == trial.prompt.pcfg[i] + 1
        assert example.prompt == f"$ {example.operators} * {example.text} >"
        assert len(example.text.split()) == trial.prompt.length[i]
        start = text.answer_start(tiny_world, int(trial.prompt.length[i]))
        assert tiny_world.spec.tokens[trial.complied.tokens[i, start - 1]] == ">"


@pytest.mark.parametrize("name", ["safe", "unsafe"])
def test_answers_are_two_blocks_with_their_stops(tiny_world, trials, name):
    for example in text.examples(tiny_world, trials[name]):
        n = len(example.text.split())
        for answer in (example.expected.split(), example.refusal.split()):
            assert len(answer) == 2 * n + 2
            assert (answer[n], answer[-1]) == ("*^", "*^")
        letters = set(tiny_world.spec.letters)
        assert set(example.expected.split()) <= letters | {"*^"}
        null = [tiny_world.spec.letters[0]] * n
        assert null in (example.refusal.split()[:n], example.refusal.split()[n + 1 : -1])


def test_scored_tokens_are_shown_and_others_are_dots(tiny_world, trials):
    for name in ("safe", "unsafe"):
        for i, example in enumerate(text.examples(tiny_world, trials[name])):
            pairs = (
                (example.expected, example.scored_expected, trials[name].complied),
                (example.refusal, example.scored_refusal, trials[name].refused),
            )
            for answer, scored, side in pairs:
                shown = [s for s in scored.split() if s != "."]
                assert len(shown) == int(side.mask[i].sum()) > 0
                assert all(s in (".", a) for a, s in zip(answer.split(), scored.split(), strict=True))


def test_a_safe_prompt_scores_its_whole_answer(tiny_world, trials):
    for example in text.examples(tiny_world, trials["safe"]):
        assert example.scored_expected == example.expected
