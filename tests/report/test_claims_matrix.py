"""Claims of several runs beside each other."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from jaxsafety.claims import evidence, judging
from jaxsafety.claims.contrasts import Measurement
from jaxsafety.claims.jain2024 import CLAIMS
from jaxsafety.claims.judging import Claim, Margin
from jaxsafety.report import claims_matrix
from tests.claim_rows import table, textbook
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


def test_a_record_says_what_every_run_finds_and_whether_it_is_as_claimed(runs):
    found = by_name(runs)
    assert list(found) == [claim.name for claim in CLAIMS]
    down, refuses = found["null_space_down"], found["rate_refuses"]
    assert (down["whole.verdict"], down["turned.verdict"]) == ("supported", "contradicted")
    assert down["whole.holm"] is True and down["agreement"] == "mixed" and down["expected"] == "> 0"
    assert down["few.mean"] is None and down["few.verdict"] == "undecided"
    assert refuses["agreement"] == "as claimed" and refuses["few.seeds"] == 2 and refuses["whole.seeds"] == 4
    assert refuses["whole.low"] < refuses["whole.mean"] < refuses["whole.high"]
    assert (found["sensitivity_unsafe"]["agreement"], found["sensitivity_unsafe"]["expected"]) == ("as claimed", "< 0")
    assert by_name([runs[2], runs[0]])["null_space_down"]["agreement"] == ""


def test_agreement_leaves_out_what_has_no_effect_and_knows_the_side():
    claim = Claim("one", "", where="", statistic="", measure=lambda _: None, expected="below", margin=Margin(5.0, ""))

    def agreed(*values):
        given = [dataclasses.replace(claim, measure=lambda _, own=own: Measurement(np.array(own))) for own in values]
        rows = evidence.gather(table("refused", "unsafe", [0.0] * 4))
        (row,) = claims_matrix.records({str(i): judging.judge(rows, [one]) for i, one in enumerate(given)})
        return row["agreement"]

    below, above, near = [-9.0, -9.1, -8.9, -9.0], [9.0, 9.1, 8.9, 9.0], [0.1, -0.1, 0.2, 0.1]
    assert agreed(below, below) == agreed(below, near, below) == "as claimed"
    assert agreed(above, above) == "against it" and agreed(above, below) == "mixed" and agreed(below, near) == ""


def test_the_table_counts_agreement_however_many_runs_and_long_names_there_are(runs, tmp_path):
    more = [write(tmp_path / f"a_run_with_a_long_name_{number}", textbook()) for number in range(3)]
    text = claims_matrix.text([*runs, *more])
    assert text.isascii() and max(map(len, text.splitlines())) <= 80
    assert "contradicted*" in text and ".._a_long_name_2" in text
    told = " ".join(text.split())
    assert told.endswith(
        "Of 28 claims with a number in several runs 27 lie as claimed in all of them, 0 against it, 1 are mixed; a run "
        "that finds no effect is left out."
    )
    markdown = claims_matrix.text(runs, form="markdown").splitlines()
    assert markdown[0] == "|  | claim | expected | whole | turned | few | agreement |"
    assert len(markdown) == 2 + len(CLAIMS) + 2
    assert "supported\\* +" in markdown[9] and "| - | mixed |" in markdown[9]
    rows = list(csv.DictReader(io.StringIO(claims_matrix.text(runs, form="csv"))))
    assert len(rows) == len(CLAIMS) and (rows[0]["whole.verdict"], rows[0]["whole.holm"]) == ("supported", "True")


def test_runs_of_one_name_are_told_apart_and_one_twice_is_refused(runs, tmp_path):
    other = write(tmp_path / "whole", textbook())
    assert f"{other}.mean" in next(iter(by_name([runs[0], other]).values()))
    with pytest.raises(ValueError, match=r"^claims of several runs: got .*whole twice, expected each once$"):
        claims_matrix.text([runs[0], runs[0] / ".." / "whole"])
