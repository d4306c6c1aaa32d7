"""One file and one name each: another's method, pool, edit, attack, analysis and claims go through a whole study."""

import json
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

from jaxsafety import attacks, keys
from jaxsafety.config import fields, yaml12
from jaxsafety.models.adapter import adapted
from jaxsafety.recipe import graph, yaml_file
from jaxsafety.recipe.models import trained
from jaxsafety.recipe.nodes import node
from jaxsafety.report import claims_table
from jaxsafety.rundir import checkpoint, metrics_file, results
from jaxsafety.study import pipeline
from jaxsafety.training import objective, stepping
from jaxsafety.types import Batch, Needs, PreferenceBatch
from tests.disturbed import die_before_saving
from tests.elsewhere import method as elsewhere
from tests.elsewhere.edit import EDIT as OUR_EDIT

NAME = "tests.elsewhere.method:METHOD"
EDIT = "tests.elsewhere.edit:EDIT"
STRANGE = "tests.elsewhere.attack:ATTACK"


@dataclass(frozen=True)
class _Required:
    path: str


BAD_ROLE = OUR_EDIT._replace(roles=("base", "harmful"))
REQUIRED = OUR_EDIT._replace(Config=_Required)
MODEL = adapted(lambda params, tokens: params["x"][tokens], max_tokens=4)
SIDE = Batch(jnp.zeros((2, 3), int), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool))
BATCH = PreferenceBatch(SIDE, None, jnp.asarray([True, False]))


OWN = {
    "edits": {"whole": {"edit": "scaled", "alpha": [1.0]}, "signs": {"edit": EDIT}},
    "attacks": {"strange": {"attack": "tests.elsewhere.attack:ATTACK"}},
    "analyses": {"verdicts": {}, "mine": {"analysis": "tests.elsewhere.analysis:ANALYSIS"}},
    "claims": ["jain2024", "tests.elsewhere.claims:CLAIMS"],
}


@pytest.fixture(scope="module")
def recipe(mini_yaml, tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "mini.yaml"
    content = yaml12.load(mini_yaml.read_text()) | OWN
    models = content["models"]
    content["models"] = {
        "pretrained": models["pretrained"],
        "mine": models["sft"] | {"method": NAME, "pull": 0.5, "keep": 0.75},
        "sft": models["sft"] | {"data": {"pool": "tests.elsewhere.pool:POOL", "over_refused": 0.25}},
    }
    path.write_text(yaml12.dump(content))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    from jaxsafety.cli import main as command

    directory = tmp_path_factory.mktemp("elsewhere") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main(["run", str(recipe), "--out", str(directory)]) == 0
    return directory


@pytest.mark.slow
def test_its_curves_have_the_terms_and_its_metrics(run):
    rows = [row for row in metrics_file.read_metrics(run) if row["method"] == "mine"]
    assert {row["step"] for row in rows} == {2, 4, 6}
    assert all({"loss/kept", "loss/pulled", "moved", "level", "finite"} <= row.keys() for row in rows)
    assert all(row["loss"] == pytest.approx(row["loss/kept"] + row["loss/pulled"], rel=1e-5) for row in rows)
    assert all(row["moved"] > 0 for row in rows if row["step"] == 6)


def _record(run, lane):
    folder = run / "checkpoints" / lane
    return json.loads((folder / f"{checkpoint.latest(folder):08d}" / "digests.json").read_text())


@pytest.mark.slow
def test_it_is_judged_analysed_and_reported_like_the_others(run):
    for name in ("evaluate", "analyze"):
        methods = set(pl.read_parquet(run / "results" / f"{name}.parquet")["method"])
        assert methods == {"pretrained", "mine", "sft"}
    assert "mine" in (run / "report.html").read_text()


@pytest.fixture(scope="module")
def rows(run):
    return results.read_results([run / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)


@pytest.mark.slow
def test_an_edit_is_made_of_every_tuned_model_at_every_strength_and_judged(rows):
    made = rows.filter(analysis="interventions", part="signs", metric="refused", condition="unsafe")
    assert set(made["strength"]) == {0.5, 1.0} and set(made["method"]) == {"mine", "sft"}
    assert made.height == 2 * 2 * 2 * 2 and made["value"].is_not_null().all()


@pytest.mark.slow
def test_an_attack_brings_a_condition_that_everything_is_judged_and_analysed_on(rows, run):
    table = results.read_results([run / "results" / "evaluate.parquet"])
    assert set(table["condition"]) == {"safe", "unsafe", "strange"}
    assert set(rows.filter(analysis="mine")["condition"]) == {"safe", "unsafe", "strange"}
    assert "strange" in set(rows.filter(analysis="interventions")["condition"])
    attacked = rows.filter(analysis="strange")
    assert set(attacked["condition"]) == {"strange"} and set(attacked["strength"]) == {0.0, 1.0}
    assert {"complied", "refused", "other", "n_prompts", "letters", "relative_tau", "gradient_norm"} <= set(
        attacked["metric"]
    )
    # A hook that takes nothing away leaves the verdicts of the very same prompts.
    same = attacked.filter(pl.col("strength") == 0, pl.col("metric").is_in(["complied", "refused"]))
    verdicts = rows.filter(pl.col("analysis") == "verdicts", condition="strange")
    both = same.join(verdicts, on=["method", "lr_name", "seed", "step", "metric"])
    assert both.height == same.height and both["value"].equals(both["value_right"])


@pytest.mark.slow
def test_an_analysis_is_measured_of_every_model_and_seed_with_axes_of_its_own(rows):
    mine = rows.filter(analysis="mine", metric="norm")
    assert set(mine["part"]) == {"power 1", "power 2"} and set(mine["layer"]) == {0}
    assert set(mine["method"]) == {"pretrained", "mine", "sft"} and (mine["value"] > 0).all()
    assert set(mine["step"]) == {0, *set(rows.filter(analysis="verdicts")["step"])}


@pytest.mark.slow
def test_the_report_has_their_figures_tables_and_claims(run, main, capsys):
    page = (run / "report.html").read_text()
    # All figures are drawn here, and nothing is fetched.
    assert not re.search(r"<script|<link|<img|@import|src\s*=|url\((?!#)", page) and page.count("<path") > 50
    assert "Norms of mine" in page and "norm of mine" in page
    assert "The attack strange" in page and "signs 0.5" in page
    assert {path.stem for path in (run / "results" / "tables").iterdir()} >= {"mine", "strange", "causal"}
    assert main("claims", run) == 0
    told = capsys.readouterr().out
    assert "mean norm over layers" in told and "The norms of unsafe prompts are above zero." in page
    assert main("figure", "mine", run, "--out", run / "mine.svg") == 0
    assert (run / "mine.svg").read_text() in page


@pytest.mark.slow
def test_their_claims_are_judged_by_their_results(run):
    judged = {one.claim.name: one for one in claims_table.read(run).judgements}
    assert judged["mine_is_long"].verdict == "supported"
    assert set(judged["strange_breaks"].values) == set(judged["strange_in_table"].values) == {3, 5}
    assert len(judged) > len(OWN["claims"]) + 3


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "edits",
            {"edit": "tests.elsewhere.edit:EDIT", "amout": [1.0]},
            r"edits.x has no field 'amout': it has amount; d",
        ),
        (
            "edits",
            {"edit": "tests.elsewhere.edit:EDIT", "amount": [1.0, 0.5]},
            "edits.x: amount must be ascending numbers",
        ),
        (
            "edits",
            {"edit": "tests.elsewhere.edit:EDIT", "amount": [-1.0]},
            "edits.x: amount must be >= 0 and finite, got -1",
        ),
        (
            "attacks",
            {"attack": "tests.elsewhere.edit:EDIT"},
            "attack 'tests.elsewhere.edit:EDIT' is a Edit, expected a",
        ),
        (
            "edits",
            {"edit": "tests.elsewhere.test_elsewhere:BAD_ROLE"},
            "edit .* takes a model as 'harmful', expected base, tar",
        ),
        ("edits", {"edit": "tests.elsewhere.test_elsewhere:REQUIRED"}, "edits.x has no path, which has no default"),
        ("edits", {"edit": EDIT, "amount": []}, "amount must name at least one number, got none"),
        ("edits", {"edit": EDIT, "amount": ["a"]}, "amount must be a number, got 'a'"),
        ("attacks", {"attack": STRANGE, "conditions": ["unsafe"]}, "has prompts of its own: expected no conditions"),
        (
            "attacks",
            {},
            f"attacks.x has no attack: expected {', '.join(attacks.TABLE)}, or package",
        ),
        (
            "attacks",
            {"attack": "prefil"},
            f"unknown attack 'prefil': expected one of {', '.join(attacks.TABLE)}; did you mean",
        ),
        ("analyses", {"analysis": "nowhere:ANALYSIS"}, "there is no module 'nowhere' on the path of Python"),
        ("analyses", 3, "analyses.x must hold fields such as `analysis: verdicts`, got 3"),
    ],
)
def test_what_a_recipe_names_wrongly_is_one_sentence(place, value, message):
    with pytest.raises(ValueError, match=message):
        node(place, "x", value)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"attacks": {"mine": {"attack": "prefill"}}}, "'mine' is the label of something else already: choose"),
        ({"attacks": {"safe": {"attack": "prefill"}}}, "'safe' is the label of something else already"),
        ({"attacks": {"prefill": {"conditions": ["saf"]}}}, r"unknown condition in attacks.prefill.conditions 'saf'"),
        (
            {"attacks": {"prefill": {"on": ["mine.eta"]}}},
            r"unknown model or lane in attacks.prefill.on 'mine.eta': expected",
        ),
        (
            {"attacks": {"a/b": {"attack": "prefill"}}},
            "label of an edit, an attack or an analysis must be at most 64",
        ),
        (
            {"analyses": {"sensitivity": {"prompts": 5, "jacobian_prompts": 1}}},
            r"sensitivity.prompts must be at most analyze.pr",
        ),
        ({"analyze": {"ranks": [1]}}, "analyze.ranks is called edits.rank.rank"),
        ({"attacks": {"evaluate": {"attack": "prefill"}}}, "'evaluate' is the label of something else already"),
        ({"edits": {"mine": {"edit": "landscape"}}}, "'mine' is the label of something else already"),
        ({"analyses": {"causal": {"analysis": "verdicts"}}}, "'causal' is the label of something else already"),
        ({"analyses": {"clusters": {"analysis": "verdicts"}}}, "analyses.clusters is an analysis of ours, got analys"),
        ({"attacks": {"prefill": {"conditions": ["unsafe", "unsafe"]}}}, "prefill.conditions must be distinct, got"),
        ({"edits": {"x{y}": {"edit": EDIT}}}, "label of an edit, an attack or an analysis must be at most 64 letters"),
        ({"edits": {"deep": {"edit": "layer_part", "layer": [99]}}}, "edits.deep: layer: got 99, expected from 0 to 0"),
        ({"claims": ["jain2024", "jain2024"]}, "claims must have distinct names, got .* twice"),
        (
            {"claims": ["jain"]},
            "unknown claims 'jain': expected one of benign, .*, zhou2024; did you mean 'jain2024'",
        ),
        ({"edits": []}, r"edits: expected a mapping {name: value}, got \[\]"),
    ],
)
def test_what_a_recipe_cannot_have_is_one_sentence(recipe, tmp_path, own, message):
    path = tmp_path / "bad.yaml"
    content = yaml12.load(recipe.read_text())
    changed = {key: content[key] | value if key == "analyze" else value for key, value in own.items()}
    path.write_text(yaml12.dump(content | changed))
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(yaml_file.read(path), tmp_path)


def test_its_fields_are_read_from_it_alone(recipe):
    read = yaml_file.read(recipe, overrides=["--models.mine.pull", "0.25"])
    options = read.lanes_of("mine")[0].training.options
    assert (options.pull, options.keep, options.layer) == (0.25, 0.75, 0)
    assert yaml_file.parse(yaml_file.as_dict(read), where="again") == read
    with pytest.raises(ValueError, match=r"models.mine has no field 'pul': it has pull, layer, keep; did you"):
        trained({"method": NAME, "pul": 1.0}, owner="models.mine")
    with pytest.raises(ValueError, match=r"models.mine: layer must be >= 0 and finite, got -1"):
        trained({"method": NAME, "layer": -1}, owner="models.mine")


def test_a_grid_of_its_traced_fields_is_one_program_and_of_its_static_ones_several(recipe):
    def groups(field, values):
        read = yaml_file.read(recipe, overrides=[f"--models.mine.{field}", json.dumps(values)])
        return len(graph.groups(read.lanes_of("mine")))

    assert groups("pull", [0.1, 0.2, 0.3]) == 1
    assert groups("layer", [0, 1]) == 2


@pytest.mark.slow
def test_a_resumed_run_carries_what_it_carried(run, recipe, tmp_path):
    """The state beside the optimiser's is the checkpoint's: an earlier one ends in the same numbers."""
    from jaxsafety.cli import main as command

    copy = tmp_path / "copy"
    words = ["--out", str(copy)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main(["pretrain", str(recipe), *words]) == 0
        die_before_saving(lambda: command.main(["tune", str(recipe), *words]), "mine.eta_S", 6)
        assert "aux/safe" in _record(copy, "mine.eta_S")["types"]
        die_before_saving(lambda: command.main(["tune", str(recipe), *words]), "sft.eta_S", 6)
        assert not any(name.startswith("aux") for name in _record(copy, "sft.eta_S")["types"])
    kept, again = (_last(folder) for folder in (run, copy))
    assert kept == again and np.isfinite(list(kept.values())).all()
    for lane in ("mine.eta_M", "mine.eta_S"):
        assert _record(run, lane)["leaves"] == _record(copy, lane)["leaves"]


def _last(folder):
    rows = [row for row in metrics_file.read_metrics(folder) if row["method"] == "mine" and row["step"] == 6]
    return {(row["lr"], row["seed"], name): row[name] for row in rows for name in ("loss", "moved", "level")}


def test_the_draws_of_data_loss_and_start_are_each_their_own(key):
    seen = {}

    def drawn(name, key, value):
        seen[name] = np.asarray(jax.random.key_data(key)).tolist()
        return value

    def sums(model, params, batch, config, aux, *, key, progress):
        return {"loss": drawn("loss", key, (jnp.sum(params["x"]), jnp.float32(1)))}, {}

    method = elsewhere.METHOD._replace(
        totals=sums,
        reference=None,
        data=lambda batch, *, key, config: drawn("data", key, batch),
        init_aux=lambda params, *, key, config: drawn("start", key, jnp.zeros(3)),
        update_aux=None,
    )
    config, optimizer = elsewhere.Config(), optax.sgd(0.1)
    state = objective.init_state(method, {"x": jnp.ones(2)}, optimizer, config, key=key)
    step = objective.make_step(method, MODEL, optimizer, config, key=key, total_steps=3)
    first = keys.at_step(keys.stream(key, "method"), 0)
    state, _ = step(state, objective.prepared(method, MODEL, BATCH, config, reference=None, key=first))
    assert len({str(found) for found in seen.values()}) == 3
    # What a method carries may be an array, and zero.
    np.testing.assert_array_equal(state.aux, np.zeros(3))


@pytest.mark.parametrize("name", ["seed", "loss"])
def test_a_metric_with_the_name_of_a_label_is_refused(name):
    sums = {name: (jnp.float32(1), jnp.float32(1))}
    with pytest.raises(ValueError, match=f"a method has a metric '{name}', which every row of metrics has"):
        stepping.added({"term": (jnp.float32(1), jnp.float32(1))}, sums)


def test_a_field_with_the_name_of_a_nodes_is_refused():
    @dataclass(frozen=True)
    class Config:
        p_unsafe: float = 0.5

    with pytest.raises(ValueError, match="method 'x' has a field 'p_unsafe', which means something else beside it"):
        fields.check_apart(Config, ("method", "p_unsafe"), owner="method 'x'")


def test_a_method_that_trains_nothing_or_lacks_its_reference_is_refused(key):
    nothing = elsewhere.METHOD._replace(needs=lambda config: Needs(trained="blocks/mlp/upp"))
    with pytest.raises(ValueError, match=r"no parameter path matches 'blocks/mlp/upp', which the method trains"):
        objective.init_state(nothing, {"x": jnp.ones(2)}, optax.sgd(0.1), elsewhere.Config(), key=key)
    with pytest.raises(ValueError, match="reference: got None, expected the parameters"):
        method = elsewhere.METHOD._replace(data=None)
        objective.prepared(method, MODEL, BATCH, elsewhere.Config(), reference=None, key=key)
    assert stepping.is_trained("blocks/mlp/up_lora_a", "blocks/mlp/up")
