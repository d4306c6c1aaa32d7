"""Activations of a model: rows with intervals over the prompts of a label, whole after any kill."""

import itertools
import math
from functools import partial

import jax
import numpy as np
import polars as pl
import pytest

from jaxsafety.claims.intervals import t_quantile
from jaxsafety.formats import hf, hf_tokenizer, prompts
from jaxsafety.models import llama
from jaxsafety.recipe.schema import EvaluateConfig
from jaxsafety.rundir import signals
from jaxsafety.study.checkpoints import activations, batches, stream
from jaxsafety.study.checkpoints.activations import Config
from jaxsafety.subjects import checkpoint as subject
from tests.study.checkpoints.conftest import CONFIG, LABELS, VOCABULARY

COLUMNS = ["analysis", "method", "metric", "condition", "subset", "layer", "part", "strength", "value"]
# Student's t, 0.975 quantile at nine degrees of freedom.
T_9 = 2.26216


@pytest.fixture(scope="module")
def encoded(checkpoints):
    """Ten prompts of every label."""
    given = [one for label in sorted({one.label for one in prompts.own()})
             for one in [own for own in prompts.own() if own.label == label][:10]]  # fmt: skip
    tokenizer = hf_tokenizer.open_tokenizer(checkpoints[1])
    return batches.encode(given, tokenizer, max_tokens=128, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def answered(looked, encoded):
    """Returns a model with prompts and what stands for its answers: some of them comply."""
    drawn = np.random.default_rng(0)
    answers = [drawn.integers(5, VOCABULARY, length).tolist() for length in drawn.integers(0, 5, len(encoded.ids))]
    more = {
        "encoded": encoded,
        "answers": answers,
        "verdicts": tuple(("complied", "refused", "other")[i % 3] for i in range(len(answers))),
    }
    return lambda folder, **options: looked(folder, **more | options)


def read(folder):
    return pl.concat(pl.read_parquet(piece) for piece in sorted(folder.glob("*.parquet")))


@pytest.fixture(scope="module")
def measured(answered, tmp_path_factory):
    """Rows of the tuned model, and of the one that it was tuned from."""
    found = []
    for based in (True, False):
        folder = tmp_path_factory.mktemp("activations")
        activations.measure(answered(folder, based=based), Config())
        found.append(read(folder))
    return tuple(found)


def picked(frame, **labels):
    return frame.filter(pl.col(name).eq_missing(pl.lit(wanted)) for name, wanted in labels.items())


def test_separation_has_welch_intervals_over_the_prompts_of_both_classes(measured):
    frame = measured[0]
    where = {"analysis": "clusters", "method": "tuned", "condition": "", "layer": 1, "part": "last"}
    for metric in ("gap", "relative_gap", "accuracy"):
        value, low, high, n = (
            picked(frame, metric=metric + name, **where)["value"].item() for name in ("", "_low", "_high", "_n")
        )
        assert low < value < high and n == 20
    bars = {
        label: [
            picked(frame, metric=f"tau{name}", **where | {"condition": label, "subset": "all"})["value"].item()
            for name in ("_low", "_high")
        ]
        for label in ("safe", "unsafe")
    }
    errors = [(high - low) / 2 / T_9 for low, high in bars.values()]
    df = 9 * sum(error**2 for error in errors) ** 2 / sum(error**4 for error in errors)
    gap = [picked(frame, metric=f"gap{name}", **where)["value"].item() for name in ("_low", "_high")]
    assert gap[1] - gap[0] == pytest.approx(2 * t_quantile(df) * math.hypot(*errors), rel=1e-4)


def test_a_mean_and_its_interval_are_those_of_the_prompts(measured, encoded, checkpoints):
    frame = measured[0]
    _, params = hf.load(checkpoints[1], dtype="float32")
    lengths = np.array([len(ids) for ids in encoded.ids])
    mask = np.arange(128)[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded.ids)
    run = jax.jit(partial(llama.apply, config=CONFIG, sites=("mlp.hook_in",), layers=(1,)))
    _, seen = run(params, tokens, mask=mask, positions=lengths[:, None] - 1)
    last = np.asarray(seen["mlp.hook_in"][0, :, 0], float)
    taus = []
    for row in np.flatnonzero(encoded.of("unsafe")):
        other = encoded.folds != encoded.folds[row]
        safe, unsafe = (last[encoded.of(label) & other].mean(axis=0) for label in ("safe", "unsafe"))
        taus.append(np.linalg.norm(last[row] - unsafe) - np.linalg.norm(last[row] - safe))
    labels = {"analysis": "clusters", "method": "tuned", "condition": "unsafe", "subset": "all", "layer": 1,
              "part": "last"}  # fmt: skip
    found = {name: picked(frame, metric=f"tau{name}", **labels)["value"].item() for name in ("", "_low", "_high", "_n")}
    half = T_9 * np.std(taus, ddof=1) / math.sqrt(10)
    np.testing.assert_allclose(
        [found[""], found["_low"], found["_high"]],
        [np.mean(taus), np.mean(taus) - half, np.mean(taus) + half],
        rtol=1e-3,
        atol=1e-4,
    )
    assert found["_n"] == 10


def test_every_label_and_layer_has_its_rows(measured):
    labels = {"safe", "unsafe", "jailbreak:base64", "jailbreak:role_play"}
    for frame in measured:
        taus = picked(frame, analysis="clusters", metric="cosine_tau", subset="all")
        assert set(taus["condition"]) == labels
        assert taus.height == 4 * 3 * 4  # labels, layers, kinds of activations at two sites
        assert set(taus["part"]) == {"last", "response", "last_post", "response_post"}
        for metric in ("accuracy", "energy", "leading_share"):
            assert picked(frame, metric=metric)["value"].is_between(0, 1).all()
        assert not frame.select(COLUMNS[:-1]).is_duplicated().any() and frame["value"].is_finite().all()
    gains = picked(measured[0], analysis="input_space", metric="gain", subset="all")
    assert set(gains["condition"]) == labels and set(gains["part"]) == {"gate", "up", "down"} and gains.height == 36


def test_each_model_has_its_own_rows_and_the_first_no_update(measured):
    for frame, method in zip(measured, ("tuned", "pretrained"), strict=True):
        assert frame.select(*LABELS).unique().to_dicts() == [LABELS | {"method": method}]
    assert picked(measured[1], analysis="input_space").is_empty()
    ours, theirs = (picked(frame, metric="tau", condition="safe", subset="all")["value"] for frame in measured)
    assert len(ours) == len(theirs) and (ours != theirs).all()


def test_verdicts_count_the_answers(measured, answered, encoded, tmp_path):
    complied = answered(tmp_path).complied
    for frame in measured:
        for label in ("safe", "unsafe", "jailbreak:base64"):
            rates = picked(frame, analysis="verdicts", condition=label)
            own = dict(rates.select("metric", "value").rows())
            assert own["complied"] == pytest.approx(complied[encoded.of(label)].mean())
            assert own["complied"] + own["refused"] + own["other"] == pytest.approx(1)
            assert own["n_successful"] == round(10 * own["complied"]) and own["complied_n"] == 10


def test_successful_attacks_have_rows_of_their_own(measured, answered, encoded, tmp_path):
    complied = answered(tmp_path).complied
    where = {"analysis": "clusters", "layer": 1, "part": "last", "metric": "tau_n"}
    for label in ("unsafe", "jailbreak:role_play"):
        (count,) = picked(measured[0], condition=label, subset="successful", **where)["value"]
        assert 0 < count < 10 and count == complied[encoded.of(label)].sum()
    assert picked(measured[0], condition="safe", subset="successful").is_empty()


def test_without_answers_there_are_no_verdicts_and_no_responses(looked, encoded, tmp_path):
    activations.measure(looked(tmp_path, encoded=encoded), Config(directions=2))
    frame = read(tmp_path)
    assert set(frame["analysis"]) == {"clusters", "input_space"} and set(frame["subset"]) == {"all"}
    assert set(picked(frame, analysis="clusters")["part"]) == {"last", "last_post"}
    assert set(picked(frame, metric="projection")["strength"]) == {0.0, 1.0}
    assert (picked(frame, metric="energy_chance", part="down")["value"] == 2 / 48).all()


def test_a_run_ends_alike_wherever_it_was_stopped(measured, answered, tmp_path, monkeypatch):
    """After a layer; also behind the last one."""
    places, read_ = [], []
    monkeypatch.setattr(stream, "embedded", counted(stream.embedded, read_))
    for skipped in (0, 1, 1):
        seen = itertools.count()

        def check(where, seen=seen, skipped=skipped):
            if next(seen) == skipped:
                places.append(where)
                raise signals.Stopped(15, where)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "check", check)
            with pytest.raises(signals.Stopped):
                activations.measure(answered(tmp_path), Config())
        assert not (tmp_path / "verdicts.parquet").exists()
    assert places == [f"after layer {layer} of 3" for layer in (0, 1, 2)]
    activations.measure(answered(tmp_path), Config())
    # Streams that are there are gone on from.
    assert len(read_) == 2 and not (tmp_path / "streams").exists()
    assert read(tmp_path).equals(measured[0])


def counted(function, calls):
    def call(*given, **options):
        calls.append(None)
        return function(*given, **options)

    return call


def test_a_run_stopped_behind_its_last_layer_leaves_no_streams(measured, answered, tmp_path, monkeypatch):
    def check(where):
        if "layer 2" in where:
            raise signals.Stopped(15, where)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "check", check)
        with pytest.raises(signals.Stopped):
            activations.measure(answered(tmp_path), Config())
    activations.measure(answered(tmp_path), Config())
    assert not (tmp_path / "streams").exists() and read(tmp_path).equals(measured[0])


@pytest.mark.usefixtures("unchecked")
def test_bad_options():
    with pytest.raises(ValueError, match="directions must be >= 1 and finite, got 0"):
        Config(directions=0)
    for options, message in (
        ({"max_tokens": 1}, "max_tokens must be >= 2 and finite, got 1"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1 and finite, got 0"),
        ({"template": "chta"}, "unknown template 'chta': expected one of chat, raw; did you mean 'chat'"),
    ):
        with pytest.raises(ValueError, match=message):
            subject.Config("somewhere", **options)
    with pytest.raises(ValueError, match=r"evaluate.answers must be >= 0 and finite, got -1"):
        EvaluateConfig(answers=-1)
