"""Claims of several runs beside each other."""

import csv
import io
import json

import pytest

from jaxsafety.claims.jain2024 import CLAIMS
from jaxsafety.report import claims_matrix
from tests.claim_rows import textbook
from tests.report.test_claims_table import write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the paper says; the same with a second matrix that it does not; and the accuracy table of two seeds."""
    rows = textbook()
    turned = [
        row | {"value": -row["value"]} if row["analysis"] == "output_space" and row["part"] == "down" else row
        for row in rows
    ]
    few = [row for row in rows if row["seed"] < 2 and row["analysis"] in ("evaluate", "verdicts")]
    found = []
    for name, own in (("whole", rows), ("turned", turned), ("few", few)):
        found.append(tmp_path_factory.mktemp("runs") / name)
        write(found[-1], own)
    return found


def by_name(runs):
    return {row["name"]: row for row in json.loads(claims_matrix.text(runs, form="json"))}


def test_a_record_says_what_every_run_finds_and_on_which_side(runs):
    found = by_name(runs)
    assert list(found) == [claim.name for claim in CLAIMS]
    down, refuses = found["null_space_down"], found["rate_refuses"]
    assert (down["whole.verdict"], down["turned.verdict"]) == ("supported*", "contradicted*")
    assert down["side"] == "mixed" and down["few.mean"] is None and down["few.verdict"] == "undecided"
    assert refuses["side"] == "above" and refuses["few.seeds"] == 2 and refuses["whole.seeds"] == 4
    assert refuses["whole.low"] < refuses["whole.mean"] < refuses["whole.high"]
    assert found["sensitivity_unsafe"]["side"] == "below"
    alone = by_name([runs[2], runs[0]])["null_space_down"]
    assert alone["side"] == ""


def test_the_table_counts_agreement(runs):
    text = claims_matrix.text(runs)
    assert text.isascii() and max(map(len, text.splitlines())) <= 80
    told = " ".join(text.split())
    assert "28 claims have a number in several runs: 27 lie on one side in all of them, 27 of which" in told
    assert told.endswith("two runs or more decide, and 1 on different sides.")
    markdown = claims_matrix.text(runs, form="markdown").splitlines()
    assert markdown[0] == "|  | claim | whole | turned | few | side |" and len(markdown) == 2 + len(CLAIMS) + 2
    assert "supported\\* +" in markdown[9] and "| - | mixed |" in markdown[9]
    rows = list(csv.DictReader(io.StringIO(claims_matrix.text(runs, form="csv"))))
    assert len(rows) == len(CLAIMS) and rows[0]["whole.verdict"] == "supported*"


def test_runs_of_one_name_are_told_apart_and_one_twice_is_refused(runs, tmp_path):
    other = write(tmp_path / "whole", textbook())
    assert f"{other}.mean" in next(iter(by_name([runs[0], other]).values()))
    with pytest.raises(ValueError, match=r"^claims of several runs: got .*whole twice, expected each once$"):
        claims_matrix.text([runs[0], runs[0]])
