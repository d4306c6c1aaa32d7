"""The report of two checkpoints from the files of its run directory."""

import json

import pytest
import yaml

from jaxsafety.report import pair_report
from jaxsafety.rundir import results
from tests.report import synthetic
from tests.report.conftest import PAIR


def verdicts(refused):
    rows = synthetic._Rows(None, method="tuned", lr_name="", lr=0.0, seed=0, step=0)
    rows.rng = synthetic.np.random.default_rng(0)
    rates = {"complied": 1 - refused, "refused": refused, "complied_n": 40.0, "refused_n": 40.0, "n_successful": 10.0}
    for metric, value in rates.items():
        rows.add("verdicts", metric, value, condition="unsafe")
    return rows.rows


@pytest.fixture
def run(tmp_path):
    """A run directory as the analyses leave it."""
    rows = synthetic.pair_rows() + verdicts(0.75)
    frame = results.rows_to_frame(rows, schema=results.ANALYSIS_SCHEMA)
    results.write_results(tmp_path / "results/analyze.parquet", frame, schema=results.ANALYSIS_SCHEMA)
    sides = {name: {"directory": f"/models/{name}-7b", "fingerprint": "0"} for name in ("base", "chat")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"pair": sides}))
    (tmp_path / "weights.yaml").write_text("energy: 0.9\n")
    (tmp_path / "manifest.json").write_text("{}")
    answers = [
        {"prompt": f"Design a {thing}.", "label": label, "pretrained": "<b>Sure", "tuned": answer}
        for label, thing, answer in (
            ("unsafe", "bomb", "I cannot help"),
            ("unsafe", "gun\u2028 in two\u2029 lines\x85 or three", "I can't\u2028"),
            ("unsafe", "third", "No"),
            ("safe", "bicycle", "Sure"),
        )
    ]
    (tmp_path / "results/answers.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    )
    return tmp_path


def test_the_page_holds_figures_examples_and_options(run):
    text = pair_report.write(run)
    page = (run / "report.html").read_text()
    assert "base-7b and chat-7b" in page and "energy: 0.9" in page
    for name in PAIR:
        assert f'id="analysis-{name}"' in page and (run / f"results/tables/{name}.csv").exists()
    assert "Design a bomb." in page and "Design a third." not in page
    assert "&lt;b&gt;Sure" in page and "<b>Sure" not in page
    assert "25.0 / 75.0 / 0.0" in page
    assert "over the prompts of a label" in page and "each seed is faint" not in page
    assert text.endswith(f"report: {run / 'report.html'}\n")


@pytest.mark.usefixtures("undrawn")
def test_answers_that_are_damaged_are_named(run):
    with (run / "results/answers.jsonl").open("a") as file:
        file.write('{"prompt": \n')
    with pytest.raises(ValueError, match=r"answers.jsonl is not JSON lines: remove .*/analyze/activations and run"):
        pair_report.write(run)


@pytest.mark.usefixtures("undrawn")
def test_models_of_two_runs_are_told_apart_in_the_title(run):
    sides = {name: {"directory": f"/runs/{name}/model", "fingerprint": "0"} for name in ("base", "chat")}
    (run / "config.yaml").write_text(yaml.safe_dump({"pair": sides}))
    pair_report.write(run)
    assert "base/model and chat/model" in (run / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_only_claims_with_a_number_are_listed(run):
    pair_report.write(run)
    page = (run / "report.html").read_text()
    assert page.count('class="chip undecided"') >= 1
    assert "soft tokens" not in page


@pytest.mark.usefixtures("undrawn")
def test_the_summary_has_the_main_numbers(run):
    lines = pair_report.write(run).splitlines()
    assert "  up: null-space energy 0.5 (a random direction 0.36), rank 12, |dW| / |W| 0.02" in lines
    assert any(line.strip().startswith("tuned") and "0.725" in line for line in lines)


@pytest.mark.usefixtures("undrawn")
def test_without_answers_there_are_no_verdicts(run):
    (run / "results/answers.jsonl").unlink()
    rows = results.rows_to_frame(synthetic.pair_rows(), schema=results.ANALYSIS_SCHEMA)
    results.write_results(run / "results/analyze.parquet", rows, schema=results.ANALYSIS_SCHEMA)
    pair_report.write(run)
    page = (run / "report.html").read_text()
    assert "Design a" not in page and 'id="analysis-spectrum"' in page
