"""A method is one file and one name: somebody else's goes through the study, its curves, tables and report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

from jaxsafety import keys
from jaxsafety.models.adapter import adapted
from jaxsafety.recipe import cells, yaml_file
from jaxsafety.recipe.schema import method_config
from jaxsafety.rundir import checkpoint, metrics_file
from jaxsafety.training import objective, stepping
from jaxsafety.types import Batch, Needs, PreferenceBatch
from tests.methods import elsewhere

NAME = "tests.methods.elsewhere:METHOD"
MODEL = adapted(lambda params, tokens: params["x"][tokens], max_tokens=4)
SIDE = Batch(jnp.zeros((2, 3), int), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool))
BATCH = PreferenceBatch(SIDE, None, jnp.asarray([True, False]))


@pytest.fixture(scope="module")
def recipe(mini_yaml, tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "mini.yaml"
    text = mini_yaml.read_text()
    start, end = text.index("  methods:\n"), text.index("  optim:\n", text.index("  methods:\n"))
    own = "  methods:\n    mine: {method: " + repr(NAME) + ", pull: 0.5, keep: 0.75}\n    sft: {}\n"
    path.write_text(text[:start] + own + text[end:])
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    from jaxsafety.cli import main as command

    directory = tmp_path_factory.mktemp("elsewhere") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main(["run", str(recipe), "--out", str(directory)]) == 0
    return directory


def test_its_curves_have_the_terms_and_its_metrics(run):
    rows = [row for row in metrics_file.read_metrics(run) if row["method"] == "mine"]
    assert {row["step"] for row in rows} == {2, 4, 6}
    assert all({"loss/kept", "loss/pulled", "moved", "level", "finite"} <= row.keys() for row in rows)
    assert all(row["loss"] == pytest.approx(row["loss/kept"] + row["loss/pulled"], rel=1e-5) for row in rows)
    assert all(row["moved"] > 0 for row in rows if row["step"] == 6)


def test_what_it_carries_is_saved_with_the_state(run):
    assert "aux/safe" in _record(run, "mine")["types"]
    assert not any(name.startswith("aux") for name in _record(run, "sft")["types"])


def _record(run, label):
    folder = run / "checkpoints" / label
    return json.loads((folder / f"{checkpoint.latest(folder):08d}" / "digests.json").read_text())


def test_it_is_judged_analysed_and_reported_like_the_others(run):
    for name in ("evaluate", "analyze"):
        methods = set(pl.read_parquet(run / "results" / f"{name}.parquet")["method"])
        assert methods == {"pretrained", "mine", "sft"}
    assert "mine" in (run / "report.html").read_text()


def test_its_fields_are_read_from_it_alone(recipe):
    read = yaml_file.read(recipe, overrides=["--tune.methods.mine.pull", "0.25"])
    options = read.tune.methods["mine"].options
    assert (options.pull, options.keep, options.layer) == (0.25, 0.75, 0)
    assert yaml_file.parse(yaml_file.as_dict(read), where="again") == read
    with pytest.raises(ValueError, match=r"tune.methods.mine has no field 'pul': it has pull, layer, keep; did you"):
        method_config("mine", {"method": NAME, "pul": 1.0})
    with pytest.raises(ValueError, match=r"tune.methods.mine: layer must be >= 0 and finite, got -1"):
        method_config("mine", {"method": NAME, "layer": -1})


def test_a_grid_of_its_traced_fields_is_one_program_and_of_its_static_ones_several(recipe):
    def groups(field, values):
        words = ["--grid", json.dumps({f"tune.methods.mine.{field}": values})]
        return len(cells.groups(cells.expand(yaml_file.read(recipe, overrides=words))))

    assert groups("pull", [0.1, 0.2, 0.3]) == 1
    assert groups("layer", [0, 1]) == 2


def test_a_resumed_run_carries_what_it_carried(run, recipe, tmp_path):
    """The state beside the optimiser's is the checkpoint's: an earlier one ends in the same numbers."""
    import shutil

    from jaxsafety.cli import main as command

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "mine" / "00000006")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main(["tune", str(recipe), "--out", str(copy)]) == 0
    kept, again = (_last(folder) for folder in (run, copy))
    assert kept == again and np.isfinite(list(kept.values())).all()
    # Bit for bit: parameters, the optimiser's state, and what the method carries.
    leaves = [_record(folder, "mine")["leaves"] for folder in (run, copy)]
    assert leaves[0] == leaves[1] and "aux/safe" in leaves[0]


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


def test_a_method_that_trains_nothing_or_lacks_its_reference_is_refused(key):
    nothing = elsewhere.METHOD._replace(needs=lambda config: Needs(trained="blocks/mlp/upp"))
    with pytest.raises(ValueError, match=r"no parameter path matches 'blocks/mlp/upp', which the method trains"):
        objective.init_state(nothing, {"x": jnp.ones(2)}, optax.sgd(0.1), elsewhere.Config(), key=key)
    with pytest.raises(ValueError, match="reference: got None, expected the parameters"):
        method = elsewhere.METHOD._replace(data=None)
        objective.prepared(method, MODEL, BATCH, elsewhere.Config(), reference=None, key=key)
    assert stepping.is_trained("blocks/mlp/up_lora_a", "blocks/mlp/up")
