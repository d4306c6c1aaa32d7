"""Recipes on disk: exact round trips, overrides, and one sentence for every bad file."""

import math
import re
from dataclasses import replace

import pytest

from jaxsafety.config.names import other_version
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe

FIELDS = "name, subject, seeds, strategy, models, evaluate, analyze, edits, attacks, analyses, claims, grid"
PRETRAINED = "pretrained: {method: pretrain, data: {pool: text}}"
TINY = "subject: {world: tiny}"


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


@pytest.fixture
def refuse(write):
    """Returns the one sentence that a recipe's text, or a command line, gets."""

    def sentence(text, *overrides):
        path = write(text)
        with pytest.raises(ValueError) as caught:
            yaml_file.read(path, overrides=overrides)
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
        return str(caught.value).replace(str(path), "FILE")

    return sentence


def test_a_recipe_survives_the_round_trip(write, mini_recipe):
    unbounded = {"from": "pretrained", "method": "unlearn", "ascent_bound": math.inf, "weight_rejected": [1e-5, 1e-4],
                 "reduction": "mean", "data": {"mix": "batch"}}  # fmt: skip
    models = {"pretrained": mini_recipe.models["pretrained"], "u": unbounded}
    paper = {"world": "paper", "grammars": {"safe": "/a/own.pcfg"}, "model": {"preset": "small", "block": "pre_ln"}}
    own = {"subject": paper, "edits": {}, "attacks": {}, "analyses": {}}
    for recipe in (mini_recipe, Recipe(), replace(mini_recipe, models=models), Recipe(**own)):
        text = yaml_file.to_yaml(recipe)
        again = yaml_file.read(write(text))
        assert again == recipe
        assert yaml_file.to_yaml(again) == text
        assert isinstance(again.seeds, tuple)
        assert isinstance(again.lanes[0].training.data.options.start, tuple)


def test_fields_that_are_not_named_keep_their_defaults(write):
    recipe = yaml_file.read(write("evaluate: {prompts: 2048}"))
    assert recipe == replace(Recipe(), name="mine", evaluate=replace(Recipe().evaluate, prompts=2048))
    own = yaml_file.read(write(f"models: {{{PRETRAINED[:-1]}, steps: 100, optim: {{algorithm: muon}}}}}}"))
    (lane,) = own.lanes
    default = Recipe().lanes[0].training
    assert lane.training == replace(default, steps=100, optim=replace(default.optim, algorithm="muon"))


def test_numbers_without_a_point_and_infinity_are_read_as_numbers(write):
    text = f"""
        models:
          {PRETRAINED[:-1]}, lr: 3e-4, optim: {{clip_norm: .inf}}}}
          u: {{from: pretrained, method: unlearn, lr: {{fast: 1}}, ascent_bound: .inf}}
    """
    pretrained, u = yaml_file.read(write(text)).lanes
    assert (pretrained.training.lr, pretrained.training.optim.clip_norm) == (3e-4, math.inf)
    assert (u.name, u.training.lr, u.training.options.ascent_bound) == ("u.fast", 1.0, math.inf)


def test_a_pattern_is_of_models_that_are_trained(write):
    text = f"models: {{{PRETRAINED}, a: {{from: pretrained, method: sft}}, h: {{from: a, edit: scaled, alpha: 0.5}}}}"
    lanes = yaml_file.read(write(text), overrides=["--models.*.steps", "7"]).lanes
    assert [lane.steps for lane in lanes] == [7, 7, 0]


def test_runs_to_reuse_lie_beside_the_recipe(write, tmp_path):
    for runs, expected in (
        ("[../a/out, ../b/out]", ["old.run=1-out", "old.run=2-out"]),
        ("{x: a, y: b}", ["old.x", "old.y"]),
    ):
        read = yaml_file.read(write(f"models: {{old: {{from: {{run: {runs}, model: sft}}}}}}"))
        assert [lane.name for lane in read.lanes] == expected
        assert all(lane.how.run.startswith(str(tmp_path.parent)) for lane in read.lanes)
        assert yaml_file.read(write(yaml_file.to_yaml(read))) == read


def test_a_home_in_a_recipe_is_the_readers(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read = yaml_file.read(write("subject: {checkpoint: ~/llama, pairs: ~/pairs.jsonl}\nmodels: {}"))
    assert read.subject.options.checkpoint == str(tmp_path / "home/llama")
    assert read.subject.options.pairs == tmp_path / "home/pairs.jsonl"


def test_words_are_words_and_numbers_numbers(write):
    """YAML 1.1 takes ``on`` for true, and ``1e-3`` for text."""
    recipe = yaml_file.read(write("name: yes\nattacks: {prefill: {on: [sft], depth: [0]}}"))
    assert recipe.name == "yes" and recipe.attacks["prefill"].on == ("sft",)
    assert yaml_file.read(write(yaml_file.to_yaml(recipe))) == recipe
    # Text that looks like a number, or like half of one, stays text on the way to a file and back.
    for name in ("1e3", "26ec3ff0dff17146", "true", "1.5", "on", ".inf", "2001-01-01", "1_000"):
        named = replace(recipe, name=name)
        assert yaml_file.read(write(yaml_file.to_yaml(named))) == named
    words = ["--models.sft.lr", "[1e-3, 2.E-4, +1e-05]"]
    lanes = yaml_file.read(write(TINY), overrides=words).lanes_of("sft")
    assert [lane.name for lane in lanes] == ["sft.lr=0.001", "sft.lr=0.0002", "sft.lr=1e-05"]


def test_models_can_share_fields_by_a_merge_key(write):
    text = f"""
        models:
          {PRETRAINED}
          sft: &tuned {{from: pretrained, method: sft, steps: 30}}
          dpo: {{<<: *tuned, method: dpo, beta: 1}}
    """
    with pytest.raises(ValueError, match=r"models\.dpo has no field 'beta'"):
        yaml_file.read(write(text))
    dpo = yaml_file.read(write(text.replace("beta", "weight_chosen"))).lanes[2].training
    assert (dpo.method, dpo.steps, dpo.options.weight_chosen) == ("dpo", 30, 1.0)


def test_the_name_is_the_files_unless_it_is_given(write):
    assert yaml_file.read(write(TINY, "my study.yaml")).name == "my study"
    assert yaml_file.read(write("name: other")).name == "other"
    assert yaml_file.read(write("name: study")).name == "study"
    assert yaml_file.read(write(TINY), overrides=["--name", "given"]).name == "given"


@pytest.mark.parametrize(
    ("words", "pick", "expected"),
    [
        (["--models.sft.steps", "800"], lambda r: [lane.training.steps for lane in r.lanes], [200, 800]),
        (["--models.*.steps", "80"], lambda r: [lane.training.steps for lane in r.lanes], [80, 80]),
        (["--models.s*.optim.warmup=0.5"], lambda r: [lane.training.optim.warmup for lane in r.lanes], [0.1, 0.5]),
        (["--models.sft.lr", "{a: 2e-3, b: 1}"], lambda r: [lane.name for lane in r.lanes[1:]], ["sft.a", "sft.b"]),
        (["--models.sft.data.p_unsafe", "0.25"], lambda r: r.lanes[1].training.data.options.p_unsafe, 0.25),
        (["--models.new.method", "sft"], lambda r: list(r.models), ["pretrained", "sft", "new"]),
        (["--seeds", "[7,8]"], lambda r: r.seeds, (7, 8)),
        (["--seeds=[7]"], lambda r: r.seeds, (7,)),
        (["--evaluate.conditions", "[safe]"], lambda r: r.evaluate.conditions, ("safe",)),
        (["--subject.model.width", "32"], lambda r: r.subject.options.model.width, 32),
        (["--subject.world=paper"], lambda r: (r.subject.kind, r.subject.options.world), ("world", "paper")),
        (["--subject", "{world: paper}"], lambda r: r.subject.options.world, "paper"),
        (["--edits", "{}"], lambda r: (r.edits, list(r.attacks)), ({}, ["prefill", "soft_tokens"])),
    ],
)
def test_the_command_line_overrides_any_field(write, words, pick, expected):
    text = f"models: {{{PRETRAINED}, sft: {{from: pretrained, method: sft}}}}"
    assert pick(yaml_file.read(write(text), overrides=words)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: 3", "FILE: claims: expected a list or null, got 3"),
        ("sbject: {world: tiny}", f"FILE: unknown field 'sbject': expected one of {FIELDS}; did you mean 'subject'?"),
        ("attaks: {}", f"FILE: unknown field 'attaks': expected one of {FIELDS}; did you mean 'attacks'?"),
        ("modls: {a: {}}", f"FILE: unknown field 'modls': expected one of {FIELDS}; did you mean 'models'?"),
        (
            "analyze: {promts: {}}",
            "FILE: unknown field 'analyze.promts': expected one of prompts, response_positions, "
            "attack_prompts, edit_prompts, base; did you mean 'prompts'?",
        ),
        (
            "subject: {wrld: tiny}",
            "FILE: subject must have the field world or checkpoint or trajectory, or `kind: package.module:SUBJECT` "
            "for one of your own, got wrld; did you mean 'world'?",
        ),
        (
            "subject: {world: tiny, modl: {width: 8}}",
            "FILE: subject has no field 'modl': it has world, worlds, grammars, model; did you mean 'model'?",
        ),
        (
            "subject: {world: tiny, model: {widht: 8}}",
            "FILE: subject.model has no field 'widht': it has preset, block, positions, layers, heads, width, "
            "compute_dtype, stored_dtype, attention; did you mean 'width'?",
        ),
        (
            "evaluate: {promts: 5}",
            "FILE: unknown field 'evaluate.promts': expected one of prompts, batch_size, conditions, on, "
            "probe_prompts, answers; did you mean 'prompts'?",
        ),
        ("models: {a: {method: sft, stps: 5}}", "FILE: models.a has no field 'stps'; did you mean 'steps'?"),
        (
            "models: {a: {method: pretrain, optim: {algoritm: muon}}}",
            "models.a.optim has no field 'algoritm': it has algorithm, warmup, decay_end, floor, clip_norm, "
            "weight_decay, b1, b2, momentum, adam_scale; did you mean 'algorithm'?",
        ),
        (
            "models: {a: {method: dpo, wight_chosen: 1}}",
            "models.a has no field 'wight_chosen': it has weight_chosen, weight_rejected, reduction; "
            "did you mean 'weight_chosen'?",
        ),
        ("zzz: 1", f"FILE: unknown field 'zzz': expected one of {FIELDS}"),
    ],
)
def test_an_unknown_field_asks_for_the_nearest(refuse, text, message):
    assert refuse(text).endswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: {method: sft, steps: many}}", "models.a: steps must be an integer, got 'many'"),
        ("models: {a: {method: sft, steps: 2.5}}", "models.a: steps must be an integer, got 2.5"),
        ("models: {a: {method: sft, lr: fast}}", "models.a: lr must be a number, got 'fast'"),
        ("models: {a: {method: sft, lr: {eta_M: fast}}}", "models.a.lr must be a number, got 'fast'"),
        ("models: {a: {method: [sft]}}", "models.a: method must be text, got ['sft']"),
        ("evaluate: {prompts: many}", "evaluate.prompts: expected an integer, got many"),
        ("seeds: 3", "seeds: expected a list, got 3"),
        ("subject: {world: tiny, model: {width: wide}}", "FILE: subject.model: width must be an integer, got 'wide'"),
        ("models: 3", "models: expected a mapping {name: value}, got 3"),
        ("models: {a: 3}", "models.a must hold fields such as `method: sft`, got 3"),
        ("seeds: [a]", "seeds: expected an integer, got a"),
        ("evaluate: 5", "FILE: evaluate must hold fields, got 5"),
        ("subject: [1]", "FILE: subject must hold fields, got [1]"),
        ("subject: {world: tiny, model: [1]}", "FILE: subject: model must be fields by name, got [1]"),
        ("subject: {world: tiny, grammars: {safe: 3}}", "FILE: subject: grammars.safe must be text, got 3"),
        ("edits: [1]", "FILE: edits: expected a mapping {name: value}, got [1]"),
        (
            "models: {a: {method: pretrain, data: {pool: text, start: [0, 1, 0]}}}",
            "models.a.data: start must be four probabilities that sum to 1, got (0.0, 1.0, 0.0)",
        ),
        (
            "subject: {world: tinny}",
            "FILE: subject: unknown world 'tinny': expected one of paper, tiny; did you mean 'tiny'?",
        ),
        (
            "subject: {}",
            "FILE: subject must have the field world or checkpoint or trajectory, or `kind: package.module:SUBJECT` "
            "for one of your own, got none",
        ),
        (
            "subject: {kind: wrld}",
            "FILE: subject: unknown subject 'wrld': expected one of world, checkpoint, trajectory; did you",
        ),
        (
            "subject: {kind: nowhere.at_all:SUBJECT}",
            "FILE: subject: subject 'nowhere.at_all:SUBJECT': there is no module 'nowhere.at_all' on the path of",
        ),
        (
            "subject: {kind: jaxsafety.losses:nll}",
            "subject 'jaxsafety.losses:nll' is a function, expected a jaxsafety.types.Subject",
        ),
        ("subject: {kind: 3}", "FILE: subject: kind must be text, got 3"),
        ("strategy: vmp", "expected one of auto, vmap, map, sharded, got 'vmp'; did you mean 'vmap'?"),
        (
            "subject: {world: tiny, model: {compute_dtype: bf16}}",
            "FILE: subject.model: unknown compute_dtype 'bf16': expected one of float32, bfloat16; did you "
            "mean 'bfloat16'?",
        ),
        (
            "models: {a: {method: dbo}}",
            "unknown method 'dbo': expected one of pretrain, sft, dpo, unlearn, ipo, robust_dpo, simpo, "
            "npo, simnpo, graddiff, derta, deep_alignment, constrained_sft, primal_dual, rmu, circuit_breakers, "
            "adversarial, tamper_resistant, classify, constrained; "
            "did you mean 'dpo'?",
        ),
        (
            "evaluate: {conditions: [jb_misgn]}",
            "unknown condition in evaluate.conditions 'jb_misgn': expected one of safe, unsafe, jb_co_task, "
            "jb_co_text, jb_misgen, ood, near_miss; did you mean 'jb_misgen'?",
        ),
        ("models: {a: {method: sft, steps: -50}}", "models.a: steps must be > 0 and finite, got -50"),
        ("models: {a: {method: sft, batch_size: 0}}", "models.a: batch_size must be > 0 and finite, got 0"),
        ("models: {a: {method: sft, lr: .nan}}", "models.a: lr must be > 0 and finite, got nan"),
        ("models: {a: {method: sft, lr: {eta_M: 0}}}", "models.a: lr must be > 0 and finite, got 0.0"),
        ("seeds: []", "seeds must name at least one seed, got none"),
        ("seeds: [1, 1]", "seeds must be distinct, got [1, 1]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_value_is_named(refuse, text, message):
    assert message in refuse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate.promts", "5"], "unrecognized arguments: --evaluate.promts 5; did you mean 'evaluate.prompts'?"),
        (["--evaluate.prompts"], "argument --evaluate.prompts: expected one argument"),
        (["--evaluate.prompts", "many"], "evaluate.prompts: expected an integer, got many"),
        (["--models.sft.stps", "5"], "models.sft has no field 'stps'; did you mean 'steps'?"),
        (["--models.stf.steps", "5"], "--models.stf: there is no 'stf' in this recipe; did you mean 'sft'?"),
        (["--models.x*.steps", "5"], "--models.x*: no model of this recipe matches: expected one of pretrained, sft"),
        (["--subject.model.widht", "8"], "FILE: subject.model has no field 'widht': it has preset, block, positions"),
        (["--subject.model.width", "wide"], "FILE: subject.model: width must be an integer, got 'wide'"),
        (["--subject.modl.width", "8"], "FILE: subject has no field 'modl': it has world, worlds, grammars, model"),
        (["--subjct.model.width", "8"], "unrecognized arguments: --subjct.model.width 8; did you mean 'subject'?"),
        (["--subject.model.width"], "--subject.model.width has no value: expected one behind it"),
        (["--subject.model.width=["], "--subject.model.width: '[' is no value"),
        (["--subject", "{}"], "FILE: subject must have the field world or checkpoint or trajectory, or `kind: p"),
        (["--edits.whol.alpha", "[1]"], "--edits.whol: there is no 'whol' in this recipe; did you mean 'whole'?"),
        (["--attacks.prefil.depth", "[1]"], "--attacks.prefil: there is no 'prefil' in this recipe; did you mean 'pre"),
        (["--edits", "3"], "FILE: edits: expected a mapping {name: value}, got 3"),
        (["junk"], "unrecognized arguments: junk"),
        (["--seeds", "[0,0]"], "seeds must be distinct, got [0, 0]"),
        (["--models", "{1: {}}"], "has a key that is no text: put 1 in quotes or rename it"),
        (["--models.sft.lr", "{1: 0.1}"], "has a key that is no text: put 1 in quotes or rename it"),
    ],
)
def test_a_bad_override_is_named(refuse, words, message):
    assert message in refuse(TINY, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE is empty: expected the fields of a recipe, such as `subject: {world: tiny}`"),
        ("# only a comment\n", "FILE is empty"),
        ("- a\n- b\n", "FILE must hold fields such as `subject: {world: tiny}`, got a list"),
        ("hello", "FILE must hold fields such as `subject: {world: tiny}`, got a str"),
        ("a: [", "FILE is not YAML: while parsing a flow node"),
        ("\tsubject: {}", "FILE is not YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(refuse, text, message):
    assert refuse(text).startswith(message)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe file at .*nowhere\.yaml"):
        yaml_file.read(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="no recipe file at"):
        yaml_file.read(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.yaml is not YAML"):
        yaml_file.read(tmp_path / "binary.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("subject: {world: tiny, model: {width: 50, layers: 4, width: 100}}\n")
    with pytest.raises(ValueError, match=r"twice\.yaml names 'width' twice"):
        yaml_file.read(tmp_path / "twice.yaml")


def test_grammar_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "subject: {world: tiny, grammars: {safe: mine.pcfg}}\ngrid: {subject.grammars.safe: [a.pcfg, ../b.pcfg]}\n"
    )
    read = yaml_file.read(tmp_path / "own.yaml")
    assert read.subject.options.grammars == {"safe": str(tmp_path / "mine.pcfg")}
    assert read.grid == {"subject.grammars.safe": (str(tmp_path / "a.pcfg"), str(tmp_path.parent / "b.pcfg"))}
    word = yaml_file.read(tmp_path / "own.yaml", overrides=["--subject.grammars.safe", "other.pcfg"])
    assert word.subject.options.grammars == {"safe": str(tmp_path / "other.pcfg")}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("models: {a: {method: sft, steps: }}", "models.a.steps"),
        ("models: {a: {method: pretrain, data: {pool: text, end: null}}}", "models.a.data.end"),
        ("models: {a: {method: pretrain, optim: {warmup: ~}}}", "models.a.optim.warmup"),
        ("models: {mine: {method: null}}", "models.mine.method"),
        ("subject: {world: tiny, grammars: }", "subject.grammars"),
        ("subject: {world: tiny, model: {preset: ~}}", "subject.model.preset"),
        ("subject:", "subject"),
        ("edits:", "edits"),
        ("models: ", "models"),
    ],
)
def test_a_field_left_empty_is_named(write, text, field):
    with pytest.raises(ValueError, match=rf"mine.yaml: {re.escape(field)} is empty: give it a value or leave"):
        yaml_file.read(write(text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models.dpo.weight_chosen", "["], "--models.dpo.weight_chosen: '[' is no value"),
        (["--models.dpo.weight_chosen", "--seeds", "[0]"], "weight_chosen has no value: expected one behind it"),
        (["--models.dpo.weight_chosen"], "weight_chosen has no value: expected one behind it"),
        (["--models.dpo.weight_chosen=fast"], "models.dpo: weight_chosen must be a number, got 'fast'"),
        (["--edits.whole.alpha", "["], "--edits.whole.alpha: '[' is no value"),
    ],
)
def test_bad_overrides_of_a_model_or_an_edit_are_one_sentence(refuse, words, message):
    assert message in refuse(TINY, *words)


def test_an_override_of_a_model_leaves_its_other_fields(write):
    path = write(f"models: {{{PRETRAINED}, dpo: {{from: pretrained, method: dpo, weight_chosen: 0.3}}}}")
    words = ["--models.dpo.weight_rejected", "0.2", "--models.dpo.data.p_unsafe=0.1"]
    training = yaml_file.read(path, overrides=words).lanes[1].training
    found = training.options.weight_chosen, training.options.weight_rejected, training.data.options.p_unsafe
    assert found == (0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("pretrain: {steps: 3}", [], "FILE: `pretrain` is now a model without `from`, such as `models: {pretrained: "),
        ("tune: {steps: 3}", [], "FILE: `tune` is now a model for each of its methods, such as `models: {sft: {from: "),
        (TINY, ["--pretrain.steps", "3"], "--pretrain.steps: `pretrain` is now a model without `from`"),
        (TINY, ["--tune.methods.sft.p_unsafe=1"], "--tune.methods.sft.p_unsafe: `tune` is now a model for"),
        ("world: paper", [], "FILE: `world` is now a field of `subject`, such as `subject: {world: tiny}`"),
        ("grammars: {safe: x.pcfg}", [], "FILE: `grammars` is now a field of `subject`, such as `subject: {world: t"),
        (
            "model: {preset: small}",
            [],
            "FILE: `model` is now a field of `subject`, such as `subject: {world: tiny, model: {preset: tiny}}`",
        ),
        (TINY, ["--world", "paper"], "--world: `world` is now a field of `subject`"),
        (TINY, ["--model.width=8"], "--model.width: `model` is now a field of `subject`"),
        (TINY, ["--model.width", "8"], "--model.width: `model` is now a field of `subject`"),
        (TINY, ["--grammars.safe", "x.pcfg"], "--grammars.safe: `grammars` is now a field of `subject`"),
        ("analyze: {ranks: [1]}", [], "FILE: analyze.ranks is called edits.rank.rank"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_the_new_one(refuse, text, words, message):
    assert refuse(text, *words).startswith(message)


def test_a_field_that_may_be_empty_may_be(write):
    read = yaml_file.read(write("subject: {world: tiny, model: {layers: null}}"))
    assert read.subject.options.model.layers is None


def test_the_recipe_that_an_earlier_version_has_recorded_is_told_of_its_version(write, tmp_path):
    for key in ("world: tiny", "model: {preset: tiny}", "grammars: {}"):
        with pytest.raises(ValueError) as caught:
            yaml_file.read(write(key, "config.yaml"))
        assert str(caught.value) == other_version(tmp_path)


def test_a_subject_is_told_by_its_first_field_or_its_kind(write):
    named = yaml_file.read(write("subject: {kind: world, model: {preset: small}}"))
    assert named == yaml_file.read(write("subject: {world: tiny, model: {preset: small}}"))
    assert named.subject.options.model.preset == "small"


def test_files_of_a_grid_lie_beside_the_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "subject: {checkpoint: base, pairs: a.jsonl}\n"
        "models: {sft: {from: pretrained, method: sft}}\n"
        "grid: {subject.pairs: [a.jsonl, b.jsonl], subject.max_tokens: [8, 16]}\n"
    )
    found = yaml_file.read(path)
    assert found.grid["subject.pairs"] == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert found.subject.options.pairs == tmp_path / "a.jsonl" and found.grid["subject.max_tokens"] == (8, 16)
