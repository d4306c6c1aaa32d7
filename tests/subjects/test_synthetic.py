"""The synthetic world as a subject: what it opens to, and how it tells of prompts and answers in words."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.subjects import synthetic
from jaxsafety.types import Opened
from jaxsafety.world.layout import last_prompt_index

BATCH = 8


@pytest.fixture(scope="module")
def trials(mini_subject):
    draw = jax.jit(lambda key: mini_subject.trials("unsafe", key=key, step=0, batch_size=BATCH))
    return draw(keys.stream(keys.root(0), "evaluate"))


def test_its_prompts_are_the_worlds(trials, tiny_world):
    plain = jax.jit(lambda key: world.batch_at(tiny_world, "unsafe", key=key, step=0, batch_size=BATCH))
    jax.tree.map(np.testing.assert_array_equal, trials, plain(keys.stream(keys.root(0), "evaluate")))


def test_it_refuses_two_conditions_first_and_has_them_all():
    assert synthetic.SUBJECT.conditions == tuple(world.CONDITIONS)
    assert synthetic.SUBJECT.conditions[:2] == ("safe", "unsafe") and synthetic.SUBJECT.speaks


def test_no_prompt_or_answer_is_longer_than_it_says(mini_subject, trials, tiny_world):
    told = mini_subject.text
    assert told.longest == last_prompt_index(tiny_world.spec.max_text) + 1 and told.stop == tiny_world.special["stop"]
    assert int(trials.last.max()) < told.longest
    # A block of the answer ends with its stop.
    assert int(trials.blocks.sum(-1).max()) <= told.answer


def test_what_analyses_run_is_the_model_with_its_layers_in_a_loop(mini_subject):
    model, analysed = (one.apply.keywords["config"] for one in (mini_subject.model, mini_subject.analysed))
    assert analysed == replace(model, unroll=1)


def test_the_verdict_of_an_example_is_that_of_the_answer(mini_subject, trials, tiny_world):
    """An answer that is the true output complied, the refusal refused, and one wrong judged token is other."""
    host = jax.device_get(trials)
    answers, expected = [], []
    for side, verdict in ((host.complied, "complied"), (host.refused, "refused")):
        wrong = np.array(side.tokens)
        wrong[np.arange(BATCH), side.mask.argmax(1) + 1] = tiny_world.special["bos"]
        answers += [side.tokens, wrong]
        expected += [verdict, "other"]
    rows = mini_subject.text.tell(trials, np.stack(answers))
    assert len(rows) == BATCH
    for row, example in zip(rows, world.text.examples(tiny_world, trials), strict=True):
        assert (row["prompt"], row["expected"], row["refusal"]) == (example.prompt, example.expected, example.refusal)
        assert [verdict for _, verdict in row["answers"]] == expected
        assert [row["answers"][i][0] for i in (0, 2)] == [example.expected, example.refusal]


@pytest.mark.usefixtures("unchecked")
def test_a_world_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="unknown world 'tinny': expected one of paper, tiny; did you mean 'tiny'"):
        synthetic.Config(world="tinny")


def test_it_is_opened_from_its_own_fields_alone(mini_subject, tiny_world):
    opened = synthetic.opened(synthetic.Config(model=synthetic.ModelConfig(layers=1, heads=2, width=16)))
    assert isinstance(opened, Opened)
    params, own = (jax.eval_shape(one.init, keys.root(0)) for one in (opened, mini_subject))
    assert params == own and params["embed"].shape == (tiny_world.vocab_size, 16)
