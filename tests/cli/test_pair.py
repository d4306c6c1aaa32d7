"""``jaxsafety analyze weights | activations | merge`` from the command line to the report, and all that they refuse."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
import safetensors.numpy

from jaxsafety.cli import main
from jaxsafety.formats import hf, prompts
from jaxsafety.report import plotting
from jaxsafety.rundir import manifest_file, opening
from jaxsafety.study.pairs import answers, opened
from tests.conftest import undrawn_svg


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
        patch.setattr("sys.stdout.write", printed.append)
        words = [*map(str, checkpoints), "--out", str(out)]
        patch.setattr(plotting, "svg", undrawn_svg)
        assert main.main(["analyze", "weights", *words, "--attention"]) == 0
        assert main.main(["analyze", "activations", *words, "--prompts", str(few), "--answers", "4"]) == 0
    return out, "".join(printed)


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


def test_the_report_holds_both_analyses(analysed):
    out, printed = analysed
    page = (out / "report.html").read_text()
    for name in ("output_space", "input_alignment", "spectrum", "separation", "clusters", "input_space", "jailbreaks"):
        assert f'id="analysis-{name}"' in page
        assert (out / "results" / "tables" / f"{name}.csv").exists()
    assert "over the prompts of a label" in page and "null_space_up" not in printed
    assert re.search(r"up: null-space energy 0\.\d+ \(a random direction 0\.\d+\), rank \d+", printed)
    assert printed.endswith(f"report: {out / 'report.html'}\n")


@pytest.mark.usefixtures("undrawn")
def test_the_report_is_written_again_of_the_directory(analysed, main, tmp_path, capsys):
    out = shutil.copytree(analysed[0], tmp_path / "run")
    (out / "report.html").unlink()
    for words in (["--format", "json"], ["--dry_run"], ["--typo", "3"]):
        assert main("report", out, *words) == 2
        assert "is a run of two checkpoints" in capsys.readouterr().err
    assert main("report", out) == 0
    numbers, _, where = capsys.readouterr().out.partition("report: ")
    assert numbers in analysed[1] and where == f"{out / 'report.html'}\n" and (out / "report.html").exists()


def test_claims_of_the_study_that_apply_are_judged(analysed):
    page = (analysed[0] / "report.html").read_text()
    assert 'class="chip undecided"' in page
    assert "Claims" in page and "no soft_tokens in this run" not in page


def test_both_analyses_are_on_record(analysed):
    manifest = manifest_file.read_manifest(analysed[0])
    for name in ("weights", "activations"):
        assert manifest[name]["seconds"] > 0 and manifest[name]["devices"]
    assert manifest["activations"]["prompts"] == 24 and manifest["activations"]["truncated_prompts"] == 0


def test_a_figure_alone_and_the_claims(analysed, main, tmp_path, capsys):
    assert main("figure", "spectrum", analysed[0], "--out", tmp_path / "s.png") == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert main("claims", analysed[0]) == 0
    assert "Fig. 3" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_finished_analysis_is_not_repeated(analysed, checkpoints, main, monkeypatch):
    before = pl.read_parquet(analysed[0] / "results" / "analyze.parquet")
    monkeypatch.setattr(hf.Checkpoint, "matrix", None)
    assert main("analyze", "weights", *checkpoints, "--out", analysed[0], "--attention") == 0
    assert pl.read_parquet(analysed[0] / "results" / "analyze.parquet").equals(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights"], "attention is True there, False here"),
        (["weights", "--attention", "--energy", "0.8"], "energy is 0.9 there, 0.8 here"),
        (["activations", "--answers", "5"], "answers is 4 there, 5 here"),
    ],
)
def test_a_directory_has_one_set_of_options(analysed, checkpoints, few, refuse, words, message):
    more = ["--prompts", few] if words[0] == "activations" else []
    said = refuse(words[0], *checkpoints, "--out", analysed[0], *words[1:], *more)
    assert message in said.replace("it is", "is") or "another configuration" in said


@pytest.mark.usefixtures("undrawn")
def test_a_merge_is_a_checkpoint_that_can_be_analysed(checkpoints, main, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main("analyze", "merge", *checkpoints, "--alpha", "1.5", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    base, tuned, merged = (hf.load(path, dtype="float32")[1]["unembed"] for path in (*checkpoints, out))
    np.testing.assert_allclose(merged, base + 1.5 * (tuned - base), atol=1e-5)
    assert main("analyze", "weights", checkpoints[0], out, "--out", tmp_path / "run") == 0


def copied(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / "copy")


@pytest.mark.parametrize("verb", ["weights", "activations", "merge"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "there is no directory|no such|holds no config.json|not a"),
        ("file", "not a directory|holds no|is not"),
        ("empty", "holds no config.json"),
        ("bin", "safetensors"),
        ("model_type", "model_type is 'gpt2'"),
        ("vocabulary", "different vocabularies: vocab_size is 400 and 408"),
        ("layers", "different architectures: layers is 3 and 2"),
        ("same", "is given as both checkpoints"),
    ],
)
def test_bad_checkpoints_are_one_sentence(refuse, checkpoints, another, few, tmp_path, verb, case, message):
    if case == "nothing":
        other = tmp_path / "nothing"
    elif case == "file":
        other = tmp_path / "file"
        other.write_text("x")
    elif case == "empty":
        other = tmp_path / "empty"
        other.mkdir()
    elif case == "bin":
        other = copied(checkpoints[1], tmp_path)
        (other / "model.safetensors").rename(other / "pytorch_model.bin")
    elif case == "model_type":
        other = copied(checkpoints[1], tmp_path)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    else:
        other = {"vocabulary": lambda: another(vocab_size=408), "layers": lambda: another(layers=2),
                 "same": lambda: checkpoints[0]}[case]()  # fmt: skip
    more = {"weights": [], "activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    assert re.search(message, refuse(verb, checkpoints[0], other, "--out", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def poisoned(checkpoint, folder):
    """A copy whose gate of layer 1 holds a NaN."""
    copy = copied(checkpoint, folder)
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("verb", ["weights", "activations", "merge"])
def test_tensors_that_are_not_finite_are_named(refuse, checkpoints, few, tmp_path, verb):
    other = poisoned(checkpoints[1], tmp_path)
    more = {"weights": [], "activations": ["--prompts", few], "merge": ["--alpha", "1"]}[verb]
    said = refuse(verb, checkpoints[0], other, "--out", tmp_path / "out", *more)
    assert "model.layers.1.mlp.gate_proj.weight" in said and "finite" in said
    if verb == "merge":
        assert not (tmp_path / "out").exists()
    elif verb == "weights":
        # What came before is kept.
        assert len(list((tmp_path / "out" / "results" / "analyze" / "weights").iterdir())) == 3


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
        (["weights", "--rank", "0"], "rank must be >= 1 and finite, got 0"),
        (["activations", "--template", "chatt"], "did you mean 'chat'"),
        (["activations", "--dtype", "float8"], "unknown dtype 'float8': expected one of float32, bfloat16"),
        (["activations", "--max_tokens", "1"], "max_tokens must be >= 2 and finite, got 1"),
        (["merge", "--alpha", "nan"], "alpha must be finite"),
        (["merge", "--alpha", "1", "--part", "mpl"], "did you mean 'mlp'"),
        (
            ["merge", "--alpha", "1", "--dtype", "int8"],
            "unknown dtype 'int8': expected one of float32, bfloat16, float16",
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
def test_a_missing_option_shows_the_usage(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main.main(["analyze", *words])
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("usage: jaxsafety analyze")


def test_what_does_not_fit_is_said_before_it_is_loaded(refuse, checkpoints, few, tmp_path, monkeypatch):
    monkeypatch.setattr(answers.memory, "available", lambda: 10_000)
    words = (*checkpoints, "--out", tmp_path / "out")
    assert "the device has" in refuse("weights", *words)
    assert "the device has" in refuse("activations", *words, "--prompts", few)
    assert "--answers 0" in refuse(
        "activations", *checkpoints, "--out", tmp_path / "o", "--prompts", few, "--answers", 4
    )


def test_a_misspelt_analysis_is_asked_about(capsys):
    assert main.main(["analyze", "wieghts", "a", "b", "--out", "c"]) == 2
    assert capsys.readouterr().err == "jaxsafety: no recipe or analysis 'wieghts'; did you mean 'weights'?\n"


@pytest.mark.usefixtures("undrawn")
def test_a_command_that_asked_for_too_much_leaves_nothing_in_the_way(refuse, checkpoints, few, tmp_path):
    words = ("activations", *checkpoints, "--out", tmp_path / "out", "--prompts", few, "--answers")
    assert "expected fewer new tokens" in refuse(*words, "500")
    assert not (tmp_path / "out").exists()
    # Beside another analysis, that one's files stay.
    assert main.main(["analyze", "weights", *map(str, checkpoints), "--out", str(tmp_path / "out")]) == 0
    before = {path.name for path in (tmp_path / "out").iterdir()}
    refuse(*words, "500")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
    assert main.main(["analyze", *map(str, words), "2"]) == 0


@pytest.mark.parametrize("verb", ["weights", "activations"])
def test_a_model_is_no_place_for_a_run(refuse, checkpoints, few, verb):
    more = ("--prompts", few) if verb == "activations" else ()
    before = sorted(path.name for path in checkpoints[0].iterdir())
    assert "is a model directory: choose another place" in refuse(verb, *checkpoints, "--out", checkpoints[0], *more)
    assert sorted(path.name for path in checkpoints[0].iterdir()) == before


def test_a_directory_in_use_or_of_a_study_is_refused(refuse, checkpoints, tmp_path):
    out = tmp_path / "out"
    with opened.enter(out, opened.open_pair(*checkpoints), "weights"):
        assert "another process" in refuse("weights", *checkpoints, "--out", out)
    study = tmp_path / "study"
    with opening.open_run(study, {"world": "tiny"}):
        pass
    assert "another configuration" in refuse("weights", *checkpoints, "--out", study)


@pytest.mark.parametrize("verb", ["status", "run", "tune", "evaluate"])
def test_verbs_of_studies_refuse_a_pair(analysed, main, capsys, verb):
    assert main(verb, analysed[0]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxsafety: ") and said.count("\n") == 1
