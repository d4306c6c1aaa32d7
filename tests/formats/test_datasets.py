"""Rows of our own making in the shapes of sets that people have: what they are read as, and what is said of others."""

import json

import polars as pl
import pytest

from jaxsafety.formats import datasets, prompts
from jaxsafety.formats.prompts import Message, Prompt
from jaxsafety.formats.shapes import TABLE


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


PREFERENCE = {"prompt": "Knit?", "chosen": "Loop it.", "rejected": "No."}
IMPLICIT = {"chosen": turns("Knit?", "Loop it."), "rejected": turns("Knit?", "No.")}
TALK = "\n\nHuman: Knit?\n\nAssistant: Why?\n\nHuman: For socks.\n\nAssistant:"
LONG = {
    "chosen": turns("Knit?", "Why?", "For socks.", "Loop it."),
    "rejected": turns("Knit?", "Why?", "For socks.", "No."),
}
PKU = {
    "prompt": "Knit?", "response_0": "No.", "response_1": "Loop it.", "is_response_0_safe": False,
    "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip
JBB = {"Index": 0, "Goal": "Knit?", "Target": "Loop it.", "Behavior": "Knitting", "Category": "Wool"}
SINGLE = {"prompt": "Knit?", "chosen": "Loop it."}
SHAPES = [
    (PREFERENCE, "pair", "TRL preference rows", PREFERENCE, ""),
    ({"prompt": turns("Knit?"), "chosen": turns("", "Loop it.")[1:], "rejected": turns("", "No.")[1:]}, "pair",
     "TRL preference rows, conversational", None, ""),
    (IMPLICIT, "pair", "TRL preference rows, conversational, implicit prompt", None, ""),
    (IMPLICIT | {"prompt": "Knit?", "prompt_id": "9", "messages": IMPLICIT["chosen"], "score_chosen": 8.0}, "pair",
     "TRL preference rows, conversational, implicit prompt", IMPLICIT, "prompt, prompt_id, messages, score_chosen"),
    ({"chosen": "A scarf is warm.", "rejected": "A scarf is wide."}, "pair", "TRL preference rows, implicit prompt",
     {"prompt": "A scarf is", "chosen": " warm.", "rejected": " wide."}, ""),
    ({"chosen": "Q: knit?\nA: yes", "rejected": "Q: knit?\nA: yesterday", "prompt_id": 3}, "pair",
     "TRL preference rows, implicit prompt",
     {"prompt": "Q: knit?\nA:", "chosen": " yes", "rejected": " yesterday"}, "prompt_id"),
    ({"chosen": f"{TALK} Loop it.", "rejected": f"{TALK} No."}, "pair", "hh-rlhf transcripts", LONG, ""),
    ({"chosen": f"{TALK} Loop it.", "rejected": TALK}, "answer", "hh-rlhf transcripts, chosen alone",
     {"chosen": LONG["chosen"]}, "rejected"),
    (PREFERENCE | {"label": "unsafe", "source": "x"}, "answer", "TRL preference rows",
     PREFERENCE | {"label": "unsafe"}, "source"),
    ({"prompt": "Knit?", "completion": "Loop it."}, "answer", "TRL prompt-completion rows", None, ""),
    ({"prompt": "Knit?", "messages": turns("Knit?", "Loop it."), "prompt_id": 1}, "answer", "conversations",
     {"messages": turns("Knit?", "Loop it.")}, "prompt, prompt_id"),
    (PKU, "pair", "PKU-SafeRLHF rows", PREFERENCE | {"label": "unsafe"}, "better_response_id"),
    ({"prompt": "Knit?", "response": "Loop it.", "is_safe": True, "category": {"wool": True}}, "answer",
     "BeaverTails rows", SINGLE | {"label": "safe"}, "category"),
    ({"prompt": "Knit?", "response": "Loop it.", "is_safe": "False"}, "label", "BeaverTails rows",
     SINGLE | {"label": "unsafe"}, ""),
    ({"instruction": "Knit?", "input": "", "output": "Loop it.", "text": "x"}, "answer", "Alpaca rows",
     {"prompt": "Knit?", "chosen": "Loop it.", "label": "safe"}, "text"),
    ({"instruction": "Sum up.", "input": "Wool is warm.", "output": "Warm."}, "answer", "Alpaca rows",
     {"prompt": "Sum up.\n\nWool is warm.", "chosen": "Warm.", "label": "safe"}, ""),
    ({"goal": "Knit?", "target": "Loop it."}, "label", "AdvBench rows", SINGLE | {"label": "unsafe"}, ""),
    (JBB, "answer", "JailbreakBench rows", SINGLE, "Index, Category"),
    ({"Behavior": "Knit?", "FunctionalCategory": "contextual", "ContextString": "Wool."}, "label", "HarmBench rows",
     {"prompt": "Wool.\n\n---\n\nKnit?", "label": "unsafe"}, "FunctionalCategory"),
    ({"id": 1, "prompt": "Kill a row?", "type": "homonyms", "note": None}, "label", "XSTest rows",
     {"prompt": "Kill a row?", "label": "safe"}, "id, note"),
    ({"prompt": "Knit?", "type": "contrast_homonyms"}, "label", "XSTest rows",
     {"prompt": "Knit?", "label": "unsafe"}, ""),
    ({"prompt": "Knit?", "type": "contrast_homonyms", "label": "safe"}, "label", "labelled prompts",
     {"prompt": "Knit?", "label": "safe"}, "type"),
]  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def run(*rows, wanted="pair", name="data.jsonl", columns=()):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return datasets.read(path, wanted, columns=columns, what="examples", such="such rows")

    return run


@pytest.mark.parametrize(("row", "wanted", "name", "expected", "unused"), SHAPES)
def test_a_row_is_known_by_its_columns(read, row, wanted, name, expected, unused):
    (found,), reading = read(row, wanted=wanted)
    assert found.row == (row if expected is None else expected)
    assert dict(reading.kinds) == {name: 1} and ", ".join(reading.unused) == unused


def test_every_shape_of_the_table_has_a_row_here():
    told = {"preference rows", "prompts with an answer", "conversations with an answer", "labelled conversations"}
    assert {shape.name for shape in TABLE} - {name for _, _, name, _, _ in SHAPES} == told


def test_two_files_of_the_same_columns_are_told_by_their_names(read):
    for name, label in (("benign-behaviors.jsonl", "safe"), ("JBB-harmful.jsonl", "unsafe")):
        assert read(JBB, wanted="label", name=name)[0][0].row["label"] == label
    with pytest.raises(
        ValueError, match="harmful have the same columns: expected one of these words in the file's name"
    ):
        read(JBB, wanted="label")


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_tables_have_their_empty_cells_in_the_same_shapes(tmp_path, name):
    rows = [{"instruction": "Knit?", "input": None, "output": "Loop it."},
            {"instruction": "Sum up.", "input": "Wool.", "output": None}]  # fmt: skip
    frame, path = pl.DataFrame(rows, strict=False), tmp_path / name
    (frame.write_csv if name.endswith("csv") else frame.write_parquet)(path)
    found, reading = datasets.read(path, "answer", columns=(), what="examples", such="rows")
    assert [one.row for one in found] == [{"prompt": "Knit?", "chosen": "Loop it.", "label": "safe"}]
    assert reading.left_out == ((f"{path}, row 2", "chosen is empty"),)


def test_rows_that_nothing_can_be_learnt_from_are_left_out_and_counted(read):
    odd = [
        {"chosen": f"{TALK} Loop it.", "rejected": f"{TALK}"},
        {"chosen": f"{TALK} Loop it.", "rejected": f"\n\nHuman: Knit?{TALK} No."},
        {"chosen": f"{TALK} Loop it.", "rejected": "\n\nHuman: Purl?\n\nAssistant: No."},
        PREFERENCE | {"id": 1, "rejected": "Loop it."},
        PREFERENCE | {"id": 1, "rejected": " "},
        {"id": 1, "chosen": LONG["chosen"], "rejected": IMPLICIT["rejected"]},
    ]
    found, reading = read(*odd[:3], PREFERENCE, *odd[3:])
    assert [one.where.rpartition(" ")[2] for one in found] == ["4"]
    assert [(where.rpartition(" ")[2], why) for where, why in reading.left_out] == [
        ("1", "a turn of rejected is empty"),
        ("2", "rejected is no transcript in which Human and Assistant take turns"),
        ("3", "chosen and rejected differ before their last turn"),
        ("5", "chosen and rejected are the same"),
        ("6", "rejected is empty"),
        ("7", "chosen and rejected differ before their last turn"),
    ]
    assert "left out: 6 of 7 rows, the first" in list(reading.told("1 example"))[-1]
    # Where one answer is wanted nothing is asked of the other.
    assert len(read(*odd, wanted="answer")[0]) == 6
    with pytest.raises(ValueError, match=r"line 1: a turn of rejected is empty, and no row of .* is left"):
        read(*odd[:2])


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        ({"promt": "Knit?", "label": "safe"}, "label", "unknown column in .*line 1 'promt': did you mean 'prompt'"),
        ({"prompts": "A b", "chosen": "A b", "rejected": "A c"}, "pair", "'prompts': did you mean 'prompt'"),
        ({"prompt": "a", "choosen": "b", "rejectd": "c"}, "pair", "'choosen': did you mean 'chosen'"),
        ({"prompt": "a", "response": "b", "is_saf": True}, "answer", "'is_saf': did you mean 'is_safe'"),
        ({"prompt": "a", "type": "homonyms"}, "answer", "has no chosen, as XSTest rows have no answer: expected such"),
        ({"goal": "a", "target": "b"}, "pair", "has no rejected, as AdvBench rows have one answer: expected such"),
        ({"prompt": "a", "chosen": "b", "id": 1}, "label", "has no label, as prompts with an answer have none"),
        ({"goal": "a"}, "answer", "has no chosen: expected such rows; its columns are goal, and --columns prompt=NAME"),
        ({"chosen": "yes", "rejected": "no"}, "pair", "line 1 has no prompt: expected one, or answers that begin"),
        ({"prompt": "a", "type": "qa"}, "label", "line 1: type must be one of XSTest's, such as homonyms"),
        (PKU | {"safer_response_id": -1}, "pair", "safer_response_id must be 0 or 1, true or false, got -1"),
        (PKU | {"is_response_0_safe": "maybe"}, "pair", 'is_response_0_safe must be .* got "maybe"'),
        ({"chosen": f"{TALK} a", "rejected": ["b"]}, "pair", "line 1: rejected must be a transcript"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(read, row, wanted, message):
    with pytest.raises(ValueError, match=message):
        read(row, wanted=wanted)


def test_what_looks_like_a_needed_column_is_no_error_where_nothing_is_missing(read):
    row = PREFERENCE | {"prompt_id": 1, "promt": "x", "lable": "y", "score_chosen": 1}
    assert read(row)[1].unused == ("prompt_id", "promt", "lable", "score_chosen")


def test_columns_are_named(read):
    row = {"goal": "Knit?", "target": "Loop it.", "bad": "No.", "prompt": "x"}
    columns = ("prompt=goal", "chosen=target", "rejected=bad")
    assert read(row, columns=columns)[0][0].row == PREFERENCE
    # One that is another file's is passed over.
    assert read(PREFERENCE, columns=columns)[0][0].row == PREFERENCE
    for bad, message in {
        "prompt=gaol": r"line 1 has no column 'gaol', which columns: prompt=gaol names; did you mean 'goal'",
        "prompt": "columns: got 'prompt', expected our name and the file's, such as prompt=goal",
        "promt=goal": "unknown column of ours in columns 'promt'.*did you mean 'prompt'",
    }.items():
        with pytest.raises(ValueError, match=message):
            read({"goal": "a", "rejected": "c"}, columns=(bad,))


def test_a_prompt_of_several_answers_is_asked_once_and_is_unsafe_where_one_of_them_is(tmp_path):
    path = tmp_path / "data.json"
    rows = [{"prompt": name, "response": f"{i}", "is_safe": name != "b" or i != 1} for i in range(3) for name in "abc"]
    path.write_text(json.dumps(rows))
    found, reading = prompts.read(path)
    assert found == [Prompt((Message("user", name),), "unsafe" if name == "b" else "safe") for name in "abc"]
    assert next(reading.told("3 prompts")) == "data.json read as BeaverTails rows: 3 prompts"


def test_how_a_file_was_read_is_said_with_its_first_row(read):
    reading = read(PREFERENCE | {"id": 1, "chosen": "long " * 99}, IMPLICIT)[1]
    first, second = reading.told("2 examples")
    kinds = "TRL preference rows (1) and TRL preference rows, conversational, implicit prompt (1)"
    assert first == f"data.jsonl read as {kinds}: 2 examples; not used: id"
    assert list(read(IMPLICIT)[1].told("1"))[1] == '  the first: chosen "Knit? / Loop it.", rejected "Knit? / No."'
    assert second.startswith('  the first: prompt "Knit?", chosen "long long') and len(second) < 150
