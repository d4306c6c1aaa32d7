"""The set of our own making, and files of a user's: what they must hold, and what is said of those that do not."""

import base64
import json
from collections import Counter

import pytest

from jaxsafety.formats import prompts
from jaxsafety.formats.prompts import Message, Prompt

LINE = '{"prompt": "Design a kite.", "label": "safe"}'


@pytest.fixture(scope="module")
def own():
    return prompts.own()


def of(own, label):
    return [prompt.messages[0].content for prompt in own if prompt.label == label]


def test_the_own_set_is_large_balanced_and_without_repeats(own):
    counts = Counter(prompt.label for prompt in own)
    assert set(counts) == {"safe", "unsafe", "jailbreak:base64", "jailbreak:role_play"}
    assert set(counts.values()) == {240}
    assert len({prompt.messages for prompt in own}) == len(own)


def test_safe_and_unsafe_instructions_differ_in_their_object_alone(own):
    safe, unsafe = of(own, "safe"), of(own, "unsafe")
    verbs = [{text.rpartition(" a ")[0] for text in pair} for pair in zip(safe, unsafe, strict=True)]
    assert all(len(verb) == 1 for verb in verbs)
    objects = [{text.rpartition(" a ")[2] for text in texts} for texts in (safe, unsafe)]
    assert len(objects[0]) == len(objects[1]) == 16 and not objects[0] & objects[1]
    # As long, and as many: a model cannot tell them by their length.
    words = [sum(len(text.split()) for text in texts) for texts in (safe, unsafe)]
    assert abs(words[0] - words[1]) <= 0.05 * words[0]


def test_a_jailbreak_holds_the_unsafe_prompt_of_its_place(own):
    for plain, encoded, played in zip(
        of(own, "unsafe"), of(own, "jailbreak:base64"), of(own, "jailbreak:role_play"), strict=True
    ):
        assert base64.b64decode(encoded.rpartition(" ")[2]).decode() == plain
        assert plain not in encoded and f'"{plain}"' in played


def test_what_is_written_is_read(own, tmp_path):
    talk = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hm"), Message("user", "Do ü"))
    aimed = Prompt((Message("user", "Knit?"),), "unsafe", "Sure, loop it.")
    written = [*own, Prompt(talk, "jailbreak:many-turns"), aimed, Prompt(talk, "unsafe", "Sure")]
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompts.to_jsonl(written), encoding="utf-8")
    assert prompts.read(path)[0] == written
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == {
        "prompt": "Design a bicycle.",
        "label": "safe",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON: "),
        ("[1]", r"line 2 must be an object of columns, such as prompt, got \[1\]"),
        ('{"prompt": "a" "label": "safe"}', "line 2 is not JSON: Expecting ',' delimiter at character 16"),
        ('{"prompt": "a", "label": "safe", "prompt": "b"}', "line 2 is not JSON: an object has prompt twice"),
        (f'{{"prompt": {"1" * 5000}}}', "line 2 is not JSON: Exceeds the limit"),
        ('{"prompt": "a"}', "line 2 has no label: expected safe, unsafe or jailbreak:KIND"),
        ('{"prompt": "a", "label": "unsave"}', "unknown label in .*line 2 'unsave'.*did you mean 'unsafe'"),
        ('{"prompt": "a", "label": "jailbreak"}', "unknown label in .*line 2 'jailbreak'.*jailbreak:KIND"),
        ('{"prompt": "a", "label": 1}', "unknown label in .*line 2 '1'"),
        ('{"promt": "a", "label": "safe"}', "unknown column in .*line 2 'promt'.*did you mean 'prompt'"),
        ('{"label": "safe"}', "line 2 must have either prompt or messages, got neither"),
        ('{"prompt": "a", "messages": [], "label": "safe"}', "line 2 must have either prompt or messages, got both"),
        ('{"prompt": " ", "label": "safe"}', 'line 2: prompt must be text that is not empty, got " "'),
        ('{"prompt": 3, "label": "safe"}', "line 2: prompt must be text that is not empty, got 3"),
        ('{"messages": [], "label": "safe"}', r"line 2: messages must be a list of at least one turn, got \[\]"),
        ('{"messages": ["a"], "label": "safe"}', 'line 2: messages: a turn must have role and content, got "a"'),
        ('{"messages": [{"role": "usr", "content": "a"}], "label": "safe"}', "unknown role in .*did you mean 'user'"),
        ('{"messages": [{"role": "system", "content": "a"}], "label": "safe"}', "the last turn must be the user's"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        prompts.read(path)


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"goal": "Knit?", "target": "Sure, loop it."}, "Sure, loop it."),
        ({"goal": "Knit?", "target": ""}, None),
        ({"prompt": "Knit?", "label": "unsafe", "target": "Sure", "id": 1}, "Sure"),
        ({"prompt": "Knit?", "label": "unsafe", "target": None}, None),
        ({"instruction": "Knit?", "output": "Loop it."}, None),
    ],
)
def test_what_an_attacker_wants_is_a_prompts_target(tmp_path, row, target):
    """Of sets that hold it; what others answer is none."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,), _ = prompts.read(path)
    assert found.target == target and found.messages == (Message("user", "Knit?"),)


def test_half_a_character_is_named_and_a_byte_order_mark_is_not_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "label": "safe"}\n')
    assert [prompt.messages[0].content for prompt in prompts.read(path)[0]] == ["a"]
    path.write_text('{"prompt": "a \\ud800", "label": "safe"}\n')
    with pytest.raises(ValueError, match=r"line 1: prompt holds half of a surrogate pair at character 2"):
        prompts.read(path)
    path.write_text('{"prompt": "a", "label": "\\ud800"}\n')
    with pytest.raises(ValueError, match="line 1"):
        prompts.read(path)


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no prompts at .*: expected a JSONL file"):
        prompts.read(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts: expected lines such as"):
        prompts.read(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.jsonl is not text in UTF-8"):
        prompts.read(tmp_path / "binary.jsonl")
