"""Tokenizers and chat templates: ids as transformers has them, one BOS, answers cut where they begin."""

import pytest
from tokenizers import Tokenizer

from experiments import llama_world
from jaxsafety.formats import hf_tokenizer
from jaxsafety.formats.prompts import Message

CHAT = llama_world.TOKENS["chat_template"]
ASKED = (Message("user", "Design a bicycle."),)


@pytest.fixture
def directory(tell):
    return tell(chat_template=CHAT)


def test_a_template_writes_the_only_bos(directory):
    """The tokenizer would add a second one in front of what the template has written."""
    opened = hf_tokenizer.open_tokenizer(directory)
    ids = opened.prompt(ASKED)
    assert ids.count(0) == 1
    text = opened.encoder.decode(ids, skip_special_tokens=False)
    assert text == "<s><|user|>Design a bicycle.</s><|assistant|>"


def test_raw_text_gets_the_tokenizers_own_bos(directory):
    opened = hf_tokenizer.open_tokenizer(directory, raw=True)
    ids = opened.prompt(ASKED)
    assert ids[0] == 0 and ids.count(0) == 1
    assert opened.text(ids) == "Design a bicycle."


@pytest.mark.parametrize("raw", [False, True])
def test_an_answer_continues_its_prompt(directory, raw):
    opened = hf_tokenizer.open_tokenizer(directory, raw=raw)
    asked, answer = opened.exchange(ASKED, " Two wheels.")
    assert asked == opened.prompt(ASKED)
    assert opened.text(answer) == " Two wheels."
    assert answer[-1] == 1 and answer.count(1) == 1
    assert opened.eos == 1


def test_an_answer_that_merges_with_its_prompt_is_encoded_alone(directory):
    opened = hf_tokenizer.open_tokenizer(directory, raw=True)
    whole = "Design a bicycle."
    for cut in range(1, len(whole)):
        asked, answer = opened.exchange((Message("user", whole[:cut]),), whole[cut:])
        assert asked == opened.prompt((Message("user", whole[:cut]),))
        assert opened.text(asked + answer) == whole


def test_the_template_of_its_own_file_comes_first(directory):
    (directory / "chat_template.jinja").write_text(
        "{{ messages[0].content | tojson }}{% generation %}!{% endgeneration %}"
    )
    opened = hf_tokenizer.open_tokenizer(directory)
    assert opened.text(opened.prompt((Message("user", 'é "<'),))) == '"é \\"<"!'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% for %}", "is not one"),
        ("{{ messages[7].content.strip() }}", "fails on a conversation"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails on a conversation"),
        ("{{ strftime_now('%d') }}", "strftime_now"),
    ],
)
def test_a_template_that_fails_is_named(tell, template, message):
    opened = hf_tokenizer.open_tokenizer(tell(chat_template=template))
    with pytest.raises(ValueError, match=f"chat template of .*{message}"):
        opened.prompt(ASKED)


def test_a_template_that_rewrites_the_prompt_is_refused(tell):
    directory = tell(chat_template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="writes a prompt otherwise once it is answered"):
        hf_tokenizer.open_tokenizer(directory).exchange(ASKED, "Yes.")


def test_padding_and_truncation_of_the_file_are_not_those_of_a_prompt(directory, encoder):
    ids = hf_tokenizer.open_tokenizer(directory).exchange(ASKED, "Gladly.")
    stored = Tokenizer.from_str(encoder.to_str())
    stored.enable_padding(length=60)
    stored.save(str(directory / "tokenizer.json"))
    assert hf_tokenizer.open_tokenizer(directory).exchange(ASKED, "Gladly.") == ids
    stored.no_padding()
    stored.enable_truncation(6)
    stored.save(str(directory / "tokenizer.json"))
    assert hf_tokenizer.open_tokenizer(directory).exchange(ASKED, "Gladly.") == ids


def test_several_turns_need_a_template(directory):
    opened = hf_tokenizer.open_tokenizer(directory, raw=True)
    with pytest.raises(ValueError, match="a conversation of 2 turns needs a chat template"):
        opened.prompt((Message("system", "Be brief."), *ASKED))


def test_bad_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: expected a tokenizer.json$"):
        hf_tokenizer.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="AutoTokenizer"):
        hf_tokenizer.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        hf_tokenizer.open_tokenizer(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("nonsense", "is not JSON"), ("[]", "is not a JSON object")])
def test_bad_files(directory, text, message):
    (directory / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.open_tokenizer(directory)


def test_ids_equal_those_of_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = hf_tokenizer.open_tokenizer(directory)
    turns = [Message("system", "Be brief."), *ASKED, Message("assistant", "Why?"), Message("user", " I  like\nit. ")]
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    got = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=True)
    assert ours.prompt(turns) == list(got["input_ids"] if isinstance(got, dict) or hasattr(got, "keys") else got)
    assert hf_tokenizer.open_tokenizer(directory, raw=True).prompt(ASKED) == theirs("Design a bicycle.")["input_ids"]
