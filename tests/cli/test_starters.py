"""What ``list KIND``, ``explain`` and ``new`` print and write."""

import importlib
import json
import re

import pytest

from jaxsafety import attacks, claims, edits, methods, pools
from jaxsafety.recipe import yaml_file
from jaxsafety.types import Attack, Edit, Method

TABLES = {"methods": methods.TABLE, "pools": pools.TABLE, "edits": edits.TABLE, "attacks": attacks.TABLE}
STARTERS = {"method": Method, "edit": Edit, "attack": Attack, "analysis": None}


@pytest.mark.parametrize("kind", TABLES)
def test_a_kind_is_listed_line_by_line(main, capsys, kind):
    assert main("list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TABLES[kind])
    assert len({re.match(r"\S+\s+", line).end() for line in lines}) == 1
    assert main("list", kind, "--format", "json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(TABLES[kind])


def test_claims_and_figures_are_listed_by_themselves(main, capsys):
    assert main("list", "claims", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["of"] == "jain2024" for row in found) == len(claims.load("jain2024"))
    assert main("list", "figures") == 0
    assert {"clusters", "causal"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_an_unknown_kind_is_a_sentence(main, capsys):
    assert main("list", "atacks") == 2
    assert "unknown kind 'atacks'" in (told := capsys.readouterr().err) and "did you mean 'attacks'?" in told


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("npo", ("`method: npo`", "log sigmoid", "arXiv 2404.05868", "Fidelity:", "beta (float, traced, default 0.1)")),
        ("refusal_direction", ("orthogonalised(", "arXiv 2406.11717", "strength (tuple[float, ...], swept")),
        ("lora", ("`parametrisation: {kind: lora}`", "rank (")),
        ("verdicts", ("`analysis: verdicts`", "It has no fields.")),
        ("null_space_up", ("claims: [jain2024]", "expected: > 0", "margin: 0.05")),
    ],
)
def test_one_thing_is_explained(main, capsys, name, parts):
    assert main("explain", name) == 0
    told = capsys.readouterr().out
    for part in parts:
        assert part in told


def test_everything_that_has_a_name_can_be_explained(main, capsys):
    for table in TABLES.values():
        for name in table:
            assert main("explain", name) == 0
            told = capsys.readouterr().out
            assert told.startswith(f"{name}: ") and "totals(" not in told


def test_what_has_no_such_name_is_a_sentence_with_the_nearest(main, capsys):
    assert main("explain", "n_po") == 2
    assert "nothing is called 'n_po'" in (told := capsys.readouterr().err) and "did you mean 'npo'?" in told
    assert len(told) < 200


@pytest.fixture
def starters(main, tmp_path, monkeypatch, capsys):
    """A folder with one of each kind, in which somebody works."""
    for kind in ("recipe", *STARTERS):
        assert main("new", kind, f"mine_{kind}", "--out", tmp_path) == 0
        assert str(tmp_path / f"mine_{kind}") in capsys.readouterr().out
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def joined(starters):
    """The recipe with what the other files hold in it."""
    file = starters / "mine_recipe.yaml"
    changed = file.read_text().replace("method: npo", "method: mine_method:METHOD")
    for kind, label in (("attack", "attacks"), ("edit", "edits")):
        changed = changed.replace(f"\n{label}:", f"\n{label}:\n  my_{kind}: {{{kind}: mine_{kind}:{kind.upper()}}}")
    changed = changed.replace("analyses: {", "analyses: {mine: {analysis: mine_analysis:ANALYSIS}, ")
    file.write_text(changed)
    return file


def test_a_starter_is_what_it_is_called(starters, joined):
    for kind in STARTERS:
        source = (starters / f"mine_{kind}.py").read_text()
        assert "{NAME}" not in source and f"mine_{kind}:{kind.upper()}" in source
    recipe = yaml_file.read(joined)
    assert recipe.lanes_of("npo")[0].training.load().Config().beta == 0.1
    assert {"my_attack", "prefill"} <= set(recipe.attacks) and {"my_edit"} <= set(recipe.edits)


@pytest.mark.slow
def test_a_study_of_starters_runs(main, joined, tmp_path, undrawn):
    source = joined.read_text().replace(", clusters: {}, output_space: {}", "").replace("eta_S: 2.0e-4", "")
    joined.write_text(re.sub(r"\n  (prefill|interpolated): .*", "", source))
    few = ("--seeds", "[0, 1]", "--models.*.steps", "2", "--models.*.batch_size", "4", "--models.*.chunk_steps", "2",
           "--evaluate.prompts", "8", "--evaluate.batch_size", "4", "--analyze.prompts", "4",
           "--analyze.attack_prompts", "4", "--analyze.edit_prompts", "4")  # fmt: skip
    assert main("run", joined, "--out", tmp_path / "run", *few) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Without neurons" in page and "Length of the residual stream" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("methods", "mine"), "unknown kind 'methods': expected one of recipe, method, edit, attack, analysis"),
        (("method", "a-b"), "NAME: got 'a-b', expected letters, digits and _ that Python can import"),
        (("method", "class"), "NAME: got 'class'"),
    ],
)
def test_bad_input_is_a_sentence(main, capsys, tmp_path, words, message):
    assert main("new", *words, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_what_is_there_is_never_written_over(main, capsys, tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    assert main("new", "edit", "mine", "--out", tmp_path) == 2
    assert "mine.py is there" in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == "precious"
