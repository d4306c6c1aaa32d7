import json
import math

import pytest

from jaxsafety.claims import evidence, judging
from jaxsafety.claims.jain2024 import CLAIMS
from jaxsafety.report import claims_table
from jaxsafety.rundir import results
from tests.claim_rows import series, textbook

RUN = {"run": "r0", "revision": "abc1234", "device": "cpu"}


def changed(row):
    """The textbook, but for: an opposite sign, an analysis missing, a dead lane, and what stays within the noise."""
    if row["analysis"] == "output_space" and row["part"] == "down":
        return row | {"value": -row["value"]}
    if row["method"] == "unlearn" and row["lr_name"] == "eta_S" and row["seed"] == 1:
        return row | {"value": math.nan}
    if row["analysis"] == "alignment":
        return row | {"value": 0.5 + (row["value"] if row["seed"] % 2 else -row["value"])}
    return row


@pytest.fixture(scope="module")
def rows():
    return [changed(row) for row in textbook() if row["analysis"] != "soft_tokens"]


def write(directory, rows):
    names = ("method", "lr_name", "lr", "seed", "step", "condition", "metric", "value")
    table = [
        RUN | {"stage": "evaluate"} | {name: row[name] for name in names}
        for row in rows
        if row["analysis"] == "evaluate"
    ]
    early = [row | {"stage": "tune", "value": 0.0} for row in table]
    analyses = [RUN | row for row in rows if row["analysis"] != "evaluate"]
    folder = directory / "results"
    if table:
        results.write_results(folder / "evaluate.parquet", results.rows_to_frame(table + early))
    schema = results.ANALYSIS_SCHEMA
    results.write_results(folder / "analyze.parquet", results.rows_to_frame(analyses, schema=schema), schema=schema)
    return directory


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture(scope="module")
def found(run):
    return claims_table.read(run)


def test_a_run_is_judged_as_its_rows_are(rows, found):
    nulls = [row | {"value": None} if math.isnan(row["value"]) else row for row in rows]
    assert found == judging.judge(evidence.gather(nulls), CLAIMS)
    assert {judgement.verdict for judgement in found.judgements} == {"supported", "contradicted", "undecided"}


ATTACKED = """
subject: {world: tiny}
claims: [peng2024, updates]
models:
  pretrained: {method: pretrain}
  sft: {from: pretrained, method: sft, lr: {eta_M: 1.0e-3}, role: defence}
  attacked: {from: sft, method: sft, lr: 1.0e-4, role: attack}
  more: {from: sft, method: sft, lr: 1.0e-4}
"""


def test_attacks_enter_the_statements_about_them_alone(tmp_path):
    rows = []
    for method, before, after in (("sft", 0.0, 0.1), ("attacked", 0.2, 0.9), ("more", 0.0, 0.0)):
        own = {"method": method, "condition": "unsafe"}
        for alpha, rate in ((0.0, before), (1.0, after)):
            rows += series("interventions", "complied", [rate] * 3, part="attack_path", strength=alpha, **own)
        rows += series("evaluate", "complied", [after] * 3, **own | {"condition": "jb_misgen"})
    (write(tmp_path, rows) / "config.yaml").write_text(ATTACKED)
    found = {one.claim.name: one for one in claims_table.read(tmp_path).judgements}
    assert found["attack_leaves_basin"].interval.mean == pytest.approx(0.7)
    assert found["misgen_defined"].interval.mean == pytest.approx(0.1)


def test_a_run_without_analyses_is_one_sentence(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match=r"^no analyses in .*: run `jaxsafety analyze` on it first$"):
        claims_table.text(tmp_path)


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "analyze.parquet").write_bytes((run / "results" / "analyze.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"analyze\.parquet is damaged: remove it and run its stage again"):
        claims_table.text(tmp_path)


def test_a_run_without_an_accuracy_table_is_judged_by_its_analyses(rows, tmp_path):
    some = claims_table.read(write(tmp_path, [row for row in rows if row["analysis"] != "evaluate"]))
    by_name = {judgement.claim.name: judgement for judgement in some.judgements}
    assert by_name["rate_refuses"].why == "no accuracy table in this run"
    assert by_name["clusters_separate"].verdict == "supported"


def test_text_is_ascii_within_80_columns_and_reads_one_row_a_claim(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = claims_table.text(run)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    blocks = [[" ".join(line.split()) for line in block.splitlines()] for block in text.split("\n\n")]
    assert [block[0].split()[0] for block in blocks[1 : len(CLAIMS)]] == [
        str(number) for number in range(2, len(CLAIMS) + 1)
    ]
    assert blocks[7][0].startswith("8 contradicted* The update of the second -0.1")
    assert blocks[7][1].startswith("MLP matrix writes into adjusted [-0.1")
    assert "mean of 4 seeds below 0, p " in " ".join(blocks[7])
    assert blocks[17][0] == "18 undecided The stronger a - (> 0)"
    assert blocks[17][1].endswith("no soft_tokens in this run")


def test_supported_and_contradicted_rows_have_one_form(found):
    lines = claims_table.render_markdown(found).splitlines()
    up, down = (
        next(line for line in lines if f"of the {which} MLP matrix writes" in line) for which in ("first", "second")
    )
    form = [cell.strip().replace("-", "+") for cell in up.split("|")]
    other = [cell.strip().replace("-", "+") for cell in down.split("|")]
    assert (form[8], other[8]) == ("supported\\*", "contradicted\\*")
    assert form[9].startswith("mean of 4 seeds above 0, p ") and other[9].startswith("mean of 4 seeds below 0, p ")
    assert len(form) == len(other)


def test_the_text_ends_with_counts_levels_and_how_each_was_measured(found):
    text = claims_table.render_text(found)
    assert f"{len(CLAIMS)} claims: 25 supported, 1 contradicted, 0 no effect, 2 undecided." in text
    assert "Seeds, in this order: 0, 1, 2, 3; a dash is one without a finite value." in text
    told, tests = " ".join(text.split()), 2 * (len(CLAIMS) - 1) - 1  # no soft tokens, and one claim without a margin
    assert f"{tests} tests, of whose decisions at most 5 % are wrong" in told
    level = 100 * (1 - 0.05 * 26 / (len(CLAIMS) - 1))
    assert f"at 95 %; of what is decided, adjusted for having been selected, {level:.4g} %." in told
    assert "with a chance of 90 %" in told
    assert "0.2 (a fifth of a standard deviation: a small effect in Cohen's words) of 10" in told
    tail = " ".join(text[text.index("The number of a seed") :].split())
    assert all(f"{number} {claim.statistic}" in tail for number, claim in enumerate(CLAIMS, start=1))


def test_no_claims_are_no_rows(tmp_path, rows, monkeypatch):
    run = write(tmp_path, rows)
    monkeypatch.setattr(claims_table, "read", lambda _: judging.Family((), 0, None))
    assert claims_table.text(run, form="json") == "[]\n"
    assert claims_table.text(run, form="csv").strip() == ""


def test_records_are_numbers_and_text(found):
    records = claims_table.records(found.judgements)
    assert [record["name"] for record in records] == [claim.name for claim in CLAIMS]
    rates = next(record for record in records if record["name"] == "clusters_rate")
    assert (rates["number"], rates["verdict"], rates["expected"], rates["where"]) == (
        3, "supported", "> 0", "Sec. 4.1, Fig. 3"
    )  # fmt: skip
    assert rates["values"][1] is None
    assert rates["seeds"].split(", ")[1] == "1: -"
    assert rates["why"].startswith("mean of 3 seeds above 0, p ")
    assert rates["why"].endswith("; 1 of 4 seeds left out: no finite value")
    assert (rates["margin"], rates["needed"], rates["p_flip"]) == (0.05, None, None)
    assert 0 < rates["p"] < 0.05 < rates["p_equivalence"] and rates["adjusted"].startswith("[+")
    assert rates["low"] < rates["mean"] < rates["high"]
    assert rates["estimate"] == f"{rates['mean']:+.3f} [{rates['low']:+.3f}, {rates['high']:+.3f}]"
    missing = next(record for record in records if record["name"] == "stronger_attacks")
    assert (missing["estimate"], missing["seeds"], missing["mean"], missing["values"]) == ("-", "", None, {})
    cost = next(record for record in records if record["name"] == "extrapolation_cost")
    assert cost["expected"] == "> -0.05"


def test_markdown_has_one_row_a_claim_and_escapes_pipes(found):
    lines = claims_table.render_markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "|  | claim | where | expected | mean [interval] | adjusted | seeds | verdict | why |"
    assert len(table) == 2 + len(CLAIMS)
    assert {line.replace("\\|", "").count("|") for line in table} == {10}
    assert lines[-1] == f"{len(CLAIMS)}. {CLAIMS[-1].statistic}"


def test_one_seed_shows_its_values_and_withholds_intervals(rows, tmp_path):
    text = claims_table.text(write(tmp_path, [row for row in rows if row["seed"] == 2]))
    assert f"{len(CLAIMS)} claims: 0 supported, 0 contradicted, 0 no effect, {len(CLAIMS)} undecided." in text
    assert "1 seed: no interval" in text
    assert "[+" not in text and "Benjamini" not in text and "chance of 90" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "+0.000"), (-0.0004, "-4e-04"), (0.0005, "+0.001"), (1.23456, "+1.235"), (-120.0, "-120.000")],
)
def test_numbers_keep_small_values_apart_from_zero(tmp_path, value, shown):
    rows = series("output_space", "excess", [[value]], part="up")
    records = claims_table.records(claims_table.read(write(tmp_path, rows)).judgements)
    assert next(record for record in records if record["name"] == "null_space_up")["estimate"] == shown


def test_of_many_seeds_the_range_is_shown_and_every_value_kept(tmp_path):
    values = [0.5 + 0.01 * seed for seed in range(13)]
    write(tmp_path, series("output_space", "excess", values, part="up"))
    shown = claims_table.text(tmp_path, form="markdown")
    assert "| 13 from +0.500 to +0.620 |" in shown and "0: +0.5" not in shown
    assert "Seeds: 13, of which the range is shown; every value is in `--format json`." in shown
    assert "13 from +0.500 to +0.620" in " ".join(claims_table.text(tmp_path).split())
    (told,) = [row for row in json.loads(claims_table.text(tmp_path, form="json")) if row["name"] == "null_space_up"]
    assert list(told["values"].values()) == pytest.approx(values) and "spread" not in told
    assert "12: +0.62" in claims_table.text(tmp_path, form="csv")
