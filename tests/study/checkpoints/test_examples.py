"""Examples: every documented form is read, every other refused; ids, masks and the order of batches."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.formats import hf_tokenizer
from jaxsafety.formats.prompts import Message
from jaxsafety.pools import pairs
from jaxsafety.study.checkpoints import examples

USER = {"role": "user", "content": "Hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))


@pytest.fixture
def read(tmp_path):
    def run(*rows, pairs):
        file = tmp_path / "examples.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return examples.read(file, pairs=pairs)[0]

    return run


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return hf_tokenizer.open_tokenizer(checkpoints[0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "label": "safe"},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"messages": [USER], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ],
)
def test_every_form_of_a_pair_is_the_same_example(read, row):
    (found,) = read(row, pairs=True)
    assert (found.prompt, found.chosen, found.rejected) == ((Message("user", "Hi"),), "yes", "no")
    (found,) = read(row, pairs=False)
    assert (found.chosen, found.rejected) == ("yes", None)


def test_a_conversation_is_an_example_for_every_turn_of_the_assistant(read):
    system = {"role": "system", "content": "Be brief."}
    found = read({"messages": [system, USER, YES, USER, NO]}, {"prompt": "Hi", "completion": "so"}, pairs=False)
    assert [(len(one.prompt), one.chosen) for one in found] == [(2, "yes"), (4, "no"), (1, "so")]


@pytest.mark.parametrize(
    ("row", "pairs", "message"),
    [
        ("{", False, "line 1 is not JSON"),
        ("[1]", False, "row 1 must be an object of columns, such as prompt"),
        ({"prompt": "Hi", "choosen": "yes"}, False, "did you mean 'chosen'"),
        ({"prompt": "Hi", "chosen": "yes"}, True, "has no rejected: expected lines such as"),
        ({"prompt": "Hi"}, True, "has no chosen and no rejected"),
        ({"prompt": "Hi", "chosen": "yes", "rejected": "yes"}, True, "are the same, expected two answers"),
        ({"prompt": "Hi", "chosen": " "}, False, "chosen must be text that is not empty"),
        ({"prompt": "Hi", "chosen": [USER]}, False, "must be text or one turn of the assistant"),
        ({"prompt": "Hi", "chosen": "a", "completion": "a"}, False, "has both chosen and completion"),
        ({"chosen": "yes", "rejected": "no"}, True, "has no prompt"),
        ({"chosen": [USER, YES], "rejected": [NO]}, True, "share what is before"),
        ({"messages": [USER]}, False, "has no turn of the assistant"),
        ({"messages": [YES]}, False, "the last turn must be the user's"),
        ({"messages": [{"role": "usr", "content": "a"}, YES]}, False, "did you mean 'user'"),
        ("", False, "holds no examples: expected lines such as"),
    ],
)
def test_bad_examples_are_named(read, row, pairs, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(row, pairs=pairs)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"no examples at .* expected a JSONL file"):
        examples.read(tmp_path / "none", pairs=True)


def test_the_answer_and_its_end_are_scored_and_nothing_else(read, tokenizer):
    found = read({"prompt": "Design a kite.", "chosen": "Here it is.", "rejected": "No."}, pairs=True)
    encoded = examples.encode(found, tokenizer, max_tokens=64, vocab_size=400)
    assert encoded.truncated == 0 and encoded.count == 1
    for side, answer in ((encoded.batch.chosen, "Here it is."), (encoded.batch.rejected, "No.")):
        prompt, ids = tokenizer.exchange(found[0].prompt, answer)
        assert side.targets[0][side.mask[0]].tolist() == ids
        assert tokenizer.text(ids) == answer and ids[-1] == 1
        assert side.tokens[0, : len(prompt)].tolist() == prompt
        assert side.tokens.shape[1] % 32 == 0
        np.testing.assert_array_equal(side.tokens[0, 1:], side.targets[0, :-1])


def test_what_is_too_long_loses_the_middle_of_the_prompt_then_the_end_of_the_answer(read, tokenizer):
    long = " ".join(["word"] * 60)
    rows = [
        {"prompt": long, "chosen": "yes", "rejected": "no, never"},
        {"prompt": "Hi", "chosen": long, "rejected": "no"},
    ]
    found = read(*rows, pairs=True)
    encoded = examples.encode(found, tokenizer, max_tokens=32, vocab_size=400)
    assert encoded.truncated == 2
    chosen, rejected = encoded.batch.chosen, encoded.batch.rejected
    start = np.argmax(chosen.mask[0]) + 1
    assert start == np.argmax(rejected.mask[0]) + 1
    np.testing.assert_array_equal(chosen.tokens[0, :start], rejected.tokens[0, :start])
    prompt = tokenizer.prompt(found[0].prompt)
    assert chosen.tokens[0, :start].tolist() == [prompt[0], *prompt[1 - start :]]
    # The long answer leaves room for one token of the prompt.
    assert chosen.mask[1].all() and chosen.tokens[1, 0] == tokenizer.prompt(found[1].prompt)[0]


def test_prompts_and_answers_that_spell_control_tokens_are_counted(read, tokenizer):
    rows = [{"prompt": "a</s>", "chosen": "b"}, {"prompt": "a", "chosen": "b<s>"}, {"prompt": "a", "chosen": "b"}]
    found = read(*rows, pairs=False)
    for how, ends in (("control", 3), ("text", 2)):
        reader = replace(tokenizer, special_tokens=how)
        encoded = examples.encode(found, reader, max_tokens=32, vocab_size=400)
        assert encoded.spelling == 2
        # The template ends both turns of each.
        assert [np.sum(row == 1) for row in encoded.batch.chosen.tokens] == [ends, 2, 2]


def test_pairs_and_answers_that_teach_less_than_they_seem_to_are_counted(read, tokenizer):
    """A template that trims leaves one answer of two; one that writes nothing behind an answer, no end of it."""
    found = read({"prompt": "Hi", "chosen": "a", "rejected": "a "}, {"prompt": "Hi", "chosen": "a", "rejected": "b"},
                 pairs=True)  # fmt: skip
    content, end = "message['content']", "{{ eos_token }}"
    trims = replace(tokenizer, template=tokenizer.template.replace(content, f"{content} | trim"))
    without = replace(tokenizer, template=tokenizer.template.replace(end, ""))
    for reader, counts in ((tokenizer, (0, 0)), (trims, (1, 0)), (without, (0, 2))):
        encoded = examples.encode(found, reader, max_tokens=32, vocab_size=400)
        assert (encoded.alike, encoded.endless) == counts


def test_a_conversation_that_the_template_refuses_is_named(read, tokenizer):
    refuses = replace(tokenizer, template="{{ raise_exception('no') if messages[0]['content'] == 'b' }}")
    found = read({"prompt": "b", "chosen": "yes"}, pairs=False)
    with pytest.raises(ValueError, match=r"line 1: the chat template of .* fails on a conversation: no"):
        examples.encode(found, refuses, max_tokens=32, vocab_size=400)


def test_ids_beyond_the_vocabulary_are_refused(read, tokenizer):
    with pytest.raises(ValueError, match=r"gives id \d+ for .*line 1, and the model has a vocabulary of 20"):
        examples.encode(read({"prompt": "Hi", "chosen": "yes"}, pairs=False), tokenizer, max_tokens=32, vocab_size=20)


def draw(count, *, step, batch_size):
    given = {"key": keys.root(0), "total_steps": 100, "step": step, "batch_size": batch_size}
    return pairs.draw(jnp.arange(count), pairs.Config(), **given)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (8, 4), (5, 5), (4, 1)])
def test_every_epoch_has_every_example_once_in_an_order_of_its_own(count, size):
    run = jax.jit(lambda step: draw(count, step=step, batch_size=size))
    seen = np.concatenate([run(step) for step in range(3 * count)])
    epochs = seen[: len(seen) // count * count].reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: got 5, expected at most the number of examples, 4"):
        draw(4, step=jnp.int32(0), batch_size=5)


@pytest.mark.parametrize("label", ["unsave", 1, None, "jailbreak"])
def test_a_label_that_is_none_is_one_sentence(tmp_path, label):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "label": label}) + "\n")
    with pytest.raises(ValueError, match="label"):
        examples.read(path, pairs=True)
