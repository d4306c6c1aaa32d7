"""Layer by layer over all prompts is the model in one go; a killed run goes on from the saved streams."""

import tracemalloc
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxsafety.formats import hf
from jaxsafety.models import llama
from jaxsafety.study.checkpoints import features, stream
from jaxsafety.study.checkpoints.batches import bucketed

# float32, other shapes of the same sums.
RTOL, ATOL = 1e-4, 1e-5


@pytest.fixture(scope="module")
def opened(checkpoints):
    return [hf.open_checkpoint(place) for place in checkpoints]


@pytest.fixture(scope="module")
def texts():
    drawn = np.random.default_rng(0)
    prompts = [drawn.integers(5, 400, length).tolist() for length in (3, 40, 17, 64, 31)]
    return prompts, [drawn.integers(5, 400, length).tolist() for length in (4, 0, 9, 1, 2)]


@pytest.fixture(scope="module")
def sides(opened, texts):
    batches = tuple(bucketed(texts[0], answers=texts[1], batch_tokens=128))
    assert len(batches) > 2
    return tuple(stream.Side(side, batches, "float32") for side in opened)


@pytest.fixture(scope="module")
def streamed(sides, tmp_path_factory):
    """Of both models: of every layer."""
    state = tmp_path_factory.mktemp("s") / "streams"
    return [[seen for _, seen in stream.layers(side, state=state)] for side in sides]


def test_activations_are_those_of_the_whole_model(streamed, sides, texts):
    for place, side in enumerate(sides):
        _, params = hf.load(side.checkpoint.directory, dtype="float32")
        tokens = np.zeros((5, 80), np.int32)
        for row, (prompt, answer) in enumerate(zip(*texts, strict=True)):
            tokens[row, : len(prompt + answer)] = prompt + answer
        run = partial(llama.apply, config=side.config, sites=features.SITES)
        found = {site: np.asarray(values) for site, values in jax.jit(run)(params, tokens).activations.items()}
        for row, (prompt, answer) in enumerate(zip(*texts, strict=True)):
            for site, values in found.items():
                for layer in range(3):
                    last, response = streamed[place][layer][site][:, row]
                    own = values[layer, row, : len(prompt + answer)]
                    np.testing.assert_allclose(last, own[len(prompt) - 1], rtol=RTOL, atol=ATOL)
                    mean = own[len(prompt) :].mean(axis=0) if answer else np.zeros_like(last)
                    np.testing.assert_allclose(response, mean, rtol=RTOL, atol=ATOL)


def test_layers_that_differ_are_run_as_what_they_are(another, texts, tmp_path):
    """Of a Gemma 3: windows and positions by layer, scaled embeddings."""
    gemma = {"norms": "both", "norm_offset": True, "activation": "gelu", "embed_scale": 32**0.5, "query_scalar": 8.0}
    gemma |= {"query_norm": "head", "window": 4, "windowed": (True, False, True), "local_rope": llama.Rope(50.0)}
    own = hf.open_checkpoint(another(**gemma))
    side = stream.Side(own, tuple(bucketed(texts[0][2:3], batch_tokens=128)), "float32")
    _, params = hf.load(own.directory, dtype="float32")
    run = jax.jit(partial(llama.apply, config=side.config, sites=features.SITES))
    whole = run(params, np.asarray(texts[0][2:3], np.int32)).activations
    for layer, seen in stream.layers(side, state=tmp_path / "streams"):
        for site, values in whole.items():
            np.testing.assert_allclose(seen[site][0, 0], values[layer, 0, -1], rtol=RTOL, atol=ATOL)


def test_without_answers_there_is_one_kind(opened, texts, tmp_path):
    side = stream.Side(opened[0], tuple(bucketed(texts[0], batch_tokens=128)), "float32")
    _, seen = next(iter(stream.layers(side, state=tmp_path / "streams")))
    assert seen["mlp.hook_in"].shape == (1, 5, 32) and seen["mlp.hook_post"].shape == (1, 5, 48)


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_run_goes_on_from_the_saved_streams(streamed, sides, tmp_path, killed_after):
    state = tmp_path / "streams"
    for side, whole in zip(sides, streamed, strict=True):
        for layer, _ in stream.layers(side, state=state):
            if layer == killed_after:
                break
        assert {path.name for path in state.iterdir()} <= {f"{killed_after}", f"{killed_after + 1}.unfinished"}
        rest = list(stream.layers(side, state=state))
        # What was yielded last may not have been written down: it comes again.
        assert [layer for layer, _ in rest] == list(range(killed_after, 3))
        for layer, seen in rest:
            for got, expected in zip(jax.tree.leaves(seen), jax.tree.leaves(whole[layer]), strict=True):
                np.testing.assert_array_equal(got, expected)
        assert not list(tmp_path.iterdir())


def test_memory_is_of_one_batch_whatever_their_number(sides, tmp_path):
    """In bytes of Python and NumPy."""
    few = max(sides[0].batches, key=lambda batch: batch.tokens.shape[1])
    many = tuple(replace(few, rows=len(few.rows) * place + np.arange(len(few.rows))) for place in range(400))
    size = 400 * few.tokens.size * sides[0].config.width * 4
    run = stream.layers(replace(sides[0], batches=many), state=tmp_path / "streams")
    next(run)
    tracemalloc.start()
    next(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4


def test_damaged_streams_are_named(sides, tmp_path):
    state = tmp_path / "streams"
    run = stream.layers(sides[0], state=state)
    next(run), next(run)
    for content in (b"", b"PK\x03\x04", b"nonsense"):
        (state / "1" / "0.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"streams is damaged: remove it and start again"):
            next(stream.layers(sides[0], state=state))


def test_a_full_disk_leaves_what_was_saved(streamed, sides, tmp_path, monkeypatch):
    state = tmp_path / "streams"
    run = stream.layers(sides[0], state=state)
    next(run)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"cannot write .*2.unfinished \(No space left on"),
    ):
        patch.setattr(stream.np, "save", fail)
        next(run)
    assert [path.name for path in state.iterdir()] == ["1"]
    rest = dict(stream.layers(sides[0], state=state))
    assert list(rest) == [1, 2]
    for got, expected in zip(jax.tree.leaves(rest[2]), jax.tree.leaves(streamed[0][2]), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_bfloat16_is_near(streamed, sides, tmp_path):
    for side, whole in zip(sides, streamed, strict=True):
        half = stream.Side(side.checkpoint, side.batches, "bfloat16")
        for layer, seen in stream.layers(half, state=tmp_path / "streams"):
            for got, expected in zip(jax.tree.leaves(seen), jax.tree.leaves(whole[layer]), strict=True):
                assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)
