"""Judges: the rule, a function and a file of verdicts decide the same way; how far two agree is in the results."""

import json
import sys

import numpy as np
import polars as pl
import pytest

from jaxsafety.formats import hf_tokenizer
from jaxsafety.formats.prompts import Message, Prompt
from jaxsafety.recipe.schema import EvaluateConfig, Recipe
from jaxsafety.study.checkpoints import analyze, evaluate, inputs, judges
from jaxsafety.study.checkpoints.judges import Answer
from jaxsafety.study.pipeline import Study

SAID = ("Take two wheels and a frame.", "I cannot help.", "", "Take two wheels and a frame.")
JUDGE = """
ASKED = []
def judge(prompt, answer):
    ASKED.append((prompt, answer))
    return "refused" if "cannot" in answer or not answer else "complied"
def wrong(prompt, answer):
    return "yes"
NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, by its name."""
    (tmp_path / "mine_judging.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_judging"
    sys.modules.pop("mine_judging", None)
    judges._says.cache_clear()


@pytest.fixture
def answers():
    prompts = [Prompt((Message("user", f"Ask {i}?"),), "safe" if i % 2 else "unsafe") for i in range(4)]
    return [Answer(judges.answer_id("m", 0, i, text), prompts[i], text, False) for i, text in enumerate(SAID)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_kinds_of_judges(answers, mine, tmp_path):
    assert judges.decided("rule", answers) == ["complied", "refused", "other", "complied"]
    own = f"{mine}:judge"
    for _ in range(2):
        assert judges.decided(own, answers) == ["complied", "refused", "refused", "complied"]
    # Asked once for every prompt and answer.
    asked = [(f"Ask {i}?", text) for i, text in enumerate(SAID)]
    assert asked == sys.modules[mine].ASKED
    file = lines(tmp_path / "v.jsonl", [{"id": one.id, "verdict": "other", "more": 1} for one in answers[::-1]])
    assert judges.decided(file, answers) == ["other"] * 4


def test_a_judge_that_lacks_verdicts_does_not_decide(answers, tmp_path):
    file = lines(tmp_path / "v.jsonl", [{"id": one.id, "verdict": "refused"} for one in answers[:1]])
    with pytest.raises(ValueError, match=f"has no verdict on 3 of 4 answers, the first {answers[1].id}: expected one"):
        judges.decided(file, answers)
    assert judges.verdicts(file, answers) == ["refused", None, None, None]
    # Of another answer in the same place.
    assert judges.answer_id("m", 0, 0, "Other.") != answers[0].id


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("rul", "judges: no file of verdicts at rul: expected rule, a function .* did you mean 'rule'"),
        ("mine_judging:juge", "module 'mine_judging' has no function 'juge'"),
        ("mine_judging:NUMBER", "module 'mine_judging' has no function 'NUMBER'"),
        ("mine_judgin:judge", "there is no module 'mine_judgin' on the path of Python"),
        ([{"id": "a"}], "line 1 has no verdict: expected lines such as"),
        ([{"id": 1, "verdict": "other"}], "line 1 has no id"),
        ([{"id": "a", "verdict": "refuse"}], "unknown verdict in .*line 1 'refuse'.*did you mean 'refused'"),
        ([{"id": "a", "verdict": "other"}, {"id": "a", "verdict": "refused"}], "line 2 has another verdict on a"),
    ],
)
def test_what_is_no_judge_is_one_sentence(mine, tmp_path, judge, message):
    judge = judge if isinstance(judge, str) else lines(tmp_path / "v.jsonl", judge)
    with pytest.raises(ValueError, match=message):
        judges.check((judge,))


def test_a_function_says_one_of_three_things(answers, mine):
    with pytest.raises(ValueError, match=r"unknown verdict of mine_judging:wrong on m/0/0-\w{8} 'yes'"):
        judges.decided(f"{mine}:wrong", answers)
    with pytest.raises(ValueError, match="judges: got rule twice"):
        judges.check(("rule", "rule"))


@pytest.fixture
def study(checkpoints, few, tmp_path, monkeypatch):
    """A study of two models, whose answers are given."""
    reader = hf_tokenizer.open_tokenizer(checkpoints[0])
    said = {name: [reader.encoder.encode(text).ids for text in (SAID if name == "t" else SAID[::-1]) * 6]
            for name in ("pretrained", "t")}  # fmt: skip
    monkeypatch.setattr(evaluate, "ids", lambda study, lane, *_, **__: said[lane.name])

    def make(*named, answers=64):
        subject = {"checkpoint": str(checkpoints[0]), "prompts": str(few), "max_tokens": 128, "judges": named or None}
        models = {"t": {"from": "pretrained", "checkpoint": str(checkpoints[1])}}
        evaluate_ = EvaluateConfig(answers=answers)
        return Study(
            Recipe(name="r", subject=subject, models=models, evaluate=evaluate_), None, "map", tmp_path / "run"
        )

    (tmp_path / "run" / "results" / "answers" / "t").mkdir(parents=True)
    (tmp_path / "run" / "results" / "answers" / "pretrained").mkdir()
    return make


def test_verdicts_of_a_study_have_intervals_and_agreement(study, mine, tmp_path):
    own = study("rule", f"{mine}:judge")
    inputs.check(own)
    evaluate.write(own)
    told = pl.read_parquet(own.directory / "results" / "evaluate.parquet").filter(method="t")
    rates = {(one["condition"], one["metric"]): one["value"] for one in told.iter_rows(named=True)}
    written = (own.directory / "results" / "answers" / "t" / "seed_0.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["verdict"] for row in rows] == ["complied", "refused", "other", "complied"] * 6
    assert {row.get("reason") for row in rows} == {None, "empty"}
    assert [row["id"] for row in rows] == [judges.answer_id("t", 0, i, SAID[i % 4]) for i in range(24)]
    for label in ("safe", "unsafe"):
        of_label = np.array([row["verdict"] for row in rows if row["label"] == label])
        for verdict in ("refused", "complied", "other"):
            assert rates[label, verdict] == (of_label == verdict).mean()
            assert rates[label, f"{verdict}_low"] < rates[label, verdict] < rates[label, f"{verdict}_high"]
    # Three in four say the same; by chance 2 * 2 + 1 * 2 of 16 would.
    assert rates["", f"agreement:{mine}:judge"] == 0.75 and rates["", f"judged:{mine}:judge"] == 24
    assert rates["", f"kappa:{mine}:judge"] == pytest.approx((0.75 - 6 / 16) / (1 - 6 / 16))


def test_answers_are_there_for_a_judge_whose_verdicts_are_not(study, tmp_path):
    file = tmp_path / "verdicts.jsonl"
    lines(file, [{"id": "x", "verdict": "other"}])
    with pytest.raises(ValueError, match="has no verdict on 24 of 24 answers, the first pretrained/0/0-"):
        evaluate.write(study(str(file)))
    answered = tmp_path / "run" / "results" / "answers" / "pretrained" / "seed_0.jsonl"
    rows = [json.loads(line) for line in answered.read_text().splitlines()]
    assert len(rows) == 24 and not any("verdict" in row for row in rows)
    # A further judge may know some of the answers, but none would be another file.
    with pytest.raises(ValueError, match="has no verdict on any answer: expected ids such as pretrained/0/0-"):
        evaluate.write(study("rule", str(file)))
    lines(file, [{"id": row["id"], "verdict": "refused"} for row in rows[:2]])
    evaluate.write(study("rule", str(file)))
    told = pl.read_parquet(tmp_path / "run" / "results" / "evaluate.parquet").filter(metric=f"judged:{file}")
    assert told.select("method", "value").rows() == [("pretrained", 2.0)]


def test_judges_need_answers(study):
    with pytest.raises(ValueError, match=r"judges: got rule, and there are no answers: expected evaluate.answers"):
        inputs.check(study("rule", answers=0))


def test_pieces_of_other_verdicts_are_measured_again(tmp_path):
    folder = tmp_path / "activations"
    for verdicts, there in ((["other"], False), (["other"], True), (["refused"], False)):
        analyze._keep_measured_by(verdicts, folder)
        assert (folder / "000.parquet").exists() == there
        (folder / "000.parquet").touch()
