"""A checkpoint trained: the loss of the library, the same end wherever it was stopped, a model with what was learnt."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import tree
from jaxsafety.engine import memory, programs
from jaxsafety.engine.legs import Leg
from jaxsafety.formats import hf, hf_tokenizer
from jaxsafety.models import llama
from jaxsafety.recipe import graph
from jaxsafety.rundir import checkpoint, metrics_file, signals
from jaxsafety.study.checkpoints import examples, export, job, places, program, references, tuned
from jaxsafety.study.checkpoints.places import Places
from jaxsafety.subjects import checkpoint as subject
from tests.methods.bound import bound
from tests.study.checkpoints.conftest import CONFIG, VOCABULARY

# Sharded products sum in another order.
SHARDED = 1e-4
ONE = Places(None)
# Those that take a batch in parts, beside the ones that tests of their own train.
_PARTED = (
    *("derta", "deep_alignment", "constrained_sft", "primal_dual", "ipo", "robust_dpo", "simpo", "npo", "simnpo"),
    *("graddiff", "rmu", "circuit_breakers", "adversarial"),
)


def made(method="sft", *, seed=0, about=None, **fields):
    """The job of a model as a recipe writes it, over a checkpoint."""
    about = subject.Config("somewhere", max_tokens=64, **(about or {}))
    small = {"steps": 13, "batch_size": 4, "accumulate": 2, "lr": 1e-2, "parametrisation": {"rank": 2}}
    models = subject.models(about, {"m": {"from": "pretrained", "method": method} | small | fields})
    return job.of_lane(graph.expand(models)[-1], about, seed)


def forward(params, tokens):
    return llama.apply(params, tokens, config=CONFIG).logits


@pytest.fixture(scope="module")
def opened(checkpoints):
    return hf.open_checkpoint(checkpoints[0])


@pytest.fixture(scope="module")
def encode(opened, pairs):
    def make(*, answers=1):
        tokenizer = hf_tokenizer.open_tokenizer(opened.directory)
        given = examples.read(pairs, pairs=answers == 2)[0]
        return examples.encode(given, tokenizer, max_tokens=64, vocab_size=VOCABULARY)

    return make


def work(directory, own):
    how = own.how
    leg = Leg(directory, "tune", "m", "m", "", how.lr, how.steps, how.chunk_steps)
    return tuned.Work("m seed 0", leg, directory / "checkpoints" / "m" / "seed_0", directory / "model", "float32")


@pytest.fixture(scope="module")
def write(opened, encode):
    """Trains on one device, as the command line does on a CPU, and returns the directory of the model."""

    def run(directory, own, *, start=opened, reference=None, places=ONE):
        encoded = encode(answers=1 + own.how.needs.rejected)
        directory.mkdir(exist_ok=True)
        more = {"places": places, "reference": reference or start}
        tuned.write(start, encoded, work(directory, own), own, **more)
        return directory / "model"

    return run


def numbers(directory):
    return [row["loss"] for row in metrics_file.read_metrics(directory)]


@pytest.fixture(scope="module")
def finished(write, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuned")
    write(directory, made())
    return directory


def stop_in_training(where):
    if "step" in where:
        raise signals.Stopped(15, where)


@pytest.fixture
def stopped(write, monkeypatch):
    """Trains until the first save."""

    def run(directory, own, **more):
        with monkeypatch.context() as patch:
            patch.setattr(signals, "asked", lambda: 15)
            patch.setattr(signals, "check", stop_in_training)
            with pytest.raises(signals.Stopped, match="after step 10 of tune m seed 0"):
                write(directory, own, **more)

    return run


def test_an_adapter_learns_and_the_model_is_the_base_with_it(finished, opened, encode):
    losses, rows = numbers(finished), metrics_file.read_metrics(finished)
    assert [row["step"] for row in rows] == [10, 13] and losses[-1] < losses[0]
    assert {(row["stage"], row["method"], row["lr"], row["seed"]) for row in rows} == {("tune", "m", 1e-2, 0)}
    _, before = hf.load(opened.directory, dtype="float32")
    _, after = hf.load(finished / "model", dtype="float32")
    moved = {path for path, leaf in tree.flatten(after).items() if not np.array_equal(leaf, tree.flatten(before)[path])}
    assert moved == {path for path, leaf in tree.flatten(before).items() if leaf.ndim == 3}
    delta = np.asarray(after["blocks"]["attn"]["q"] - before["blocks"]["attn"]["q"])
    assert (np.linalg.matrix_rank(delta, tol=1e-5) == 2).all()
    value, _ = bound("sft", llama.model(CONFIG))(after, jax.tree.map(jnp.asarray, encode().batch))
    assert float(value) < losses[0]


def test_nothing_but_the_model_is_kept(finished, opened):
    assert not work(finished, made()).state.exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (finished / "model" / name).read_bytes() == (opened.directory / name).read_bytes()


def test_a_stopped_run_ends_as_an_undisturbed_one(finished, stopped, write, tmp_path):
    stopped(tmp_path, made())
    assert not (tmp_path / "model").exists() and checkpoint.latest(work(tmp_path, made()).state) == 10
    write(tmp_path, made())
    assert numbers(tmp_path) == numbers(finished) and not work(tmp_path, made()).state.exists()
    one, other = (folder / "model" / "model.safetensors" for folder in (tmp_path, finished))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_seeds_rates_and_scales_share_one_program(write, tmp_path, monkeypatch):
    """And what of them goes into it has the bits of a program of its own."""
    compiled, real = [], programs.fitted

    def fitted(*given, what, **more):
        compiled.append(what)
        return real(*given, what=what, **more)

    monkeypatch.setattr(programs, "fitted", fitted)
    tuned._compiled.cache_clear()
    short = {"steps": 2, "chunk_steps": 1}
    last = made(seed=1, lr=1e-3, parametrisation={"rank": 2, "alpha": 5.0}, role="defence", **short)
    for name, own in (("a", made(**short)), ("b", made(seed=1, **short)), ("c", made(lr=1e-3, **short)), ("d", last)):
        write(tmp_path / name, own)
    assert compiled == ["training with 2 sequences at a time"]
    weights = {name: (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abcd"}
    assert len(set(weights.values())) == 4
    tuned._compiled.cache_clear()
    write(tmp_path / "alone", last)
    assert len(compiled) == 2 and numbers(tmp_path / "alone") == numbers(tmp_path / "d")
    assert (tmp_path / "alone" / "model" / "model.safetensors").read_bytes() == weights["d"]
    write(tmp_path / "longer", made(steps=3, chunk_steps=1))
    assert len(compiled) == 3


def test_steps_are_those_of_plain_adamw(opened, encode):
    full = {"parametrisation": {"kind": "full"}, "optim": {"warmup": 0.0}, "accumulate": 1}
    own = made(steps=3, batch_size=8, lr=1e-3, **full)
    _, params = hf.load(opened.directory, dtype="float32")
    state, frozen = program.start(params, own)
    data = jax.tree.map(jnp.asarray, encode().batch)
    state, metrics = jax.jit(program.chunk(CONFIG, own))(state, frozen, data, program.own(own), jnp.int32(1))
    loss = bound("sft", llama.model(CONFIG))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, data)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    # The first step of Adam moves every parameter by the rate, against its gradient's sign.
    moved = state.params["unembed"] - params["unembed"]
    large = jnp.abs(grads["unembed"]) > 1e-5
    np.testing.assert_allclose(moved[large], -1e-3 * jnp.sign(grads["unembed"])[large], rtol=2e-2)
    assert frozen == {} and optax.tree.norm(grads) > 0


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Where what a training has kept stands as it was when the model was written."""
    real = export.write

    def write(start, trained, directory, own, *, dtype):
        shutil.copytree(work(directory.parent, own).state, tmp_path / "kept", dirs_exist_ok=True)
        real(start, trained, directory, own, dtype=dtype)

    monkeypatch.setattr(export, "write", write)
    return tmp_path / "kept"


def check_reference(folder, directory, batch):
    """Checks that what is kept there of chosen answers are the likelihoods that a checkpoint gives them."""
    _, params = hf.load(directory, dtype="float32")
    like = [jax.ShapeDtypeStruct(side.tokens.shape, jnp.float32) for side in (batch.chosen, batch.rejected)]
    (chosen, _), _ = checkpoint.load(folder / "references", like)
    logits = jax.nn.log_softmax(forward(params, jnp.asarray(batch.chosen.tokens)))
    expected = np.take_along_axis(np.asarray(logits), batch.chosen.targets[..., None], -1)[..., 0]
    mask = batch.chosen.mask
    np.testing.assert_allclose(np.asarray(chosen)[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_dpo_begins_at_log_2_and_references_are_read_once(opened, encode, write, kept, tmp_path):
    write(tmp_path, made("dpo", steps=2, lr=1e-6))
    np.testing.assert_allclose(numbers(tmp_path), np.log(2), atol=1e-4)
    check_reference(kept, opened.directory, encode(answers=2).batch)


@pytest.mark.slow
def test_a_reference_may_be_another_model_than_the_first(
    checkpoints, opened, encode, stopped, write, kept, tmp_path, monkeypatch
):
    """Such as the root of what training begins with; it is read before the first step, and not again."""
    own, start, read = made("dpo"), hf.open_checkpoint(checkpoints[1]), []
    real = references._read
    monkeypatch.setattr(references, "_read", lambda *given, **more: read.append(None) or real(*given, **more))
    stopped(tmp_path, own, start=start, reference=opened)
    write(tmp_path, own, start=start, reference=opened)
    assert len(read) == 1 and abs(numbers(tmp_path)[0] - np.log(2)) > 1e-3
    check_reference(kept, opened.directory, encode(answers=2).batch)
    _, before = hf.load(start.directory, dtype="float32")
    _, after = hf.load(tmp_path / "model", dtype="float32")
    np.testing.assert_array_equal(after["embed"], before["embed"])


@pytest.mark.slow
def test_lost_references_are_not_made_of_a_model_that_has_moved(write, stopped, tmp_path):
    own = made("dpo")
    stopped(tmp_path, own)
    shutil.rmtree(work(tmp_path, own).state / "references")
    with pytest.raises(ValueError, match=r"references is missing, which training in .* went by"):
        write(tmp_path, own)


@pytest.mark.slow
def test_lost_references_of_another_model_are_read_again(checkpoints, write, opened, stopped, tmp_path):
    own, start = made("dpo"), hf.open_checkpoint(checkpoints[1])
    for name in ("torn", "whole"):
        stopped(tmp_path / name, own, start=start, reference=opened)
        if name == "torn":
            shutil.rmtree(work(tmp_path / name, own).state / "references")
        write(tmp_path / name, own, start=start, reference=opened)
    assert numbers(tmp_path / "torn") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_unlearning_pushes_rejected_answers_away(write, tmp_path):
    write(tmp_path, made("unlearn", steps=20, reduction="mean"))
    first, last = metrics_file.read_metrics(tmp_path)
    assert last["logps/rejected"] < first["logps/rejected"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in (*_PARTED, "tamper_resistant")),
        *((name, {"retain": "kl"}) for name in ("npo", "graddiff")),
    ],
)
def test_what_is_transformed_or_held_is_learned_too(opened, encode, tmp_path, method, options):
    own = made(method, accumulate=1 + (method in _PARTED), **options)
    encoded = encode(answers=1 + own.how.needs.rejected)
    labelled = replace(encoded, batch=encoded.batch.replace(unsafe=np.arange(encoded.count) % 2 > 0))
    tuned.write(opened, labelled, work(tmp_path, own), own, places=ONE, reference=opened)
    rows = metrics_file.read_metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] and not labelled.batch.aligned


@pytest.mark.slow
def test_bfloat16_keeps_a_float32_copy_of_what_is_tuned(opened, write, tmp_path):
    full = {"parametrisation": {"kind": "full"}, "optim": {"warmup": 0.0}}
    write(tmp_path, made(about={"dtype": "bfloat16"}, steps=1, lr=1e-6, **full))
    _, before = hf.load(opened.directory, dtype="float32")
    _, after = hf.load(tmp_path / "model", dtype="float32")
    moved = np.abs(np.asarray(after["unembed"] - before["unembed"]))
    # A step far below what bfloat16 resolves beside the parameter is not lost.
    assert 0 < moved.max() < 1e-5 and (moved > 0).mean() > 0.5


def test_activations_stored_in_bfloat16_are_the_models_that_is_tuned(opened):
    """Rows of the residual stream, which are float32 where products alone are rounded."""

    def computed(**about):
        own = made(about={"dtype": "bfloat16", **about})
        _, params = hf.load(opened.directory, dtype="bfloat16")
        state, frozen = program.start(params, own)
        model = program.tuned_model(CONFIG, own, frozen, program.own(own).point)
        text = str(jax.make_jaxpr(model.apply)(state.params, jnp.zeros((1, 7), jnp.int32)))
        return f"bf16[7,{CONFIG.width}]" in text

    assert computed(stored_dtype="bfloat16") and not computed()


def test_all_parameters_are_trained_and_go_on_from_a_stop(opened, write, stopped, tmp_path):
    own = made(parametrisation={"kind": "full"}, lr=1e-3)
    assert own.is_full and own.scale == 1
    stopped(tmp_path / "torn", own)
    for name in ("torn", "whole"):
        write(tmp_path / name, own)
    losses = numbers(tmp_path / "whole")
    assert losses == numbers(tmp_path / "torn") and losses[-1] < losses[0]
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("torn", "whole"))
    assert one.read_bytes() == other.read_bytes()
    before, after = (tree.flatten(hf.load(place, dtype="float32")[1]) for place in (opened.directory, one.parent))
    assert not any(np.array_equal(leaf, after[path]) for path, leaf in before.items())


@pytest.mark.slow
def test_several_devices_hold_parts_and_compute_the_same(encode, write, tmp_path):
    several = places.local()
    own, full = (made(batch_size=8, **more) for more in ({}, {"parametrisation": {"kind": "full"}}))
    shapes = tuned._shapes(CONFIG, encode(), own, several)
    assert shapes.frozen["blocks"]["mlp"]["up"].sharding.shard_shape((3, 32, 48)) == (3, 32, 12)
    moments = jax.tree.leaves_with_path(tuned._shapes(CONFIG, encode(), full, several).state.opt_state)
    assert any(leaf.sharding.shard_shape(leaf.shape) == (3, 32, 12) for _, leaf in moments if leaf.shape == (3, 32, 48))
    write(tmp_path / "several", own, places=several)
    write(tmp_path / "one", own)
    np.testing.assert_allclose(numbers(tmp_path / "several"), numbers(tmp_path / "one"), rtol=SHARDED)


@pytest.mark.slow
def test_a_diverging_run_says_so(write, tmp_path):
    message = r"m seed 0: .* is not finite between steps 0 and 10: expected a lower learning rate than 1e\+30"
    with pytest.raises(FloatingPointError, match=message):
        write(tmp_path, made(lr=1e30, optim={"warmup": 0.0}))


def test_too_little_memory_is_said_before_anything_is_loaded(write, tmp_path, monkeypatch):
    tuned._compiled.cache_clear()
    monkeypatch.setattr("jaxsafety.engine.memory.available", lambda: 1000)
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(ValueError, match=r"training with 2 sequences at a time needs .* GiB"):
        write(tmp_path, made())
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_what_is_trained_and_what_it_takes(encode, monkeypatch):
    monkeypatch.setattr(hf, "load", None)
    own, full = (made(**more) for more in ({}, {"parametrisation": {"kind": "full"}}))
    plan, whole = (tuned.plan(CONFIG, encode(), one, places=ONE) for one in (own, full))
    factors = 2 * 3 * (3 * (32 + 48) + 2 * (32 + 32) + 2 * (32 + 16))  # rank, layers, mlp, q and o, k and v
    assert plan.trained == factors and whole.trained == whole.parameters == plan.parameters
    assert plan.frozen_bytes == 4 * plan.parameters and whole.frozen_bytes == 0
    # Parameters and two moments, and a few scalars.
    assert 0 <= whole.state_bytes - 12 * whole.parameters < 100 and plan.step_bytes > 0


def test_the_adapter_depends_on_the_seed_alone(opened):
    _, params = hf.load(opened.directory, dtype="float32")
    one, other, same = (program.start(params, made(seed=seed))[0].params for seed in (0, 1, 0))
    first, second, third = (state["blocks"]["attn"]["q_lora_a"] for state in (one, same, other))
    assert np.array_equal(first, second) and not np.array_equal(first, third)


def test_models_of_one_generation_see_the_same_examples():
    one = made(seed=3)
    other, later, again = (replace(one, **more) for more in ({"seed": 4}, {"generation": 2}, {"how": made("dpo").how}))
    streams = [bytes(jax.random.key_data(own.stream)) for own in (one, other, later, again)]
    assert streams[3] == streams[0] and len(set(streams)) == 3


@pytest.fixture
def command(opened, pairs, main, monkeypatch, undrawn):
    monkeypatch.setattr(places, "local", lambda: ONE)

    def go(*words, start=opened.directory, data=pairs, out):
        return main("tune", start, "--data", data, "--out", out, "--max_tokens", "64", *words)

    return go


def test_a_dry_run_of_what_does_not_fit_says_so_and_exits_with_1(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    words = ("--method", "dpo", "--steps", "2", "--batch_size", "4", "--lora_rank", "2")
    assert command(*words, "--dry_run", out=tmp_path / "run") == 1
    assert "it does not fit into the 0.00 GiB that are free" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_needs_and_then_tunes(command, tmp_path, capsys):
    words = ("--method", "dpo", "--steps", "2", "--batch_size", "4", "--lora_rank", "2")
    assert command(*words, "--dry_run", out=tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "it fits into the" in said and not (tmp_path / "run").exists()
    assert command(*words, out=tmp_path / "run") == 0
    model = tmp_path / "run" / "models" / "tuned" / "seed_0"
    assert (model / "tokenizer.json").exists() and str(model) in capsys.readouterr().out
    assert command(*words, out=tmp_path / "run") == 0
    assert command(*words, "--lr", "1", out=tmp_path / "run") == 2
    assert "models.tuned.lr is 0.0001 there and 1.0 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "spo"), "unknown method 'spo'"),
        (("--method", "sft", "--accumulate", "3"), "accumulate: got 3, expected a divisor of batch_size 8"),
        (("--method", "sft", "--batch_size", "9"), "expected at most the 8 examples"),
        (("--method", "sft", "--lora_targets", "q,w"), "unknown target of an adapter 'w'"),
        (("--method", "pretrain"), "method: 'pretrain' learns from text, expected one that learns from preferences"),
        (("--method", "sft", "--dtype", "float16"), "unknown dtype 'float16'"),
        (("--method", "sft", "--chunk_steps", "0"), "chunk_steps must be > 0 and finite, got 0"),
        (("--method", "sft", "--epochs", "0"), "epochs must be > 0"),
        (("--method", "sft", "--lr", "-1"), "lr must be > 0 and finite, got -1.0"),
        (("--method", "sft", "--seeds", "0,0"), "seeds must be distinct"),
        (("--method", "sft", "--bata", "3"), "unknown option --bata"),
    ],
)
def test_bad_options_are_one_sentence(command, tmp_path, capsys, unchecked, words, message):
    assert command(*words, out=tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_no_model_is_taken_for_the_runs_own(command, opened, tmp_path, capsys):
    assert command("--method", "sft", out=opened.directory) == 2
    assert "is a model directory: choose another place for the run" in capsys.readouterr().err
    (tmp_path / "run" / "models" / "tuned" / "seed_0").mkdir(parents=True)
    assert command("--method", "sft", out=tmp_path / "run") == 2
    assert "no run has made it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["models"]


@pytest.mark.slow
def test_a_run_that_does_not_fit_leaves_nothing_in_the_way(command, tmp_path, capsys, monkeypatch):
    tuned._compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("jaxsafety.engine.memory.available", lambda: 1000)
        assert command("--method", "sft", "--steps", "1", "--batch_size", "4", out=tmp_path / "run") == 2
    assert "GiB free" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert command("--method", "sft", "--steps", "1", "--batch_size", "2", out=tmp_path / "run") == 0


def test_a_directory_that_is_no_model_is_one_sentence(command, tmp_path, capsys):
    assert command("--method", "sft", start=tmp_path, out=tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "holds no config.json: expected a Hugging Face checkpoint" in error and error.count("\n") == 1
