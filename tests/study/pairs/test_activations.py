"""Activations of two checkpoints: rows with intervals over the prompts of a label, whole after any kill."""

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
from jaxsafety.rundir import signals
from jaxsafety.study.pairs import activations, opened, stream
from jaxsafety.study.pairs.activations import ActivationsConfig

COLUMNS = ["analysis", "method", "metric", "condition", "subset", "layer", "part", "strength", "value"]
ANSWERS = 4
# Student's t, 0.975 quantile at nine degrees of freedom.
T_9 = 2.26216


@pytest.fixture(scope="module")
def pair(checkpoints):
    return opened.open_pair(*checkpoints)


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return hf_tokenizer.open_tokenizer(checkpoints[1])


@pytest.fixture(scope="module")
def given():
    """Ten of every label."""
    return [one for label in sorted({one.label for one in prompts.own()})
            for one in [own for own in prompts.own() if own.label == label][:10]]  # fmt: skip


def read(out):
    return pl.read_parquet(out / "results" / "analyze.parquet").select(COLUMNS)


@pytest.fixture(scope="module")
def measured(pair, given, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("activations")
    config = ActivationsConfig(answers=ANSWERS, max_tokens=200)
    encoded = activations.write(pair, out, config, given, tokenizer)
    return read(out), encoded, out


def picked(frame, **labels):
    return frame.filter(pl.col(name).eq_missing(pl.lit(wanted)) for name, wanted in labels.items())


def test_separation_has_welch_intervals_over_the_prompts_of_both_classes(measured):
    frame, _, _ = measured
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


def test_a_mean_and_its_interval_are_those_of_the_prompts(measured, pair):
    frame, encoded, _ = measured
    _, params = hf.load(pair.tuned.directory, dtype="float32")
    lengths = np.array([len(ids) for ids in encoded.ids])
    mask = np.arange(128)[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded.ids)
    run = jax.jit(partial(llama.apply, config=pair.config, sites=("mlp.hook_in",), layers=(1,)))
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


def test_every_label_model_and_layer_has_its_rows(measured):
    frame = measured[0]
    labels = {"safe", "unsafe", "jailbreak:base64", "jailbreak:role_play"}
    taus = picked(frame, analysis="clusters", metric="cosine_tau", subset="all")
    assert set(taus["condition"]) == labels
    assert taus.height == 4 * 2 * 3 * 4  # labels, models, layers, kinds of activations at two sites
    assert set(taus["part"]) == {"last", "response", "last_post", "response_post"}
    gains = picked(frame, analysis="input_space", metric="gain", subset="all")
    assert set(gains["condition"]) == labels and set(gains["part"]) == {"gate", "up", "down"} and gains.height == 36
    for metric in ("accuracy", "energy", "leading_share"):
        assert picked(frame, metric=metric)["value"].is_between(0, 1).all()
    assert not frame.select(COLUMNS[:-1]).is_duplicated().any() and frame["value"].is_finite().all()


def test_verdicts_count_the_answers(measured, given):
    frame, _, out = measured
    answers = [line for line in (out / "results" / "answers.jsonl").read_text().split("\n")[:-1]]
    assert len(answers) == len(given)
    rates = picked(frame, analysis="verdicts", condition="unsafe")
    for method in ("pretrained", "tuned"):
        own = {row["metric"]: row["value"] for row in picked(rates, method=method).iter_rows(named=True)}
        assert own["complied"] + own["refused"] == pytest.approx(1)
        assert own["n_successful"] == round(10 * own["complied"])


def test_what_is_cut_is_said_and_counted(measured, pair, given, tokenizer, tmp_path, capsys):
    assert measured[1].truncated == 0
    config = ActivationsConfig(max_tokens=20)
    encoded = activations.write(pair, tmp_path, config, given, tokenizer)
    assert encoded.truncated == sum(len(tokenizer.prompt(one.messages)) > 20 for one in given) > 0
    assert f"{encoded.truncated} of {len(given)} prompts have more than 20 tokens" in capsys.readouterr().err


def test_raw_prompts_have_no_template(pair, given, checkpoints, tmp_path):
    raw = hf_tokenizer.open_tokenizer(checkpoints[1], raw=True)
    encoded = activations.write(pair, tmp_path, ActivationsConfig(template="raw"), given, raw)
    text = given[0].messages[0].content
    assert list(encoded.ids[0]) == raw.encoder.encode(text).ids


def test_a_run_ends_alike_wherever_it_was_stopped(measured, pair, given, tokenizer, tmp_path, monkeypatch):
    """In the answers of either model, and after a layer, with the streams saved or not."""
    config, places = ActivationsConfig(answers=ANSWERS, max_tokens=200), []
    for skipped, saved in ((0, 1e9), (3, 1e9), (1, 1e9), (1, -1.0), (0, -1.0)):
        monkeypatch.setattr(stream, "_SAVE_EVERY_S", saved)
        seen = itertools.count()

        def check(where, seen=seen, skipped=skipped):
            if next(seen) == skipped:
                places.append(where)
                raise signals.Stopped(15, where)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "check", check)
            with pytest.raises(signals.Stopped):
                activations.write(pair, tmp_path, config, given, tokenizer)
        assert not (tmp_path / "results" / "analyze.parquet").exists()
    assert {"batches" in place for place in places} == {True, False}, places
    activations.write(pair, tmp_path, config, given, tokenizer)
    assert read(tmp_path).equals(measured[0])


@pytest.mark.usefixtures("unchecked")
def test_bad_options():
    for options, message in (
        ({"max_tokens": 1}, "max_tokens must be >= 2 and finite, got 1"),
        ({"answers": -1}, "answers must be >= 0 and finite, got -1"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1 and finite, got 0"),
        ({"directions": 0}, "directions must be >= 1 and finite, got 0"),
        ({"template": "chta"}, "unknown template 'chta': expected one of chat, raw; did you mean 'chat'"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationsConfig(**options)
