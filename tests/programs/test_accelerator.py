"""The accelerator's script at small sizes: rows of every part, a table, and what is left of a part that is cut off."""

import json
import subprocess

import pytest

from benchmarks import accelerator, accelerator_parts

# The parts that start processes of their own, or take XLA's profile of a CPU, have tests elsewhere.
QUICKLY = ("sampler",)
SLOWLY = ("step", "linalg", "llama", "determinism")


def rows_of(directory):
    return [json.loads(line) for line in (directory / "accelerator.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("part", [*QUICKLY, *(pytest.param(part, marks=pytest.mark.slow) for part in SLOWLY)])
def test_a_part_writes_its_rows(part, tmp_path, capsys):
    assert accelerator.main(["--part", part, "--small", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert rows and {row["part"] for row in rows} == {part}
    for row in rows:
        assert row["what"] and (row.get("ms", 1) > 0) and row.get("rate", 1) > 0
    errors = [row["error"] for row in rows if "error" in row]
    assert all(error <= (0 if part == "determinism" else 1e-2) for error in errors)
    assert capsys.readouterr().err.count(f"{part}: ") == len(rows)


def test_every_part_has_a_cap_and_together_they_keep_to_nine_minutes():
    assert accelerator.CAPS.keys() == accelerator_parts.PARTS.keys()
    assert sum(accelerator.CAPS.values()) <= 9 * 60


def test_what_is_cut_off_keeps_its_figures_and_costs_no_other(tmp_path, monkeypatch, capsys):
    def run(words, *, timeout, **_):
        part = words[words.index("--part") + 1]
        with (tmp_path / "accelerator.jsonl").open("a") as file:
            file.write(json.dumps({"part": part, "what": "a row", "rate": 2.0, "unit": "x/s"}) + "\n")
            if part == "step":
                file.write('{"part": "step", "wh\n')
                raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, 1 if part == "linalg" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert accelerator.main(["--only", "step", "linalg", "sampler", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "accelerator.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert page.count("a row") == 3 and "cut off after 150 s" in page and "ended with exit code 1" in page
    assert [line for line in page.splitlines() if line.startswith("###")] == ["### step", "### linalg", "### sampler"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(["--only", "stp"])
    assert "invalid choice: 'stp'" in capsys.readouterr().err
