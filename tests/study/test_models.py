"""Models that are not trained: edits of others, the best of others, and lanes of other runs."""

import json
import math
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsafety.config import yaml12
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.models import Selected
from jaxsafety.recipe.schema import as_dict
from jaxsafety.rundir import checkpoint, manifest_file, metrics_file, status
from jaxsafety.study import pipeline, train
from jaxsafety.tree import flatten
from tests.disturbed import die_before_saving

RTOL = 1e-5
LENT = "lent.from=sft.eta_M"


@pytest.fixture(scope="module")
def recipe(graph):
    """Its models alone, to be changed."""
    return replace(graph, attacks={}, analyses={})


@pytest.fixture(scope="module")
def params(graph_run):
    names = [lane.name for lane in graph_run.recipe.lanes]
    found = jax.device_get(pipeline.load(graph_run, graph_run.recipe.lanes).params)
    return {name: jax.tree.map(lambda leaf, h=h: leaf[h], found) for h, name in enumerate(names)}


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=1e-7), one, other)


@pytest.mark.slow
def test_an_edited_model_is_the_edit_of_its_own_ancestors(params):
    for alpha in (0.5, 1.5):
        target, base = params["attacked.from=dpo.eta_M.prompts=2"], params["dpo.eta_M"]
        expected = jax.tree.map(lambda t, b, alpha=alpha: b + alpha * (t - b), target, base)
        close(params[f"half.from=attacked.from=dpo.eta_M.prompts=2.alpha={alpha}"], expected)
    lent = jax.tree.map(lambda s, d, b: s + (d - b), params["sft.eta_M"], params["dpo.eta_M"], params["pretrained"])
    close(params[LENT], lent)


@pytest.mark.slow
def test_an_adapter_moves_its_matrices_by_a_low_rank_and_nothing_else(params):
    for alpha in (1.0, 8.0):
        moved = jax.tree.map(np.subtract, params[f"adapted.from=dpo.eta_M.alpha={alpha}"], params["dpo.eta_M"])
        for path, leaf in flatten(moved).items():
            if path.endswith(("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")):
                ranks = np.linalg.matrix_rank(leaf, tol=1e-3 * np.abs(leaf).max())
                assert np.abs(leaf).max() > 0 and (ranks <= 2).all(), path
            else:
                assert not np.abs(leaf).any(), path


@pytest.mark.slow
def test_a_mask_keeps_parts_of_an_update(params):
    name = "attacked.from=sft.eta_M.prompts=2"
    base, target, found = (flatten(params[one]) for one in ("pretrained", name, f"masked.from={name}"))
    gates = []
    for path in base:
        delta = target[path] - base[path]
        # Of a row of which hardly anything was changed the quotient says nothing.
        told = np.abs(delta) > 1e-3
        gates.append(((found[path] - base[path])[told] / delta[told]).ravel())
    gates = np.concatenate(gates)
    # Two steps, of one and half of it, from gates that began half open: at most e^1.505 apart, and so from their mean.
    assert gates.min() > 0 and gates.max() < 4.6 and gates.std() > 0.1


@pytest.mark.slow
def test_a_masked_run_that_was_killed_ends_in_the_same_bits(graph_run, main, tmp_path):
    copy = shutil.copytree(graph_run.directory, tmp_path / "run")
    for folder in (copy / "checkpoints").glob("masked*"):
        shutil.rmtree(folder)
    name = "masked.from=attacked.from=sft.eta_M.prompts=2"
    die_before_saving(lambda: main("tune", copy), name, 2)
    record = json.loads((copy / "checkpoints" / name / "00000001" / "digests.json").read_text())
    assert record["types"]["params/blocks/mlp/up"].startswith("float32[2,1,16,1]") and "step" in record["types"]
    assert main("tune", copy) == 0
    for place in ("checkpoints", "snapshots"):
        kept = [where / place / name / ("00000002" if place == "checkpoints" else "00000001") / "digests.json"
                for where in (copy, graph_run.directory)]  # fmt: skip
        assert len({json.dumps(json.loads(path.read_text())["leaves"]) for path in kept}) == 1


@pytest.mark.slow
def test_the_worst_is_one_of_the_candidates_and_on_record(params, graph_run):
    told = manifest_file.read_manifest(graph_run.directory)["selected"]
    assert set(told) == {f"worst.from={label}.{rate}" for label in ("sft", "dpo") for rate in ("eta_M", "eta_S")}
    for name, chosen in told.items():
        assert chosen["model"].startswith(name.replace("worst", "attacked")) and 0 <= chosen["unsafe/complied"] <= 1
        jax.tree.map(np.testing.assert_array_equal, params[name], params[chosen["model"]])


@pytest.mark.slow
def test_what_is_not_trained_keeps_parameters_and_has_no_curve(graph_run, recipe):
    kept = [lane for lane in recipe.lanes if lane.training is None]
    assert {lane.label for lane in kept} == {"half", "lent", "worst"}
    assert all(checkpoint.steps(graph_run.leg(lane).checkpoints) == [0] for lane in kept)
    assert {row["method"] for row in metrics_file.read_metrics(graph_run.directory)} == {
        "pretrained", "sft", "dpo", "attacked", "again", "adapted", "masked"
    }  # fmt: skip
    (progress,) = status.read(graph_run.directory)
    assert progress.steps["half"] == (16, 16) and progress.steps["worst"] == (4, 4) and progress.steps["sft"] == (4, 4)


def test_models_of_one_generation_see_the_same_examples(recipe):
    more = {"from": ["worst", "half"], "method": "sft"}
    lanes = replace(recipe, models=recipe.models | {"more": more}).lanes
    generations = {lane.name: lane.generation for lane in lanes}
    assert generations["sft.eta_M"] == 1 and generations["attacked.from=sft.eta_M.prompts=2"] == 2
    # A selection is of its candidates' generation, an edit of its target's.
    assert (
        generations["worst.from=sft.eta_M"] == 2
        and generations["half.from=attacked.from=sft.eta_M.prompts=2.alpha=0.5"] == 2
    )
    assert generations["more.from=worst.from=sft.eta_M"] == 3
    assert generations["more.from=half.from=attacked.from=sft.eta_M.prompts=2.alpha=0.5"] == 3


@pytest.mark.slow
def test_a_lost_model_is_made_again_bit_for_bit(graph_run, main, tmp_path):
    copy = shutil.copytree(graph_run.directory, tmp_path / "run")
    lost = [copy / "checkpoints" / name for name in (LENT, "worst.from=sft.eta_M")]
    before = [(path / "00000000" / "digests.json").read_text() for path in lost]
    for path in lost:
        shutil.rmtree(path)
    assert main("tune", copy) == 0
    digests = [json.loads(text)["leaves"] for text in before]
    assert [json.loads((path / "00000000" / "digests.json").read_text())["leaves"] for path in lost] == digests


def test_the_study_is_read_back_as_it_was_written(recipe, tmp_path):
    (tmp_path / "mini.yaml").write_text(yaml_file.to_yaml(recipe))
    again = yaml_file.read(tmp_path / "mini.yaml")
    assert again == recipe and [lane.name for lane in again.lanes] == [lane.name for lane in recipe.lanes]


@pytest.fixture
def second(graph_run, recipe, tmp_path):
    """A recipe that reuses two lanes of the run, for one of its seeds."""
    where = {"run": str(graph_run.directory)}
    models = {
        "pretrained": {"from": where | {"model": "pretrained"}},
        "defended": {
            "from": where | {"model": ["sft.eta_M", LENT], "generation": 1},
            "role": "defence",
        },
        "more": {"from": "pretrained", "method": "sft", "steps": 2, "batch_size": 4},
    }
    return replace(recipe, name="second", models=models, seeds=(5,))


@pytest.mark.slow
def test_lanes_of_another_run_are_reused(second, params, main, tmp_path):
    path = tmp_path / "second.yaml"
    path.write_text(yaml_file.to_yaml(second))
    for verb in ("pretrain", "tune"):
        assert main(verb, path, "--out", tmp_path / "out") == 0
    ready = pipeline.prepare(second, tmp_path / "out")
    found = jax.device_get(pipeline.load(ready, second.lanes[:3]).params)
    for h, name in enumerate(("pretrained", "sft.eta_M", LENT)):
        own = jax.tree.map(lambda leaf, h=h: leaf[h, 0], found)
        jax.tree.map(np.testing.assert_array_equal, own, jax.tree.map(lambda leaf: leaf[1], params[name]))
    assert [lane.name for lane in second.lanes[1:3]] == [
        "defended.model=sft.eta_M",
        "defended.model=lent.from_sft.eta_M",
    ]
    assert manifest_file.read_manifest(tmp_path / "out")["reused"]["pretrained"]["model"] == "pretrained"
    # Once copied, the other run is not needed any more.
    gone = second.models["pretrained"]["from"] | {"run": str(tmp_path / "gone")}
    pipeline.prepare(replace(second, models=second.models | {"pretrained": {"from": gone}}), tmp_path / "out")


@pytest.mark.slow
def test_a_reused_model_may_begin_with_another_reused_one(second, params, tmp_path):
    first = second.models["pretrained"]
    own = first["from"] | {"model": {"high": "sft.eta_M", "low": "sft.eta_S"}, "parent": "pretrained"}
    models = {"pretrained": first, "sft": {"from": own}}
    study = replace(second, models=models)
    pretrained, *tuned = study.lanes
    assert [lane.name for lane in tuned] == ["sft.high", "sft.low"]
    assert all(lane.parent is pretrained and lane.generation == 1 and lane.stage == "tune" for lane in tuned)
    (tmp_path / "second.yaml").write_text(yaml_file.to_yaml(study))
    assert yaml_file.read(tmp_path / "second.yaml") == study
    ready = pipeline.prepare(study, tmp_path)
    for stage in ("pretrain", "tune"):
        train.train(ready, stage)
    found = jax.device_get(pipeline.load(ready, tuned[:1]).params)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda leaf: leaf[0, 0], found),
        jax.tree.map(lambda leaf: leaf[1], params["sft.eta_M"]),
    )
    for parent, message in (
        ("nobody", "unknown model in models.sft.from.parent 'nobody': expected one of pretrained"),
        (3, "models.sft.from.parent must be the name of a model, got 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(study, models={"pretrained": first, "sft": {"from": own | {"parent": parent}}})
    # One that it did not begin with there.
    models |= {
        "low": {"from": own | {"model": "sft.eta_S"}},
        "sft": {"from": own | {"model": "attacked.from=sft.eta_M.prompts=2", "parent": "low"}},
    }
    with pytest.raises(
        ValueError, match=re.escape("models.sft.from.parent: got low, expected a model that is sft.eta_M")
    ):
        pipeline.prepare(replace(study, models=models), tmp_path / "wrong")


@pytest.mark.slow
def test_harm_is_removed_by_any_models(second, tmp_path):
    """Told from the target's parent and from its root, of a twin of the harmful model."""
    where, named = {"run": second.models["pretrained"]["from"]["run"]}, {"task": 2, "harmful": 3}
    models = {"pretrained": second.models["pretrained"]}
    models |= {"sft": {"from": where | {"model": "sft.eta_M", "parent": "pretrained"}}}
    models |= {label: {"from": where | {"model": f"attacked.from=sft.eta_M.prompts={prompts}", "parent": "sft"}}
               for label, prompts in named.items()}  # fmt: skip
    healed = {"from": "task", "edit": "hdr", "harmful": "harmful"}
    models |= {
        "healed": healed | {"base": "parent", "keep": 1.0, "scale": [-0.5, 0.0, 0.3]},
        "from_root": healed | {"keep": 0.1, "scale": 2.0},
    }
    study = replace(second, models=models)
    (tmp_path / "study.yaml").write_text(yaml_file.to_yaml(study))
    assert yaml_file.read(tmp_path / "study.yaml") == study
    ready = pipeline.prepare(study, tmp_path)
    for stage in ("pretrain", "tune"):
        train.train(ready, stage)
    found = jax.device_get(pipeline.load(ready, study.lanes).params)
    made = {lane.name: jax.tree.map(lambda leaf, h=h: leaf[h, 0], found) for h, lane in enumerate(study.lanes)}
    task, harmful, base = made["task"], made["harmful"], made["sft"]
    for scale in (-0.5, 0.3):
        expected = jax.tree.map(lambda t, h, b, by=scale: t - by * (h - b), task, harmful, base)
        close(made[f"healed.scale={scale}"], expected)
    jax.tree.map(np.testing.assert_array_equal, made["healed.scale=0.0"], task)
    for path, leaf in flatten(jax.tree.map(np.subtract, task, made["from_root"])).items():
        harm, taken = flatten(harmful)[path] - flatten(made["pretrained"])[path], leaf != 0
        np.testing.assert_allclose(leaf[taken], 2 * harm[taken], rtol=1e-3, atol=1e-7, err_msg=path)
        assert 0 < taken.sum() <= max(1, round(0.1 * leaf.size)) and np.abs(harm[taken]).max() == np.abs(harm).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "sftt"},
            "unknown model in models.pretrained.from 'sftt': expected one of pretrained, sft.eta_M, sft.eta_S",
        ),
        ({"run": "nowhere"}, "models.pretrained.from: no run of a study in "),
        ({"model": "sft.eta_M"}, "models.pretrained.from.generation: got 0, expected the 1 of sft.eta_M"),
        ({"seeds": (5, 7)}, "has the seeds [3, 5], expected 7 among them"),
        ({"subject": {"world": "paper"}}, "models.pretrained.from: subject.world is 'tiny' in "),
        ({"width": 8}, "models.pretrained.from: subject.model.width is 16 in "),
    ],
)
def test_what_cannot_be_reused_is_one_sentence(second, change, message, tmp_path):
    source = second.models["pretrained"]["from"] | {name: change[name] for name in ("run", "model") if name in change}
    fields = {name: change[name] for name in ("seeds", "subject") if name in change}
    if "width" in change:
        told = as_dict(second.subject)
        fields["subject"] = told | {"model": told["model"] | {"width": change["width"]}}
    wrong = replace(second, models={"pretrained": {"from": source}}, **fields)
    with pytest.raises(ValueError) as caught:
        pipeline.prepare(wrong, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"from": "sft", "edit": "layer_part", "layer": 7}, "models.bad: layer: got 7, expected from 0 to 0"),
        (
            {"from": "sft", "method": "sft", "parametrisation": {"kind": "lora", "targets": ["gate"]}},
            "models.bad.parametrisation: targets of an adapter: got 'gate', expected of this model q, k, v, o",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(recipe, tmp_path, fields, message):
    with pytest.raises(ValueError) as caught:
        pipeline.prepare(replace(recipe, models=recipe.models | {"bad": fields}), tmp_path)
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_grammars_of_another_run_are_those_that_it_keeps(second, graph_run, tmp_path):
    """Not what lies now where they were read from."""
    grammar = "\n".join(["S -> A A [1.0]", "A -> 'a' 'b' 'c' 'd' 'e' 'f' 'g' 'h' 'a' 'b' 'c' 'd' [1.0]"])
    own, copy = tmp_path / "own.pcfg", shutil.copytree(graph_run.directory, tmp_path / "run")
    own.write_text(grammar)
    config = yaml12.read(copy / "config.yaml")
    config["subject"]["grammars"] = {"safe": str(tmp_path / "gone.pcfg")}
    (copy / "config.yaml").write_text(yaml12.dump(config))
    (copy / "world").mkdir()
    (copy / "world" / "safe.pcfg").write_text(grammar + "\n")
    models = {"old": {"from": {"run": str(copy), "model": "pretrained"}}}
    subject = as_dict(second.subject) | {"grammars": {"safe": str(own)}}
    with pytest.raises(ValueError, match=r"models.old.from: file safe.pcfg is '\w{8}' in .*, expected '\w{8}'"):
        pipeline.source(replace(graph_run, recipe=replace(second, models=models, subject=subject)),
                        replace(second, models=models).lanes[0])  # fmt: skip


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "b"),
        ({"largest": False}, "d"),
        ({"utility_drop": 0.05}, "c"),
        ({"utility_drop": 0.0}, "d"),
        ({"utility_drop": 0.0, "largest": False}, "d"),
    ],
)
def test_a_selection_keeps_to_its_bound(how, expected):
    measured = {"a": (math.nan, math.nan), "b": (0.9, 0.5), "c": (0.4, 0.05), "d": (0.2, 0.01)}
    assert train.select(Selected(("x",), **how), measured) == expected


def test_a_selection_is_by_something_there_is(mini_recipe):
    models = mini_recipe.models | {"best": {"select": "sft", "by": "unsfe/complied"}}
    with pytest.raises(ValueError, match=r"unknown condition in models\.best\.by 'unsfe': expected one of safe, u"):
        replace(mini_recipe, models=models)
    with pytest.raises(ValueError, match="by: got 'unsafe', expected CONDITION/RATE such as unsafe/complied"):
        Selected(("x",), by="unsafe")
    with pytest.raises(ValueError, match="unknown rate in by 'asr': expected one of complied, refused"):
        Selected(("x",), by="unsafe/asr")
