"""``jaxsafety tune DIR``, ``analyze weights | activations | merge``: from the command line to the report, and refusals.

A short form stands for a recipe, so what it leaves is an ordinary run.
"""

import csv
import io
import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
import safetensors.numpy

from jaxsafety.cli import main
from jaxsafety.config import yaml12
from jaxsafety.formats import hf, prompts
from jaxsafety.recipe import yaml_file
from jaxsafety.report import plotting
from jaxsafety.rundir import locks, manifest_file, opening
from jaxsafety.rundir.layout import ANALYSIS_FILE, RESULT_FILES
from jaxsafety.study.checkpoints import answers, places, weights
from jaxsafety.study.checkpoints.places import Places
from tests.conftest import undrawn_svg

PARTS = ("output_space", "input_alignment", "spectrum", "separation", "clusters", "input_space", "jailbreaks")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of six prompts of every label."""
    own = prompts.own()
    chosen = [one for label in dict.fromkeys(one.label for one in own) for one in
              [other for other in own if other.label == label][:6]]  # fmt: skip
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    # A character that splitlines takes for the end of a line stands in an answer's file as it is.
    path.write_text(prompts.to_jsonl(chosen).replace("Design a", "Design\u2028 a", 1))
    return path


@pytest.fixture(scope="module")
def analysed(checkpoints, few, tmp_path_factory):
    """The directory of both analyses, and what the second one has printed."""
    out, printed = tmp_path_factory.mktemp("analysed") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_configure_jax", lambda *_, **__: None)
        words = [*map(str, checkpoints), "--out", str(out)]
        patch.setattr(plotting, "svg", undrawn_svg)
        assert main.main(["analyze", "weights", *words, "--attention"]) == 0
        patch.setattr("sys.stdout.write", printed.append)
        assert main.main(["analyze", "activations", *words, "--prompts", str(few), "--answers", "4"]) == 0
    return out, "".join(printed)


@pytest.fixture
def run(analysed, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(analysed[0], tmp_path / "run")


@pytest.fixture
def refuse(main, capsys):
    """Runs ``jaxsafety analyze`` that must end in one sentence and exit code 2; returns the sentence."""

    def sentence(*words):
        capsys.readouterr()
        assert main("analyze", *words) == 2
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if line.startswith("jaxsafety: ")]
        assert out == "" and len(said) == 1 and err.endswith(said[0] + "\n"), err
        return said[0]

    return sentence


def frame(directory, name="analyze"):
    """Its rows, without what tells the run from others."""
    return pl.read_parquet(directory / "results" / f"{name}.parquet").drop("run", "revision", "device")


def test_the_report_holds_both_analyses(analysed):
    out, printed = analysed
    page = (out / "report.html").read_text()
    for name in PARTS:
        assert f'id="analysis-{name}"' in page
        assert (out / "results" / "tables" / f"{name}.csv").exists()
    assert "over the prompts of a label" in page and "each seed is faint" not in page
    assert re.search(r"tuned, up: null-space energy 0\.\d+ \(a random direction 0\.\d+\), rank \d+", printed)
    assert re.search(r"tuned: nearest mean right 0\.\d+, relative gap -?0\.\d+", printed)
    assert "jailbreak:base64" in printed and printed.endswith(f"\nreport: {out / 'report.html'}\n")
    assert f"checkpoint: {out.parent}" not in page and "energy: 0.9" in page


def test_answers_of_every_model_lie_beside_their_prompts(analysed, few):
    for model in ("pretrained", "tuned"):
        lines = (analysed[0] / "results" / "answers" / model / "seed_0.jsonl").read_bytes().split(b"\n")[:-1]
        told = [json.loads(line) for line in lines]
        assert len(told) == 24 and all(row["answer"] for row in told)
        assert [row["prompt"] for row in told if "prompt" in row] == [
            one.messages[0].content for one in prompts.read(few)[0] if len(one.messages) == 1
        ]
    page = (analysed[0] / "report.html").read_text()
    assert "Design\u2028 a" in page


@pytest.mark.usefixtures("undrawn")
def test_the_report_is_written_again_of_the_directory(run, analysed, main, capsys):
    (run / "report.html").unlink()
    with pytest.raises(SystemExit, match="2"):
        main("report", run, "--typo", "3")
    assert "unrecognized arguments: --typo" in capsys.readouterr().err
    assert main("report", run) == 0
    numbers, _, where = capsys.readouterr().out.partition("report: ")
    assert numbers and numbers in analysed[1] and where == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "form", ["json", *(pytest.param(form, marks=pytest.mark.slow) for form in ("csv", "markdown"))]
)
def test_the_report_is_printed_for_programs(run, analysed, checkpoints, main, capsys, form):
    assert main("report", run, "--format", form) == 0
    out = capsys.readouterr().out
    assert "report:" not in out
    if form == "markdown":
        assert out.startswith("| model | safe refused | unsafe refused |") and "\n- tuned, q: null-space" in out
        return
    rows = json.loads(out) if form == "json" else list(csv.DictReader(io.StringIO(out)))
    assert [row["method"] for row in rows] == ["pretrained", "tuned"]
    assert rows[0].keys() == rows[1].keys() >= {"safe refused", "jailbreak:base64 refused", "q null_energy", "accuracy"}
    assert rows[0]["q null_energy"] in (None, "") and 0 < float(rows[1]["q null_energy"]) < 1
    # The command that made it prints the same.
    assert main("analyze", "weights", *checkpoints, "--out", run, "--attention", "--format", form) == 0
    assert capsys.readouterr().out == out


def test_claims_of_the_study_that_apply_are_judged(analysed):
    page = (analysed[0] / "report.html").read_text()
    assert 'class="chip undecided"' in page
    assert "Claims" in page and "no soft_tokens in this run" not in page


@pytest.mark.usefixtures("undrawn")
def test_one_checkpoint_is_one_seed_however_many_are_asked(analysed, main, tmp_path, capsys):
    """What does not differ between the seeds has no interval over them, and decides no claim."""
    content = yaml12.load((analysed[0] / "config.yaml").read_text()) | {"seeds": [0, 1, 2]}
    (tmp_path / "r.yaml").write_text(yaml12.dump(content))
    shutil.copytree(analysed[0] / "results", tmp_path / "run" / "results")
    (tmp_path / "run" / "results" / "analyze.parquet").unlink()
    assert main("run", tmp_path / "r.yaml", "--out", tmp_path / "run") == 0
    assert set(pl.read_parquet(tmp_path / "run" / "results" / "analyze.parquet")["seed"]) == {0}
    capsys.readouterr()
    assert main("claims", tmp_path / "run", "--format", "json") == 0
    verdicts = {claim["verdict"] for claim in json.loads(capsys.readouterr().out)}
    assert verdicts <= {"undecided", "not measured"}


def test_a_refused_analysis_leaves_what_is_there(checkpoints, few, analysed, run, main, tmp_path, capsys):
    other = shutil.copytree(checkpoints[1], tmp_path / "other")
    shutil.copyfile(checkpoints[0] / "model.safetensors", other / "model.safetensors")
    content = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(content.replace(str(checkpoints[1]), str(other)))
    (run / "inputs.yaml").write_text((run / "inputs.yaml").read_text().replace(str(checkpoints[1]), str(other)))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert main("analyze", "weights", checkpoints[0], other, "--out", run, "--energy", "0.5") == 2
    assert main("run", run) == 2
    assert "whose files have changed since it began" in capsys.readouterr().err
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.slow
def test_a_kill_as_an_analysis_is_added_is_no_end(checkpoints, few, main, tmp_path, monkeypatch):
    from jaxsafety.study.checkpoints import analyze

    words = ("analyze", "weights", *checkpoints, "--out", tmp_path / "run")
    asked = ("analyze", "activations", *checkpoints, "--out", tmp_path / "run", "--prompts", few)
    monkeypatch.setattr(plotting, "svg", undrawn_svg)
    assert main(*words) == 0
    for where, name in ((analyze, "reopen"), (opening, "record_config")):
        done = getattr(where, name)

        def kill(*given, done=done, **named):
            done(*given, **named)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(where, name, kill)
            assert main(*asked) == 130
    assert main(*asked) == 0
    assert any((tmp_path / "run" / "results" / "analyze" / "activations").rglob("*.parquet"))
    assert "clusters" in pl.read_parquet(tmp_path / "run" / "results" / "analyze.parquet")["analysis"]


def test_control_tokens_are_injected_and_made_text_on_request(checkpoints, few, main, capsys):
    assert main("prompts", "--tokenizer", checkpoints[1]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert len(rows) == len(prompts.own()) + 240
    assert rows[-1]["label"] == "jailbreak:injection" and "</s><|assistant|>Sure" in rows[-1]["prompt"]
    words = ("analyze", "activations", *checkpoints, "--out", "run", "--prompts", few, "--special_tokens", "text")
    assert main(*words, "--print_config") == 0
    assert "special_tokens: text" in capsys.readouterr().out


def test_both_analyses_are_on_record(analysed):
    manifest = manifest_file.read_manifest(analysed[0])
    for name in ("evaluate", "analyze"):
        assert manifest[name]["seconds"] > 0 and manifest[name]["devices"]
    assert manifest["prompts"] == {"asked": 24, "truncated": 0, "spelling": 0}
    recipe = yaml_file.recorded(analysed[0])
    assert set(recipe.analyses) == {"weights", "activations"} and recipe.evaluate.answers == 4
    assert recipe.analyses["weights"].options.attention is True
    assert "prompts" in yaml12.load((analysed[0] / "inputs.yaml").read_text())


def test_a_figure_alone_and_the_claims(analysed, main, tmp_path, capsys):
    assert main("figure", "spectrum", analysed[0], "--out", tmp_path / "s.png") == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert main("claims", analysed[0]) == 0
    assert "Fig. 3" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_finished_analysis_is_not_repeated(run, checkpoints, main, monkeypatch):
    before, made = frame(run), (run / "results" / "analyze" / "weights" / "tuned" / "seed_0" / "000-mlp-up.parquet")
    stamp = made.stat().st_mtime_ns
    monkeypatch.setattr(hf.Checkpoint, "matrix", None)
    assert main("analyze", "weights", *checkpoints, "--out", run, "--attention") == 0
    assert frame(run).equals(before) and made.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights"], "analyses.weights.attention is True there and False here"),
        (["weights", "--attention", "--energy", "0.8"], "analyses.weights.energy is 0.9 there and 0.8 here"),
        (["activations", "--answers", "5"], "evaluate.answers is 4 there and 5 here"),
        (["activations", "--answers", "4", "--directions", "3"], "analyses.activations.directions is 16 there and 3"),
        (["activations", "--answers", "4", "--max_tokens", "999"], "subject.max_tokens is 1024 there and 999 here"),
    ],
)
def test_a_directory_has_one_set_of_options(analysed, checkpoints, few, refuse, words, message):
    before = (analysed[0] / "config.yaml").read_bytes()
    more = ["--prompts", few] if words[0] == "activations" else []
    said = refuse(words[0], *checkpoints, "--out", analysed[0], *words[1:], *more)
    assert message in said and "choose another output directory" in said
    assert (analysed[0] / "config.yaml").read_bytes() == before


def test_what_has_read_prompts_reads_no_others(run, checkpoints, few, refuse, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(few.read_text().splitlines(keepends=True)[:-1]))
    words = ("activations", *checkpoints, "--out", run, "--answers", "4", "--prompts")
    assert f"subject.prompts is '{few}' there and '{other}' here" in refuse(*words, other)
    # The file itself is another one.
    changed = yaml12.load((run / "config.yaml").read_text())
    changed["subject"]["prompts"] = str(other)
    (run / "config.yaml").write_text(yaml12.dump(changed))
    assert "prompts is " in refuse(*words, other)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_order_of_the_analyses_makes_no_difference(analysed, checkpoints, few, main, tmp_path):
    out = tmp_path / "run"
    words = (*checkpoints, "--out", out)
    assert main("analyze", "activations", *words, "--prompts", few, "--answers", "4") == 0
    assert main("analyze", "weights", *words, "--attention") == 0
    order = ["analysis", "method", "metric", "condition", "subset", "layer", "part", "strength"]
    one, other = (frame(directory).sort(order) for directory in (analysed[0], out))
    assert one.equals(other)
    one, other = (yaml12.load((directory / "config.yaml").read_text()) for directory in (analysed[0], out))
    assert one == other


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_moved_still_grows(checkpoints, main, tmp_path):
    assert main("analyze", "weights", *checkpoints, "--out", tmp_path / "run") == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert main("analyze", "weights", *checkpoints, "--out", moved) == 0
    assert yaml12.load((moved / "config.yaml").read_text())["name"] == "run"


@pytest.mark.usefixtures("undrawn")
def test_a_merge_is_a_checkpoint_that_can_be_analysed(checkpoints, main, tmp_path, capsys):
    out = tmp_path / "run"
    assert main("analyze", "merge", *checkpoints, "--alpha", "1.5", "--out", out) == 0
    model = out / "models" / "merged" / "seed_0"
    assert capsys.readouterr().out == f"{model}\n"
    base, tuned, merged = (hf.load(path, dtype="float32")[1]["unembed"] for path in (*checkpoints, model))
    np.testing.assert_allclose(merged, base + 1.5 * (tuned - base), atol=1e-5)
    assert main("analyze", "weights", checkpoints[0], model, "--out", tmp_path / "weights") == 0
    assert main("analyze", "merge", *checkpoints, "--alpha", "2", "--out", out) == 2
    assert "models.merged.alpha is 1.5 there and 2.0 here" in capsys.readouterr().err


def test_attributes_that_do_not_matter_are_passed_over_and_that_is_on_record(checkpoints, main, tmp_path, capsys):
    places = [shutil.copytree(one, tmp_path / one.name) for one in checkpoints]
    for place in places:
        config = json.loads((place / "config.json").read_text()) | {"made_up": 1, "another.one": {"a": 2}}
        (place / "config.json").write_text(json.dumps(config))
    words = ["analyze", "merge", *places, "--alpha", "1.5", "--out", tmp_path / "run"]
    assert main(*words) == 2
    assert "made_up (1), another.one ({'a': 2})" in capsys.readouterr().err
    assert main(*words, "--ignore_config", "made_up,another.one") == 0
    recorded = yaml12.load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["subject"]["ignore_config"] == ["made_up", "another.one"]
    model = tmp_path / "run" / "models" / "merged" / "seed_0"
    assert json.loads((model / "config.json").read_text()).items() >= {"made_up": 1, "another.one": {"a": 2}}.items()


EDITS = {
    "whole": (["--alpha", "1.5"], [("merged", "tuned", "scaled")]),
    "part": (["--alpha", "2", "--part", "mlp"], [("merged", "tuned", "scaled")]),
    "directions": (["--alpha", "1", "--rank", "2"], [("merged", "tuned", "rank_part")]),
    "of a part": (
        ["--alpha", "0.5", "--rank", "2", "--part", "mlp"],
        [("merged_1", "tuned", "scaled"), ("merged_2", "merged_1", "rank_part"), ("merged", "merged_2", "scaled")],
    ),
    "null space": (
        ["--alpha", "2", "--part", "null_space", "--energy", "0.8"],
        [("merged_1", "tuned", "space_part"), ("merged", "merged_1", "scaled")],
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_merge_is_edits_one_after_the_other(checkpoints, main, capsys, case):
    words, expected = EDITS[case]
    assert main("analyze", "merge", *checkpoints, "--out", "run", *words, "--print_config") == 0
    models = yaml12.load(capsys.readouterr().out)["models"]
    found = [(label, one["from"], one["edit"]) for label, one in models.items() if "edit" in one]
    assert found == expected
    assert all(one.get("energy", 0.8) == 0.8 for one in models.values())


def copied(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / "copy")


@pytest.fixture
def broken(checkpoints, another, tmp_path):
    """Makes what is given instead of the tuned model."""

    def make(case):
        if case in ("vocabulary", "layers"):
            return another(**{"vocabulary": {"vocab_size": 408}, "layers": {"layers": 2}}[case])
        if case in ("bin", "model_type"):
            other = copied(checkpoints[1], tmp_path)
            if case == "bin":
                (other / "model.safetensors").rename(other / "pytorch_model.bin")
            else:
                config = json.loads((other / "config.json").read_text())
                (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
            return other
        other = checkpoints[0] if case == "same" else tmp_path / case
        if case == "file":
            other.write_text("x")
        elif case == "empty":
            other.mkdir()
        return other

    return make


@pytest.mark.parametrize("verb", ["weights", "activations", "merge"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "models.tuned: there is no directory|no such|holds no config.json|not a"),
        ("file", "models.tuned: .*(not a directory|holds no|is not)"),
        ("empty", "models.tuned: .*holds no config.json"),
        ("bin", "safetensors"),
        ("model_type", "model_type is .*'gpt2'"),
        ("layers", "different architectures: layers is 3 and 2"),
        ("same", "models pretrained and tuned are one checkpoint"),
    ],
)
def test_bad_checkpoints_are_one_sentence(refuse, broken, checkpoints, few, tmp_path, verb, case, message):
    more = {"weights": [], "activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    assert re.search(message, refuse(verb, checkpoints[0], broken(case), "--out", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["activations", "merge"])
def test_vocabularies_must_be_one_where_models_are_run_or_made(refuse, broken, checkpoints, few, tmp_path, verb):
    more = {"activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    told = refuse(verb, checkpoints[0], broken("vocabulary"), "--out", tmp_path / "out", *more)
    assert "different vocabularies: vocab_size is 400 and 408" in told


def test_weights_of_any_tensors_are_listed_before_they_are_measured(broken, checkpoints, main, tmp_path, capsys):
    """Embeddings of different size have their common rows; what is not asked for is there with its reason."""
    words = ["analyze", "weights", checkpoints[0], broken("vocabulary"), "--out", tmp_path / "out", "--dry_run"]
    assert main(*words, "--format", "json") == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sum(row["measured"] for row in listed.values()) == 9
    assert main(*words, "--format", "json", "--include", "embed|q_proj", "--exclude", r"layers\.0\.") == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    measured = {name: row for name, row in listed.items() if row["measured"]}
    embed = measured.pop("model.embed_tokens.weight")
    assert (embed["base"], embed["tuned"], embed["note"]) == ("400 x 32", "408 x 32", "the first 400 rows")
    assert {row["part"] for row in measured.values()} == {"q"} and len(measured) == 2
    assert listed["lm_head.weight"]["note"] == "not included"
    assert main(*words) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 measured\n| name |") and "left out\n| name" in out and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_weights_of_a_model_type_that_nobody_knows(checkpoints, main, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "MATRICES", {"mlp": ("mlp/gate",), "attention": ()})  # of one shape
    places = [shutil.copytree(one, tmp_path / one.name) for one in checkpoints]
    for place in places:
        config = json.loads((place / "config.json").read_text()) | {"model_type": "novel"}
        (place / "config.json").write_text(json.dumps(config))
    assert main("analyze", "weights", *places, "--out", tmp_path / "out", "--include", "gate") == 0
    printed = capsys.readouterr()
    assert "3 pairs of matrices by name; left out: " in printed.err and "tuned, gate: null-space energy" in printed.out
    by_name = pl.read_parquet(tmp_path / "out" / "results" / ANALYSIS_FILE)
    assert main("analyze", "weights", *checkpoints, "--out", tmp_path / "known") == 0
    order = ["analysis", "metric", "part", "layer", "strength"]
    columns = [*order, "value"]
    known = pl.read_parquet(tmp_path / "known" / "results" / ANALYSIS_FILE)
    assert by_name.select(columns).sort(order).equals(known.select(columns).sort(order))


def poisoned(checkpoint, folder):
    """A copy whose gate of layer 1 holds a NaN."""
    copy = copied(checkpoint, folder)
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("verb", ["weights", "activations", "merge"])
def test_tensors_that_are_not_finite_are_named(refuse, main, checkpoints, few, tmp_path, verb):
    other = poisoned(checkpoints[1], tmp_path)
    more = {"weights": [], "activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    said = refuse(verb, checkpoints[0], other, "--out", tmp_path / "out", *more)
    assert "model.layers.1.mlp.gate_proj.weight" in said and "finite" in said
    if verb == "merge":
        assert not (tmp_path / "out" / "models" / "merged" / "seed_0").exists()
    elif verb == "weights":
        # What came before is kept.
        assert len(list((tmp_path / "out" / "results" / "analyze" / "weights").rglob("*.parquet"))) == 3


PROMPTS = {
    "none": (None, "no prompts at"),
    "empty": ("", "holds no prompts"),
    "not json": ("hello\n", "line 1 is not JSON"),
    "no label": ('{"prompt": "hi"}\n', "line 1 has no label: expected safe, unsafe or jailbreak:KIND"),
    "bad label": ('{"prompt": "hi", "label": "saef"}\n', "did you mean 'safe'"),
    "empty prompt": ('{"prompt": " ", "label": "safe"}\n', "line 1: prompt must be text that is not empty"),
    "few": ('{"prompt": "hi", "label": "safe"}\n' * 4, "got 0 unsafe prompts, expected at least 4"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompts_are_one_sentence(refuse, checkpoints, tmp_path, case):
    content, message = PROMPTS[case]
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    words = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out")
    assert message in refuse("activations", *checkpoints, *words)
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_are_not_there_or_do_not_belong(refuse, checkpoints, few, tmp_path):
    bare = copied(checkpoints[1], tmp_path)
    words = (checkpoints[0], bare, "--prompts", few, "--out", tmp_path / "out")
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    assert "no chat template" in refuse("activations", *words) and not (tmp_path / "out").exists()
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 1 / 0 }}"}))
    assert "the chat template of" in refuse("activations", *words)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    moved = {token: number + 500 * (number > 5) for token, number in tokenizer["model"]["vocab"].items()}
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": tokenizer["model"] | {"vocab": moved}}))
    assert "the models have a vocabulary of 400" in refuse("activations", *words)
    (bare / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not a tokenizer" in refuse("activations", *words)
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer in" in refuse("activations", *words)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights", "--method", "gramm"], "did you mean 'gram'"),
        (["weights", "--energy", "1.5"], "energy must be > 0 and <= 1 and finite, got 1.5"),
        (["weights", "--energy", "much"], "energy must be a number, got 'much'"),
        (["weights", "--rank", "0"], "rank must be >= 1 and finite, got 0"),
        (["activations", "--template", "chatt"], "did you mean 'chat'"),
        (["activations", "--dtype", "float8"], "unknown dtype 'float8': expected one of float32, bfloat16"),
        (["activations", "--max_tokens", "1"], "max_tokens must be >= 2 and finite, got 1"),
        (["activations", "--answers", "-1"], "answers must be >= 0 and finite, got -1"),
        (["merge", "--alpha", "nan"], "alpha must be finite"),
        (["merge", "--alpha", "1", "--part", "mpl"], "did you mean 'mlp'"),
        (["merge", "--alpha", "1", "--energy", "0.8"], "--energy is of --part null_space"),
        (["merge", "--alpha", "1", "--part", "null_space", "--energy", "x"], "energy must be a number, got 'x'"),
        (
            ["merge", "--alpha", "1", "--store", "int8"],
            "unknown store 'int8': expected one of float32, float16, bfloat16",
        ),
        (["merge", "--alpha", "1", "--rank", "0"], "rank must be >= 1 and finite, got 0"),
    ],
)
def test_bad_options_are_one_sentence(refuse, checkpoints, few, tmp_path, words, message):
    more = ["--prompts", few] if words[0] == "activations" else []
    assert message in refuse(words[0], *checkpoints, "--out", tmp_path / "out", *words[1:], *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["weights"], ["weights", "a", "b"], ["activations", "a", "b", "--out", "c"], ["merge", "a", "b", "--out", "c"]],
)
def test_a_missing_option_is_one_sentence(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main.main(["analyze", *words])
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("jaxsafety: the following")


def test_an_empty_place_is_not_the_working_directory(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(["analyze", "weights", "a", "b", "--out", ""])
    assert exit_.value.code == 2 and "--out: got an empty path, expected a place such as" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_what_does_not_fit_is_said_before_it_is_loaded(refuse, checkpoints, few, tmp_path, monkeypatch):
    monkeypatch.setattr(answers.memory, "available", lambda: 10_000)
    words = (*checkpoints, "--out", tmp_path / "out")
    # Of numbers that nothing else here is compiled for.
    assert "the device has" in refuse("weights", *words, "--energy", "0.77")
    assert "the device has" in refuse("activations", *words, "--prompts", few, "--batch_tokens", "333")
    assert "or no answers" in refuse("activations", *words, "--prompts", few, "--answers", 4)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_analysis_is_asked_about(capsys):
    assert main.main(["analyze", "wieghts", "a", "b", "--out", "c"]) == 2
    assert capsys.readouterr().err == "jaxsafety: no recipe or analysis 'wieghts'; did you mean 'weights'?\n"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_command_that_asked_for_too_much_leaves_nothing_in_the_way(refuse, checkpoints, few, tmp_path):
    words = ("activations", *checkpoints, "--out", tmp_path / "out", "--prompts", few, "--answers")
    assert "expected fewer new tokens" in refuse(*words, "500")
    assert not (tmp_path / "out").exists()
    # Beside another analysis, that one's files stay.
    assert main.main(["analyze", "weights", *map(str, checkpoints), "--out", str(tmp_path / "out")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    refuse(*words, "500")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    # Nor does what is known only once the work has begun.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.memory, "available", lambda: 10_000)
        assert "or no answers" in refuse(*words, "3")
    # What had been measured is still there, and said to be.
    for name in ("config.yaml", "inputs.yaml", *(f"results/{name}" for name in (*RESULT_FILES, ANALYSIS_FILE))):
        assert (tmp_path / "out" / name).read_bytes() == before[tmp_path / "out" / name]
    assert main.main(["analyze", *map(str, words), "2", "--batch_tokens", "999"]) == 0
    found = yaml_file.recorded(tmp_path / "out")
    assert set(found.analyses) == {"weights", "activations"} and found.subject.options.batch_tokens == 999


@pytest.mark.parametrize("verb", ["weights", "activations", "merge"])
def test_a_model_is_no_place_for_a_run(refuse, checkpoints, few, verb):
    more = {"weights": [], "activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    before = sorted(path.name for path in checkpoints[0].iterdir())
    assert "is a model directory: choose another place" in refuse(verb, *checkpoints, "--out", checkpoints[0], *more)
    assert sorted(path.name for path in checkpoints[0].iterdir()) == before


@pytest.mark.usefixtures("undrawn")
def test_a_directory_in_use_or_of_a_study_is_refused(refuse, checkpoints, tmp_path):
    out = tmp_path / "out"
    with locks.hold(out):
        assert "another process" in refuse("weights", *checkpoints, "--out", out)
    study = tmp_path / "study"
    for subject in ({"world": "tiny"}, {"kind": "world", "world": "tiny", "grammars": {}}):
        with opening.open_run(study, {"name": "study", "subject": subject}):
            pass
        assert "another configuration" in refuse("weights", *checkpoints, "--out", study)
        shutil.rmtree(study)
    assert main.main(["analyze", "weights", *map(str, checkpoints), "--out", str(out)]) == 0
    other = copied(checkpoints[1], tmp_path)
    assert "models.tuned.checkpoint is" in refuse("weights", checkpoints[0], other, "--out", out)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("verb", [pytest.param("run", marks=pytest.mark.slow), "tune", "evaluate", "analyze"])
def test_verbs_of_studies_go_on_with_such_a_run(analysed, main, capsys, verb):
    before = frame(analysed[0])
    assert main(verb, analysed[0]) == 0
    assert (analysed[1] in capsys.readouterr().out) == (verb == "run") and frame(analysed[0]).equals(before)


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_status_of_such_a_run(analysed, main, capsys, form):
    assert main("status", analysed[0], "--format", form) == 0
    out = capsys.readouterr().out
    if form == "table":
        assert out.split() == ["run", "evaluate", "analyze", "report", "state", "run", *["done"] * 4]
        assert "pretrained" not in out
    else:
        (row,) = json.loads(out)
        assert row["analyze"] is True and row["state"] == "done"


@pytest.fixture
def recipe_of(main, capsys, tmp_path):
    """Writes the recipe that a command stands for, away from where the command works."""

    def write(*words):
        capsys.readouterr()
        assert main(*words, "--print_config") == 0
        path = tmp_path / "elsewhere" / "recipe.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(capsys.readouterr().out)
        return path

    return write


@pytest.mark.usefixtures("undrawn")
def test_an_analysis_is_the_recipe_that_it_prints(checkpoints, main, recipe_of, analysed, tmp_path):
    recipe = recipe_of("analyze", "weights", *checkpoints, "--out", tmp_path / "one", "--attention")
    assert not (tmp_path / "one").exists()
    assert main("run", recipe, "--out", tmp_path / "other") == 0
    spaces = pl.col("analysis").is_in(["output_space", "input_alignment", "spectrum"])
    assert frame(tmp_path / "other").equals(frame(analysed[0]).filter(spaces))
    # What it prints beside an analysis that is there has both.
    both = yaml12.load(recipe_of("analyze", "weights", *checkpoints, "--out", analysed[0], "--attention").read_text())
    assert both == yaml12.load((analysed[0] / "config.yaml").read_text())


def test_an_analysis_of_a_model_has_one_set_of_options(main, capsys, tmp_path):
    """Of other models it may have others; what two labels measure of one model no table could tell apart."""
    recipe = {"subject": {"checkpoint": "b"}, "models": {"t": {"from": "pretrained", "checkpoint": "t"},
              "u": {"from": "pretrained", "checkpoint": "u"}}}  # fmt: skip
    for on, code in (([], 2), (["t", "u"], 2), (["u"], 0)):
        analyses = {"weights": {"on": ["t"]}, "whole": {"analysis": "weights", "method": "full", "on": on}}
        (tmp_path / "recipe.yaml").write_text(yaml12.dump(recipe | {"analyses": analyses}))
        assert main("run", tmp_path / "recipe.yaml", "--print_config") == code
        said = "analyses.whole: analyses.weights asks weights of the same models: expected others in `on`\n"
        assert capsys.readouterr().err.endswith(said if code else "")


@pytest.mark.usefixtures("undrawn")
def test_a_tuning_of_two_seeds_is_the_recipe_that_it_prints(
    checkpoints, pairs, main, recipe_of, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(places, "local", lambda: Places(None))
    small = ("--max_tokens", "64", "--batch_size", "4", "--lora_rank", "2", "--chunk_steps", "1", "--seeds", "0,3")
    words = ("tune", checkpoints[0], "--data", pairs, "--method", "sft", "--out", tmp_path / "one", *small)
    recipe = recipe_of(*words)
    assert not (tmp_path / "one").exists()
    assert main(*words) == 0
    models = [tmp_path / "one" / "models" / "tuned" / f"seed_{seed}" for seed in (0, 3)]
    assert capsys.readouterr().out.endswith("".join(f"{model}\n" for model in models))
    assert main("run", recipe, "--out", tmp_path / "other") == 0
    for model in models:
        twin = tmp_path / "other" / model.relative_to(tmp_path / "one")
        names = sorted(path.name for path in model.iterdir())
        assert names == sorted(path.name for path in twin.iterdir()) and "tokenizer.json" in names
        assert all((model / name).read_bytes() == (twin / name).read_bytes() for name in names)
    one, other = (frame(tmp_path / name, "curves") for name in ("one", "other"))
    assert one.equals(other) and sorted(set(one["seed"])) == [0, 3] and sorted(set(one["step"])) == [1, 2]
    files = [(model / "model.safetensors").read_bytes() for model in models]
    assert files[0] != files[1]


def test_a_tuning_is_of_the_steps_of_its_epochs(checkpoints, pairs, main, recipe_of):
    words = ("tune", checkpoints[0], "--data", pairs, "--method", "dpo", "--out", "run", "--batch_size", "4")
    found = yaml12.load(recipe_of(*words, "--epochs", "2.5", "--weight_rejected", "0.2").read_text())
    tuned = found["models"]["tuned"]
    assert (tuned["steps"], tuned["weight_rejected"], found["seeds"]) == (5, 0.2, [0])
    assert found["name"] == "run" and found["subject"]["pairs"] == str(pairs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weight_chosn", "1"), "unknown option --weight_chosn: method dpo has weight_chosen, "),
        (("--weight_chosn", "1"), "; did you mean 'weight_chosen'?"),
        (("--sed", "1"), "; did you mean 'seeds'?"),
        (("--from", "x"), "unknown option --from"),
        (("--steps", "0"), "tune: models.tuned: steps must be > 0 and finite, got 0"),
        (("--full", "--lora_rank", "4"), "--lora_rank is of an adapter: expected none with --full"),
        (("--seeds", "0,x"), "seeds: expected an integer, got x"),
        (("--seeds", "1,1"), "seeds must be distinct, got [1, 1]"),
        (("--devices", "0"), "accelerators are used without it), got 0"),
        (("--devices", "1000"), "accelerators are used without it), got 1000"),
    ],
)
def test_bad_options_of_a_tuning_are_one_sentence(checkpoints, pairs, main, capsys, tmp_path, words, message):
    given = ("tune", checkpoints[0], "--data", pairs, "--method", "dpo", "--out", tmp_path / "run", *words)
    assert main(*given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_examples_that_are_not_there_are_one_sentence(checkpoints, main, capsys, tmp_path):
    given = ("tune", checkpoints[0], "--data", tmp_path / "no.jsonl", "--method", "sft", "--out", tmp_path / "run")
    assert main(*given) == 2
    assert capsys.readouterr().err.startswith(f"jaxsafety: no examples at {tmp_path / 'no.jsonl'}: expected a ")
