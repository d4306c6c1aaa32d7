"""Prompts as batches: what is cut from long ones, the halves that are compared, and that no prompt is lost."""

from pathlib import Path

import numpy as np
import pytest

from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.formats.prompts import Message, Prompt
from jaxsafety.study.checkpoints import batches


def prompt(text, label):
    return Prompt((Message("user", text),), label)


class Letters(Tokenizer):
    """As many tokens as letters, their places in the alphabet; or always the same ones."""

    def prompt(self, messages):
        if self.encoder == "refuses":
            raise ValueError("no such turns")
        return [ord(letter) - ord("a") for letter in messages[0].content] if self.encoder is None else self.encoder

    def spells(self, texts):
        return any("z" in text for text in texts)


def tokenizer(ids=None):
    return Letters(Path("somewhere"), ids, {}, None)


def given(*labels, text="abc"):
    return [prompt(text, label) for label in labels]


EIGHT = given(*["safe"] * 4, *["unsafe"] * 4)


def encode(prompts, tokenizer=None, *, max_tokens=8, vocab_size=26):
    return batches.encode(prompts, tokenizer or globals()["tokenizer"](), max_tokens=max_tokens, vocab_size=vocab_size)


def test_the_first_token_and_the_end_of_a_long_prompt_are_kept():
    encoded = encode([*EIGHT, prompt("abcdefgh", "safe"), prompt("abcdefghi", "unsafe")])
    assert encoded.ids[8] == (0, 1, 2, 3, 4, 5, 6, 7)
    assert encoded.ids[9] == (0, 2, 3, 4, 5, 6, 7, 8)
    assert (encoded.truncated, encoded.spelling) == (1, 0)
    assert encode([*EIGHT, prompt("zz", "safe"), prompt("az", "unsafe")]).spelling == 2


def test_labels_come_in_one_order_and_halves_in_turn():
    labels = ("unsafe", "jailbreak:b", "safe", "jailbreak:a")
    encoded = encode(given(*labels * 4))
    assert encoded.labels == ("safe", "unsafe", "jailbreak:b", "jailbreak:a")
    for label in labels:
        assert encoded.folds[encoded.of(label)].tolist() == [0, 1, 0, 1]


def test_a_jailbreak_is_in_the_half_of_the_prompt_that_it_wraps():
    encoded = encode(given(*["safe"] * 5, *["unsafe"] * 5, *["jailbreak:a"] * 5))
    np.testing.assert_array_equal(encoded.folds[encoded.of("unsafe")], encoded.folds[encoded.of("jailbreak:a")])


@pytest.mark.parametrize(
    ("prompts", "reader", "message"),
    [
        (EIGHT[1:], None, "got 3 safe prompts, expected at least 4"),
        (EIGHT[:-1], None, "got 3 unsafe prompts, expected at least 4"),
        (EIGHT, tokenizer("refuses"), "prompt 1: no such turns"),
        (EIGHT, tokenizer([]), "prompt 1 has no tokens"),
        (EIGHT, tokenizer([3, 26]), "the tokenizer of somewhere gives id 26 for prompt 1, and the models have a "
         "vocabulary of 26"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused(prompts, reader, message):
    with pytest.raises(ValueError, match=message):
        encode(prompts, reader)


@pytest.mark.parametrize("answered", [False, True])
def test_every_prompt_is_in_one_batch_of_its_length(answered):
    drawn = np.random.default_rng(0)
    prompts = [drawn.integers(1, 9, drawn.integers(1, 200)).tolist() for _ in range(40)]
    answers = [drawn.integers(1, 9, drawn.integers(0, 40)).tolist() for _ in prompts] if answered else None
    found = batches.bucketed(prompts, answers=answers, batch_tokens=320)
    assert sorted(np.concatenate([batch.rows for batch in found]).tolist()) == list(range(40))
    lengths = [batch.tokens.shape[1] for batch in found]
    assert lengths == sorted(lengths) and all(length % 32 == 0 for length in lengths)
    for batch in found:
        assert batch.tokens.size <= 320 or len(batch.rows) == 1
        for place, row in enumerate(batch.rows):
            whole = prompts[row] + (answers[row] if answered else [])
            assert batch.tokens[place][batch.mask[place]].tolist() == whole
            assert batch.mask[place].sum() == len(whole) > batch.tokens.shape[1] - 32
            assert batch.prompt_lengths[place] == len(prompts[row])
