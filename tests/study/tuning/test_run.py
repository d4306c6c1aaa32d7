"""A checkpoint tuned: the loss of the library, the same end wherever it was stopped, a model that is what was tuned."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import tree
from jaxsafety.cli import main
from jaxsafety.formats import hf, hf_tokenizer, prompts
from jaxsafety.methods import dpo, unlearn
from jaxsafety.models import llama
from jaxsafety.rundir import checkpoint, metrics_file, signals
from jaxsafety.study.tuning import examples, places, program, run
from jaxsafety.study.tuning.options import TuningConfig
from jaxsafety.study.tuning.places import Places
from tests.methods.bound import bound
from tests.study.pairs.conftest import CONFIG

LORA = TuningConfig("sft", steps=13, batch_size=4, accumulate=2, lora_rank=2, lr=1e-2, max_tokens=64)
# Sharded products sum in another order.
SHARDED = 1e-4


def forward(params, tokens):
    return llama.apply(params, tokens, config=CONFIG).logits


# On one device, as the command line runs on a CPU.
write = partial(run.write, places=Places(None))


@pytest.fixture(scope="module")
def opened(checkpoints):
    return hf.open_checkpoint(checkpoints[0])


@pytest.fixture(scope="module")
def rows():
    chosen = [prompt.messages[0].content for prompt in prompts.own()][::90][:8]
    return [{"prompt": prompt, "chosen": "I cannot.", "rejected": "Here it is."} for prompt in chosen]


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def encode(opened, file):
    def make(*, pairs=False):
        tokenizer = hf_tokenizer.open_tokenizer(opened.directory)
        return examples.encode(examples.read(file, pairs=pairs), tokenizer, max_tokens=64, vocab_size=400)

    return make


def numbers(directory):
    return [row["loss"] for row in metrics_file.read_metrics(directory)]


@pytest.fixture(scope="module")
def tuned(opened, encode, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuned")
    write(opened, encode(), directory, LORA)
    return directory


def test_an_adapter_learns_and_the_model_is_the_base_with_it(tuned, opened, encode):
    losses = numbers(tuned)
    assert [row["step"] for row in metrics_file.read_metrics(tuned)] == [10, 13] and losses[-1] < losses[0]
    _, before = hf.load(opened.directory, dtype="float32")
    _, after = hf.load(tuned / run.MODEL, dtype="float32")
    moved = {path for path, leaf in tree.flatten(after).items() if not np.array_equal(leaf, tree.flatten(before)[path])}
    assert moved == {path for path, leaf in tree.flatten(before).items() if leaf.ndim == 3}
    delta = np.asarray(after["blocks"]["attn"]["q"] - before["blocks"]["attn"]["q"])
    assert (np.linalg.matrix_rank(delta, tol=1e-5) == 2).all()
    value, _ = bound("sft", llama.model(CONFIG))(after, jax.tree.map(jnp.asarray, encode().batch))
    assert float(value) < losses[0]


def test_a_stopped_run_ends_as_an_undisturbed_one(tuned, opened, encode, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "asked", lambda: 15)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "check", lambda where: (_ for _ in ()).throw(signals.Stopped(15, where)))
        with pytest.raises(signals.Stopped, match="after step 10 of tune sft"):
            write(opened, encode(), tmp_path, LORA)
    assert not (tmp_path / run.MODEL).exists()
    write(opened, encode(), tmp_path, LORA)
    assert numbers(tmp_path) == numbers(tuned)
    one, other = (tree.flatten(hf.load(folder / run.MODEL, dtype="float32")[1]) for folder in (tmp_path, tuned))
    assert all(np.array_equal(leaf, other[path]) for path, leaf in one.items())


def test_steps_are_those_of_plain_adamw(opened, encode):
    config = TuningConfig("sft", steps=3, batch_size=8, lora_rank=None, lr=1e-3, warmup=0.0, max_tokens=64)
    _, params = hf.load(opened.directory, dtype="float32")
    state, frozen = program.start(params, config)
    data = jax.tree.map(jnp.asarray, encode().batch)
    state, metrics = jax.jit(program.chunk(CONFIG, config))(state, frozen, data, jnp.int32(1))
    loss = bound("sft", llama.model(CONFIG))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, data)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    # The first step of Adam moves every parameter by the rate, against its gradient's sign.
    moved = state.params["unembed"] - params["unembed"]
    large = jnp.abs(grads["unembed"]) > 1e-5
    np.testing.assert_allclose(moved[large], -1e-3 * jnp.sign(grads["unembed"])[large], rtol=2e-2)
    assert frozen == {} and optax.tree.norm(grads) > 0


def test_dpo_begins_at_log_2_and_references_are_read_once(opened, encode, tmp_path):
    config = replace(LORA, method="dpo", steps=2, lr=1e-6, options=dpo.Config())
    encoded = encode(pairs=True)
    write(opened, encoded, tmp_path, config)
    np.testing.assert_allclose(numbers(tmp_path), np.log(2), atol=1e-4)
    _, params = hf.load(opened.directory, dtype="float32")
    like = [
        jax.ShapeDtypeStruct(side.tokens.shape, jnp.float32) for side in (encoded.batch.chosen, encoded.batch.rejected)
    ]
    (chosen, _), _ = checkpoint.load(tmp_path / "references", like)
    logits = jax.nn.log_softmax(forward(params, jnp.asarray(encoded.batch.chosen.tokens)))
    expected = np.take_along_axis(np.asarray(logits), encoded.batch.chosen.targets[..., None], -1)[..., 0]
    mask = encoded.batch.chosen.mask
    np.testing.assert_allclose(np.asarray(chosen)[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_lost_references_are_not_made_of_a_model_that_has_moved(opened, encode, tmp_path, monkeypatch):
    config = replace(LORA, method="dpo", options=dpo.Config())
    with monkeypatch.context() as patch:
        patch.setattr(signals, "asked", lambda: 15)
        patch.setattr(signals, "check", stop_in_training)
        with pytest.raises(signals.Stopped):
            write(opened, encode(pairs=True), tmp_path, config)
    shutil.rmtree(tmp_path / "references")
    with pytest.raises(ValueError, match=r"references is missing, which training in .* went by"):
        write(opened, encode(pairs=True), tmp_path, config)


def stop_in_training(where):
    if "step" in where:
        raise signals.Stopped(15, where)


def test_unlearning_pushes_rejected_answers_away(opened, encode, tmp_path):
    config = replace(LORA, method="unlearn", steps=20, options=unlearn.Config(reduction="mean"))
    write(opened, encode(pairs=True), tmp_path, config)
    first, last = metrics_file.read_metrics(tmp_path)
    assert last["logps/rejected"] < first["logps/rejected"]


def test_bfloat16_keeps_a_float32_copy_of_what_is_tuned(opened, encode, tmp_path):
    config = replace(LORA, lora_rank=None, dtype="bfloat16", steps=1, lr=1e-6, warmup=0.0)
    write(opened, encode(), tmp_path, config)
    _, before = hf.load(opened.directory, dtype="float32")
    _, after = hf.load(tmp_path / run.MODEL, dtype="float32")
    moved = np.abs(np.asarray(after["unembed"] - before["unembed"]))
    # A step far below what bfloat16 resolves beside the parameter is not lost.
    assert 0 < moved.max() < 1e-5 and (moved > 0).mean() > 0.5


def test_several_devices_hold_parts_and_compute_the_same(opened, encode, tmp_path):
    several = places.local()
    config = replace(LORA, batch_size=8)
    shapes = run._shapes(CONFIG, encode(), config, several)
    assert shapes.frozen["blocks"]["mlp"]["up"].sharding.shard_shape((3, 32, 48)) == (3, 32, 12)
    full = run._shapes(CONFIG, encode(), replace(config, lora_rank=None), several)
    moments = jax.tree.leaves_with_path(full.state.opt_state)
    assert any(leaf.sharding.shard_shape(leaf.shape) == (3, 32, 12) for _, leaf in moments if leaf.shape == (3, 32, 48))
    for name in ("several", "one"):
        (tmp_path / name).mkdir()
    run.write(opened, encode(), tmp_path / "several", config, places=several)
    write(opened, encode(), tmp_path / "one", config)
    np.testing.assert_allclose(numbers(tmp_path / "several"), numbers(tmp_path / "one"), rtol=SHARDED)


def test_a_diverging_run_says_so(opened, encode, tmp_path):
    config = replace(LORA, lr=1e30, warmup=0.0)
    with pytest.raises(
        FloatingPointError, match="is not finite between steps 0 and 10: expected a lower learning rate"
    ):
        write(opened, encode(), tmp_path, config)


@pytest.fixture
def command(opened, file, monkeypatch):
    monkeypatch.setattr(main, "_configure_jax", lambda *_, **__: None)
    monkeypatch.setattr(places, "local", lambda: Places(None))

    def go(*words, start=opened.directory, data=file, out):
        given = ["tune", str(start), "--data", str(data), "--out", str(out), "--max_tokens", "64", *words]
        return main.main(given)

    return go


def test_the_command_says_what_it_needs_and_then_tunes(command, tmp_path, capsys):
    words = ("--method", "dpo", "--steps", "2", "--batch_size", "4", "--lora_rank", "2")
    assert command(*words, "--dry_run", out=tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "it fits into the" in said and not (tmp_path / "run").exists()
    assert command(*words, out=tmp_path / "run") == 0
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    assert command(*words, out=tmp_path / "run") == 0
    assert command(*words, "--lr", "1", out=tmp_path / "run") == 2
    assert "tuning.lr is 0.0001 there and 1.0 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "spo"), "method"),
        (("--method", "sft", "--accumulate", "3"), "accumulate: got 3, expected a divisor of batch_size 8"),
        (("--method", "sft", "--batch_size", "9"), "expected at most the 8 examples"),
        (("--method", "sft", "--lora_targets", "q,w"), "lora_targets"),
        (("--method", "pretrain"), "method: got pretrain, which learns from text, expected one that learns from pref"),
        (("--method", "sft", "--dtype", "float16"), "dtype"),
        (("--method", "sft", "--chunk_steps", "0"), "chunk_steps must be >= 1 and finite, got 0"),
        (("--method", "sft", "--epochs", "0"), "epochs must be > 0"),
        (("--method", "sft", "--lr", "-1"), "lr must be > 0 and finite, got -1.0"),
    ],
)
def test_bad_options_are_one_sentence(command, tmp_path, capsys, unchecked, words, message):
    assert command(*words, out=tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_no_model_is_taken_for_the_runs_own(command, opened, tmp_path, capsys):
    assert command("--method", "sft", out=opened.directory) == 2
    assert "is a model directory: choose another place for the run" in capsys.readouterr().err
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert command("--method", "sft", out=tmp_path / "run") == 2
    assert "no run has made it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_a_run_that_does_not_fit_leaves_nothing_in_the_way(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jaxsafety.engine.memory.available", lambda: 1000)
        assert command("--method", "sft", "--steps", "1", "--batch_size", "4", out=tmp_path / "run") == 2
    assert "GiB free" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert command("--method", "sft", "--steps", "1", "--batch_size", "2", out=tmp_path / "run") == 0


def test_a_directory_that_is_no_model_is_one_sentence(command, tmp_path, capsys):
    assert command("--method", "sft", start=tmp_path, out=tmp_path / "run") == 2
    assert "is not a model directory: expected one with a config.json, or the YAML file" in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_loaded(opened, encode, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxsafety.engine.memory.available", lambda: 1000)
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(ValueError, match=r"tuning with 2 sequences at a time needs .* GiB"):
        write(opened, encode(), tmp_path, LORA)


def test_the_adapter_depends_on_the_seed_alone(opened):
    _, params = hf.load(opened.directory, dtype="float32")
    one, other, same = (program.start(params, replace(LORA, seed=seed))[0].params for seed in (0, 1, 0))
    first, second, third = (state["blocks"]["attn"]["q_lora_a"] for state in (one, same, other))
    assert np.array_equal(first, second) and not np.array_equal(first, third)
