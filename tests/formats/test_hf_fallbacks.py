"""What a tokenizer falls back on where a file or a field is not there, or two of them disagree: as transformers has it.

What is expected was recorded from transformers 5.24.0, and is compared with it again where it is installed.
"""

import pytest
from tokenizers import normalizers

from experiments import llama_world
from jaxsafety.formats import hf_generation, hf_tokenizer
from jaxsafety.formats.prompts import Message

CHAT = llama_world.TOKENS["chat_template"]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
USER, N1, N3 = (FLAGS | {"content": content} for content in ("<|user|>", "<n1>", "<n3>"))
ASKED = (Message("user", "a <n3> <n1> <|user|> b"),)
SPOKEN = "T{{ messages[0].content }}"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"


def case(expected, files=None, **fields):
    """What is expected, files beside tokenizer_config.json, and fields of that."""
    return fields, files or {}, expected


# The ids of what the user of ASKED says, with the end of its turn.
LETTERS = [69, 225, 32, 82, 23, 34, 225, 32, 82, 21, 34]
PLAIN = [*LETTERS, 225, 2, 306, 1]
TOKENS = {
    "nothing more": case(PLAIN),
    "the old file is the last word": case([*PLAIN[:-1], 2], {MAP: {"eos_token": "<|user|>"}}),
    "so it is of a null": case([*PLAIN[:-1], 2], {MAP: {"eos_token": USER}}, eos_token=None),
    "but not beside tokens by id": case(
        PLAIN, {MAP: {"eos_token": "<|user|>"}}, added_tokens_decoder={"2": USER | {"special": True}}
    ),
    "a token of a role is added": case(
        [69, 225, 32, 82, 23, 34, 225, 400, 225, 2, 306, 400], eos_token="<n1>"
    ),
    "tokens by id get the next ids": case(
        [69, 225, 400, 225, 401, 225, 2, 306, 1], added_tokens_decoder={"9": N1, "8": N3}
    ),
    "and are matched as told": case(
        [*LETTERS, 2, 70, 1], added_tokens_decoder={"2": USER | {"lstrip": True, "rstrip": True}}
    ),
    "a file of added tokens": case([69, 225, 401, 225, 400, 225, 2, 306, 1], {ADDED: {"<n3>": 403, "<n1>": 401}}),
    "further special tokens": case(
        [69, 225, 400, 225, 401, 225, 2, 306, 1], additional_special_tokens=["<n3>", N1 | {"__type": "AddedToken"}]
    ),
    "special tokens that are split": case(
        [*LETTERS, 225, 32, 96, 319, 268, 96, 34, 306, 32, 19, 87, 34],
        split_special_tokens=True, chat_template="[]{{ messages[0].content }}</s>]",
    ),
    "no tokens at the ends by flags": case(PLAIN, add_bos_token=False, add_eos_token=True),
}  # fmt: skip
# The text of a conversation of "a" and "b".
TEMPLATES = {
    "a list": case("Ta", chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": SPOKEN}]),
    "an object": case("Ta", chat_template={"default": SPOKEN, "rag": "no"}),
    "empty": case("", chat_template=""),
    "a file": case("Ta", {FILE: SPOKEN}, chat_template="no"),
    "a file of processors": case("Ta", {"chat_template.json": {"chat_template": "no"}}, chat_template=SPOKEN),
    "a file beside a folder": case("Ta", {FILE: SPOKEN, f"{FOLDER}/rag.jinja": "no"}, chat_template="no"),
    "a folder": case("Ta", {f"{FOLDER}/default.jinja": SPOKEN}, chat_template="no"),
    "a folder's default": case("Ta", {FILE: "no", f"{FOLDER}/default.jinja": SPOKEN}, chat_template="no"),
    "tools that are none": case(
        "True True True", chat_template="{{ tools is defined }} {{ tools is none }} {{ documents is none }}"
    ),
    "roles": case(
        "<s><|user|>False", chat_template="{{ sep_token }}{{ image_token }}{{ pad_token is defined }}",
        sep_token="<s>", image_token="<|user|>",
    ),
    "objects as JSON": case(
        '{"a":[1],"b":"é<"}',
        chat_template="{{ {'b': 'é<', 'a': [1]} | tojson(sort_keys=true, separators=(',', ':')) }}",
    ),
    "lines": case("  x\n y ", chat_template="  {% if true %}\n  x\n  {% endif %}\n y \n"),
}  # fmt: skip


def conversation(*contents):
    return [Message(role, content) for role, content in zip(("user", "assistant"), contents, strict=False)]


@pytest.mark.parametrize("name", TOKENS)
def test_special_tokens(tell, name):
    fields, files, expected = TOKENS[name]
    opened = hf_tokenizer.open_tokenizer(tell(**{"chat_template": CHAT} | fields, files=files))
    # Between what the template begins with and <|assistant|>.
    assert opened.prompt(ASKED)[2:-1] == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(tell, name):
    fields, files, expected = TEMPLATES[name]
    opened = hf_tokenizer.open_tokenizer(tell(**fields, files=files))
    assert opened._rendered(conversation("a", "b"), answering=False) == expected


@pytest.mark.parametrize("name", [*TOKENS, *TEMPLATES])
def test_it_is_so_in_transformers(tell, name):
    transformers = pytest.importorskip("transformers")
    fields, files, expected = (TOKENS | TEMPLATES)[name]
    directory = tell(**{"chat_template": CHAT} | fields, files=files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), hf_tokenizer.open_tokenizer(directory)
    turns = conversation("a", "b") if name in TEMPLATES else ASKED
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    if name in TEMPLATES:
        assert theirs.apply_chat_template(plain, tokenize=False) == expected
    else:
        assert theirs.apply_chat_template(plain, add_generation_prompt=True)["input_ids"] == ours.prompt(turns)
        raw = hf_tokenizer.open_tokenizer(directory, raw=True)
        assert theirs(turns[0].content)["input_ids"] == raw.prompt(turns)
    assert theirs.special_tokens_map == ours.special and theirs.eos_token_id == ours.eos


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({"chat_template": [{"name": "rag", "template": SPOKEN}]}, {}),
        ({"chat_template": SPOKEN}, {"additional_chat_templates/rag.jinja": SPOKEN}),
    ],
)
def test_templates_without_a_default_are_refused(tell, fields, files):
    directory = tell(**fields, files=files)
    with pytest.raises(ValueError, match="has chat templates named rag: expected one named default, or raw text"):
        hf_tokenizer.open_tokenizer(directory)
    assert hf_tokenizer.open_tokenizer(directory, raw=True).template is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token": ["x"]}, ": eos_token is a list, expected the text of a token"),
        ({"chat_template": 3}, "chat_template is a int, expected text"),
        ({"added_tokens_decoder": {"9": {"content": 3}}}, "tells of added tokens that are none: "),
        ({"added_tokens_decoder": {"nine": USER}}, "tells of added tokens that are none: "),
        ({"additional_special_tokens": [3]}, "tells of added tokens that are none: "),
        ({"split_special_tokens": "yes"}, "split_special_tokens is 'yes', expected true or false"),
    ],
)
def test_what_is_told_and_not_valid_is_named(tell, fields, message):
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.open_tokenizer(tell(**fields))


def test_what_gives_other_ids_than_transformers_is_told(tell, encoder):
    def told(**fields):
        return " ".join(hf_tokenizer.differences(hf_tokenizer.open_tokenizer(tell(**fields))))

    assert "asks for the date, which it is not told: " in told(chat_template="{{ strftime_now('%d') }}")
    assert not told(tokenizer_class="LlamaTokenizerFast", chat_template=CHAT)
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("_")])
    try:
        for name in ("LlamaTokenizerFast", "LlamaTokenizer"):
            assert "puts a space behind special tokens, and is followed; transf" in told(tokenizer_class=name)
        assert not told(tokenizer_class="PreTrainedTokenizerFast") and not told()
        assert not told(tokenizer_class="LlamaTokenizer", files={"config.json": {"model_type": "mistral"}})
    finally:
        encoder.normalizer = normalizers.Sequence([])


# generation_config.json (None for no such file), config.json, and what ends an answer.
ENDS = {
    "neither": (None, {}, ()),
    "the configuration's": (None, {"eos_token_id": 7}, (7,)),
    "a list of it": (None, {"eos_token_id": [7, 9, 7]}, (7, 9)),
    "that of generation comes first": ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
    "whatever it leaves out": ({"bos_token_id": 1}, {"eos_token_id": 7}, ()),
    "a null": ({"eos_token_id": None}, {"eos_token_id": 7}, ()),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer(tell, name):
    generation, config, expected = ENDS[name]
    files = {"config.json": config} | ({} if generation is None else {"generation_config.json": generation})
    found = hf_generation.read_generation(tell(files=files))
    assert found.stop == expected and not found.unfollowed
    assert found.file.name == ("config.json" if generation is None else "generation_config.json")


def test_what_changes_greedy_answers_in_transformers_is_told(tell):
    told = {"repetition_penalty": 1.1, "suppress_tokens": [3], "min_new_tokens": 2, "stop_strings": ["x"]}
    neutral = {"repetition_penalty": 1.0, "suppress_tokens": [], "min_length": 0, "forced_eos_token_id": None}
    free = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 5}
    assert hf_generation.read_generation(tell(files={"generation_config.json": told | free})).unfollowed == told
    assert not hf_generation.read_generation(tell(files={"generation_config.json": neutral | free})).unfollowed
    with pytest.raises(ValueError, match="eos_token_id is '5', expected the id of a token or a list of them"):
        hf_generation.read_generation(tell(files={"generation_config.json": {"eos_token_id": "5"}}))
