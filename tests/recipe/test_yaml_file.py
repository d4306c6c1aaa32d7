"""Recipes on disk: exact round trips, overrides, and one sentence for every bad file."""

import math
import re
from dataclasses import replace

import pytest

from jaxsafety.methods import unlearn
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.nodes import MethodConfig
from jaxsafety.recipe.schema import Recipe, TuneConfig


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
    options = unlearn.Config(ascent_bound=math.inf, weight_rejected=1e-5, reduction="mean")
    unbounded = {"u": MethodConfig("unlearn", options=options)}
    for recipe in (mini_recipe, Recipe(), replace(mini_recipe, tune=TuneConfig(methods=unbounded, mix="batch"))):
        text = yaml_file.to_yaml(recipe)
        again = yaml_file.read(write(text))
        assert again == recipe
        assert yaml_file.to_yaml(again) == text
        assert isinstance(again.seeds, tuple) and isinstance(again.pretrain.mixture.start, tuple)


def test_fields_that_are_not_named_keep_their_defaults(write):
    recipe = yaml_file.read(write("pretrain: {steps: 100, optim: {algorithm: muon}}"))
    expected = replace(Recipe().pretrain, steps=100, optim=replace(Recipe().pretrain.optim, algorithm="muon"))
    assert recipe == replace(Recipe(), name="mine", pretrain=expected)


def test_numbers_without_a_point_and_infinity_are_read_as_numbers(write):
    text = """
        pretrain: {learning_rate: 3e-4, optim: {clip_norm: .inf}}
        tune: {learning_rates: {fast: 1}, methods: {u: {method: unlearn, ascent_bound: .inf}}}
    """
    recipe = yaml_file.read(write(text))
    assert (recipe.pretrain.learning_rate, recipe.pretrain.optim.clip_norm) == (3e-4, math.inf)
    assert recipe.tune.learning_rates == {"fast": 1.0} and list(recipe.tune.methods) == ["u"]
    assert recipe.tune.methods["u"].options.ascent_bound == math.inf


def test_the_name_is_the_files_unless_it_is_given(write):
    assert yaml_file.read(write("world: tiny", "my study.yaml")).name == "my study"
    assert yaml_file.read(write("name: other")).name == "other"
    assert yaml_file.read(write("name: study")).name == "study"
    assert yaml_file.read(write("world: tiny"), overrides=["--name", "given"]).name == "given"


@pytest.mark.parametrize(
    ("words", "pick", "expected"),
    [
        (["--pretrain.steps", "800"], lambda r: r.pretrain.steps, 800),
        (["--seeds", "[7,8]"], lambda r: r.seeds, (7, 8)),
        (["--seeds=[7]"], lambda r: r.seeds, (7,)),
        (["--tune.learning_rates.eta_M", "2e-3"], lambda r: r.tune.learning_rates["eta_M"], 2e-3),
        (["--tune.learning_rates", "{only: 1e-2}"], lambda r: r.tune.learning_rates, {"only": 1e-2}),
        (["--tune.methods.sft.p_unsafe", "0.25"], lambda r: r.tune.methods["sft"].p_unsafe, 0.25),
        (["--evaluate.conditions", "[safe]"], lambda r: r.evaluate.conditions, ("safe",)),
        (["--model.width", "32"], lambda r: r.model.width, 32),
    ],
)
def test_the_command_line_overrides_any_field(write, words, pick, expected):
    text = "pretrain: {steps: 100}\ntune: {methods: {sft: {method: sft}}}\n"
    recipe = yaml_file.read(write(text), overrides=words)
    assert pick(recipe) == expected
    assert list(recipe.tune.methods) == ["sft"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrld: tiny", "FILE: Option 'wrld' is not accepted; did you mean 'world'?"),
        ("pretrain: {stps: 5}", "FILE: Group 'pretrain' does not accept option 'stps'; did you mean 'steps'?"),
        ("tune: {optim: {algoritm: muon}}", "option 'optim.algoritm'; did you mean 'algorithm'?"),
        (
            "tune: {methods: {dpo: {wight_chosen: 1}}}",
            "tune.methods.dpo has no field 'wight_chosen': it has weight_chosen, weight_rejected, reduction; "
            "did you mean 'weight_chosen'?",
        ),
        ("zzz: 1", "Option 'zzz' is not accepted"),
    ],
)
def test_an_unknown_field_asks_for_the_nearest(refuse, text, message):
    assert refuse(text).endswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: {steps: many}", "pretrain.steps: expected an integer, got many"),
        ("pretrain: {steps: 2.5}", "pretrain.steps: expected an integer, got 2.5"),
        ("pretrain: {learning_rate: fast}", "pretrain.learning_rate: expected a number, got fast"),
        ("seeds: 3", "seeds: expected a list, got 3"),
        ("model: {width: wide}", "model.width: expected an integer or null, got wide"),
        ("tune: {methods: 3}", "tune.methods: expected a mapping {name: value}, got 3"),
        ("seeds: [a]", "seeds: expected an integer, got a"),
        ("pretrain: 5", "FILE: pretrain must hold fields, got 5"),
        ("model: [1]", "FILE: model must hold fields, got [1]"),
        ("pretrain: {mixture: {start: [0, 1, 0]}}", "pretrain.mixture.start: expected a list with 4 elements"),
        ("tune: {learning_rates: {eta_M: fast}}", "expected a number, got fast"),
        ("world: tinny", "world: expected one of paper, tiny, got 'tinny'; did you mean 'tiny'?"),
        ("strategy: vmp", "expected one of auto, vmap, map, sharded, got 'vmp'; did you mean 'vmap'?"),
        ("model: {compute_dtype: bf16}", "expected one of float32, bfloat16, got 'bf16'; did you mean 'bfloat16'?"),
        (
            "tune: {methods: {a: {method: dbo}}}",
            "unknown method 'dbo': expected one of sft, dpo, unlearn; did you mean 'dpo'?",
        ),
        ("evaluate: {conditions: [jb_misgn]}", "got 'jb_misgn'; did you mean 'jb_misgen'?"),
        ("pretrain: {steps: -50}", "pretrain.steps must be > 0 and finite, got -50"),
        ("tune: {batch_size: 0}", "tune.batch_size must be > 0 and finite, got 0"),
        ("pretrain: {learning_rate: .nan}", "pretrain.learning_rate must be > 0 and finite, got nan"),
        ("tune: {learning_rates: {eta_M: 0}}", "tune.learning_rates.eta_M must be > 0 and finite, got 0.0"),
        ("seeds: []", "seeds must name at least one seed, got none"),
        ("seeds: [1, 1]", "seeds must be distinct, got [1, 1]"),
    ],
)
def test_a_bad_value_is_named(refuse, text, message):
    assert message in refuse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrain.stps", "5"], "unrecognized arguments: --pretrain.stps 5; did you mean 'pretrain.steps'?"),
        (["--pretrain.steps"], "argument --pretrain.steps: expected one argument"),
        (["--pretrain.steps", "many"], "pretrain.steps: expected an integer, got many"),
        (["junk"], "unrecognized arguments: junk"),
        (["--seeds", "[0,0]"], "seeds must be distinct, got [0, 0]"),
        (["--tune.methods", "{1: {}}"], "has a key that is no text: put 1 in quotes or rename it"),
        (["--tune.learning_rates", "{1: 0.1}"], "has a key that is no text: put 1 in quotes or rename it"),
    ],
)
def test_a_bad_override_is_named(refuse, words, message):
    assert message in refuse("world: tiny", *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE is empty: expected the fields of a recipe, such as `world: tiny`"),
        ("# only a comment\n", "FILE is empty"),
        ("- a\n- b\n", "FILE must hold fields such as `world: tiny`, got a list"),
        ("hello", "FILE must hold fields such as `world: tiny`, got a str"),
        ("a: [", "FILE is not YAML: while parsing a flow node"),
        ("\tworld: tiny", "FILE is not YAML: "),
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
    (tmp_path / "twice.yaml").write_text("pretrain: {steps: 50, batch_size: 4, steps: 100}\n")
    with pytest.raises(ValueError, match=r"twice\.yaml names 'steps' twice"):
        yaml_file.read(tmp_path / "twice.yaml")


def test_grammar_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text("grammars: {safe: mine.pcfg}\n")
    assert yaml_file.read(tmp_path / "own.yaml").grammars == {"safe": str(tmp_path / "mine.pcfg")}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("pretrain: {steps: }", "pretrain.steps"),
        ("pretrain: {mixture: {end: null}}", "pretrain.mixture.end"),
        ("pretrain: {optim: {warmup: ~}}", "pretrain.optim.warmup"),
        ("tune: {methods: {mine: {method: null}}}", "tune.methods.mine.method"),
        ("world: tiny\ngrammars:", "grammars"),
        ("tune: {methods: }", "tune.methods"),
    ],
)
def test_a_field_left_empty_is_named(write, text, field):
    with pytest.raises(ValueError, match=rf"mine.yaml: {re.escape(field)} is empty: give it a value or leave"):
        yaml_file.read(write(text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune.methods.dpo.weight_chosen", "["], "--tune.methods.dpo.weight_chosen: '[' is no value"),
        (["--tune.methods.dpo.weight_chosen", "--seeds", "[0]"], "weight_chosen has no value: expected one behind it"),
        (["--tune.methods.dpo.weight_chosen"], "weight_chosen has no value: expected one behind it"),
        (["--tune.methods.dpo.weight_chosen=fast"], "tune.methods.dpo: weight_chosen must be a number, got 'fast'"),
    ],
)
def test_bad_overrides_of_a_method_are_one_sentence(refuse, words, message):
    assert message in refuse("world: tiny", *words)


def test_an_override_of_a_method_leaves_its_other_fields(write):
    path = write("tune: {methods: {dpo: {weight_chosen: 0.3}}}")
    words = ["--tune.methods.dpo.weight_rejected", "0.2", "--tune.methods.dpo.p_unsafe=0.1"]
    method = yaml_file.read(path, overrides=words).tune.methods["dpo"]
    assert (method.options.weight_chosen, method.options.weight_rejected, method.p_unsafe) == (0.3, 0.2, 0.1)


def test_a_field_that_may_be_empty_may_be(write):
    assert yaml_file.read(write("model: {layers: null}")).model.layers is None
