"""The tokenizers of GGUF files: byte-level BPE, SentencePiece, special tokens, templates."""

import itertools

import pytest

from jaxsafety.formats import gguf_file, gguf_tokenizer, hf_tokenizer, prompts
from jaxsafety.formats.prompts import Message
from tests.formats import gguf_files

pytest.importorskip("gguf")

TEXTS = [
    "Design a bicycle.",
    "  two  spaces ",
    "don't\n\n",
    "naïve 日本 \U0001f431",
    "",
    "x</s> y",
    "<|user|>\nhi",
    "12 345",
]


@pytest.fixture
def opened(tmp_path):
    """Opens the tokenizer of some metadata, written to a file and converted."""

    def open_(tokenizer, **named):
        file = gguf_files.write(tmp_path / "model.gguf", {}, {}, tokenizer=tokenizer, **named)
        (tmp_path / "out").mkdir(exist_ok=True)
        for name, text in gguf_tokenizer.files(gguf_file.open_gguf(file), max_tokens=64).items():
            (tmp_path / "out" / name).write_text(text)
        return hf_tokenizer.open_tokenizer(tmp_path / "out")

    return open_


def ids(tokenizer, text):
    return tokenizer.encoder.encode(text).ids


def test_byte_pairs_are_those_of_the_tokenizer_they_were_taken_from(opened, encoder):
    roles = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True}
    found = opened(gguf_files.byte_level(encoder) | roles)
    assert [ids(found, text) for text in TEXTS] == [encoder.encode(text).ids for text in TEXTS]
    assert (found.special, found.eos) == ({"bos_token": "<s>", "eos_token": "</s>"}, 1)
    said = [prompt.messages[-1].content for prompt in prompts.own()[:50]]
    assert [found.text(ids(found, text)) for text in said] == said


def test_ends_of_texts_are_added_as_the_file_says(opened, encoder):
    roles = {"bos_token_id": 0, "eos_token_id": 1}
    own = gguf_files.byte_level(encoder) | roles
    plain = ids(opened(own), "hi")
    assert ids(opened(own | {"add_bos_token": True, "add_eos_token": True}), "hi") == [0, *plain, 1]
    assert ids(opened(own | {"add_eos_token": True}), "hi") == [*plain, 1]
    assert ids(opened(own | {"pre": "llama-bpe"}), "hi") == [0, *plain]  # as those models are, where nothing is said


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", " ", " 1234", "!?", "\n\n", " A", "'", "Sé"]),
        ("default", ["it", "'s", " ", " 1234", "!?", "\n\n", " A", "'", "Sé"]),
        ("smollm", ["it", "'s", "  ", "1", "2", "3", "4", "!?", "\n\n", " A", "'", "Sé"]),
        ("llama-bpe", ["it", "'s", " ", " ", "123", "4", "!?\n\n", " A", "'S", "é"]),
        ("qwen2", ["it", "'s", " ", " ", "1", "2", "3", "4", "!?\n\n", " A", "'S", "é"]),
        ("tekken", ["it", "'s", " ", " ", "1", "2", "3", "4", "!?\n\n", " A", "'Sé"]),
    ],
)
def test_text_is_split_as_the_name_says(opened, encoder, pre, pieces):
    found = opened(gguf_files.byte_level(encoder, pre))
    text = "it's  1234!?\n\n A'Sé"
    split = [text[slice(*place)] for _, place in found.encoder.pre_tokenizer.pre_tokenize_str(text)]
    assert split == pieces


def test_a_whole_token_is_not_merged_where_the_name_says_so(opened):
    """Nothing merges to ``abc``, which is a token."""
    own = {"model": "gpt2", "tokens": ["a", "b", "c", "ab", "abc"], "token_type": [1] * 5, "merges": ["a b"]}
    assert ids(opened(own | {"pre": "llama-bpe"}), "abc") == [4]
    assert ids(opened(own | {"pre": "smaug-bpe"}), "abc") == [3, 2]


def test_tokens_of_ones_own_are_matched_whole_and_are_part_of_the_text(opened):
    tokens, kinds = ["a", "b", "Ġ", "  ", "<think>", "<end>", "｜end▁"], [1, 1, 1, 4, 4, 3, 3]
    found = opened({"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": []})
    assert ids(found, "a  b<think>a b<end>｜end▁") == [0, 3, 1, 4, 0, 2, 1, 5, 6]
    assert found.text([0, 3, 1, 4, 5, 6]) == "a  b<think>"
    assert found.ends == {5, 6}


PIECES = {
    "<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3), "<0x0A>": (0.0, 6), "<0xC3>": (0.0, 6), "<0xA9>": (0.0, 6),
    "▁h": (-1.0, 1), "el": (-2.0, 1), "lo": (-3.0, 1), "▁hel": (-4.0, 1), "llo": (-4.5, 1), "▁▁": (-5.0, 1),
    "hel": (-5.5, 1), "▁hello": (-6.0, 1), "▁": (-10.0, 1), "h": (-11.0, 1), "e": (-12.0, 1), "l": (-13.0, 1),
    "o": (-14.0, 1),
}  # fmt: skip
SENTENCEPIECE = {
    "model": "llama",
    "tokens": list(PIECES),
    "scores": [score for score, _ in PIECES.values()],
    "token_type": [kind for _, kind in PIECES.values()],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}


def sentencepiece(text):
    """The tokenizer by its definition: of all neighbours the two that make the best token, the leftmost, until none."""
    parts = list(text.replace(" ", "▁"))
    while True:
        scores = [PIECES.get(a + b, (-99.0, 0))[0] for a, b in itertools.pairwise(parts)]
        if max(scores, default=-99.0) == -99.0:
            break
        place = scores.index(max(scores))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    tokens = list(PIECES)
    bytes_ = {part: [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts if part not in PIECES}
    return [tokens.index(token) if token in PIECES else 0 for part in parts for token in bytes_.get(part, [part])]


@pytest.mark.parametrize("text", ["hello", "hello hello", "  hello", "helo lol", "é\n", "h e", "llo"])
def test_sentencepiece_merges_by_its_scores(opened, text):
    found = opened(SENTENCEPIECE)
    assert ids(found, text) == [1, *sentencepiece(f" {text}")]  # it begins by itself
    assert found.text(ids(found, text)) == text
    bare = opened(SENTENCEPIECE | {"add_space_prefix": False, "add_bos_token": False})
    assert ids(bare, text) == sentencepiece(text)
    assert bare.text(ids(bare, text)) == text


def test_sentencepiece_puts_a_space_behind_special_tokens(opened):
    assert ids(opened(SENTENCEPIECE), "hello</s>hello") == [1, *sentencepiece(" hello"), 2, *sentencepiece(" hello")]


def test_text_that_would_be_changed_first_is_refused(opened):
    with pytest.raises(ValueError, match="remove_extra_whitespaces is set, expected text that is taken as it is"):
        opened(SENTENCEPIECE | {"remove_extra_whitespaces": True})


def test_a_file_without_a_tokenizer_has_no_files_of_one(tmp_path):
    for tokenizer in (None, {"model": "no_vocab"}):
        own = gguf_file.open_gguf(gguf_files.write(tmp_path / "m.gguf", {}, {}, tokenizer=tokenizer))
        assert gguf_tokenizer.files(own, max_tokens=64) == {}


@pytest.mark.parametrize("further", [{}, {"tokenizer.chat_template.tool_use": "{{ 1 }}"}])
def test_the_template_comes_along(opened, encoder, further):
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    roles = {"bos_token_id": 0, "eos_token_id": 1}
    found = opened(gguf_files.byte_level(encoder) | roles, template=template, **further)
    assert found.template == template
    whole = encoder.encode("<s><|user|>hi</s>", add_special_tokens=False).ids
    assert found.prompt((Message("user", "hi"),)) == whole
