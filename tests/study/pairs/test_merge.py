"""Merges of two checkpoints: the arithmetic tensor by tensor, and a directory that is whole or not there."""

import json

import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.formats import hf
from jaxsafety.rundir import signals
from jaxsafety.study.pairs import merge, opened
from jaxsafety.study.pairs.merge import MergeConfig

ATOL = 2e-6


@pytest.fixture(scope="module")
def pair(checkpoints):
    return opened.open_pair(*checkpoints)


@pytest.fixture
def merged(pair, tmp_path):
    def run(*, dtype=None, **options):
        merge.write(pair, tmp_path / "merged", MergeConfig(**options, dtype=dtype))
        return tree.flatten(hf.load(tmp_path / "merged", dtype="float32")[1])

    return run


def sides(params):
    return tuple(tree.flatten(side) for side in params)


def test_beyond_the_tuned_model(merged, params):
    before, after = sides(params)
    for path, got in merged(alpha=1.5).items():
        np.testing.assert_allclose(got, before[path] + 1.5 * (after[path] - before[path]), atol=ATOL)


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_part_alone(merged, params, part):
    before, after = sides(params)
    for path, got in merged(alpha=-1.0, part=part).items():
        moved = path.startswith({"mlp": "blocks/mlp/", "attention": "blocks/attn/"}[part])
        np.testing.assert_allclose(got, before[path] - (after[path] - before[path]) * moved, atol=ATOL)


def null_projector(matrix, energy):
    _, values, right = np.linalg.svd(matrix)
    kept = right[: np.searchsorted(np.cumsum(values**2) / np.sum(values**2), energy) + 1]
    return np.eye(matrix.shape[1]) - kept.T @ kept


@pytest.mark.parametrize("rank", [None, 2])
def test_the_null_space_part(merged, params, rank):
    before, after = sides(params)
    for path, got in merged(alpha=2.0, part="null_space", energy=0.8, rank=rank).items():
        if not path.startswith("blocks/mlp/"):
            np.testing.assert_array_equal(got, before[path])
            continue
        for layer in range(3):
            base = np.asarray(before[path][layer], float)
            part = (after[path][layer] - base) @ null_projector(base, 0.8)
            if rank is not None:
                left, values, right = np.linalg.svd(part, full_matrices=False)
                part = left[:, :rank] * values[:rank] @ right[:rank]
            np.testing.assert_allclose(got[layer], base + 2 * part, atol=1e-5)


def test_leading_directions_of_every_matrix(merged, params):
    before, after = sides(params)
    for path, got in merged(alpha=1.0, rank=1).items():
        delta = np.asarray(after[path], float) - before[path]
        if path.startswith(("blocks/mlp/", "blocks/attn/")):
            left, values, right = np.linalg.svd(delta, full_matrices=False)
            delta = left[..., :1] * values[:, None, :1] @ right[:, :1]
        np.testing.assert_allclose(got, before[path] + delta, atol=1e-5)


def test_the_ends_are_the_checkpoints(merged, pair, params, tmp_path):
    """In the checkpoints' own 16 bits exactly: float32 holds the difference of two such numbers."""
    for name, side in zip(("b", "t"), params, strict=True):
        hf.save(tmp_path / name, side, pair.config, dtype="bfloat16")
    rounded = opened.open_pair(tmp_path / "b", tmp_path / "t")
    for alpha, name in ((0.0, "b"), (1.0, "t")):
        out = tmp_path / f"end{alpha}"
        merge.write(rounded, out, MergeConfig(alpha))
        assert (out / "model.safetensors").read_bytes() == (tmp_path / name / "model.safetensors").read_bytes()


def test_slices_are_put_together(merged, params, monkeypatch):
    monkeypatch.setattr(merge, "_SLICE", 100)
    before, after = sides(params)
    for path, got in merged(alpha=0.5).items():
        np.testing.assert_allclose(got, (before[path] + after[path]) / 2, atol=ATOL)


def test_configuration_and_tokenizer_are_the_tuned_models(merged, pair, tmp_path):
    merged(alpha=1.5, dtype="float16")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (pair.tuned.directory / name).read_bytes()


def test_nothing_is_left_of_a_merge_that_fails(pair, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "_streamed", fail)
    with pytest.raises(OSError, match="cannot write"):
        merge.write(pair, tmp_path / "merged", MergeConfig(1.5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"part": "null_space"}, {"rank": 2}])
def test_a_killed_merge_decomposes_nothing_twice(pair, tmp_path, monkeypatch, options):
    merge.write(pair, tmp_path / "whole", MergeConfig(1.5, **options, dtype="bfloat16"))
    decomposed = []
    real = merge._part

    def counted(*matrix):
        decomposed.append(None)
        return real(*matrix)

    def stop_after(count):
        seen = iter(range(count))

        def check(where):
            if next(seen, None) is None:
                raise signals.Stopped(15, where)

        return check

    counts = []
    for count in (14, 14, 1000):
        monkeypatch.setattr(signals, "check", stop_after(count))
        monkeypatch.setattr(merge, "_part", counted)
        decomposed.clear()
        if count < 1000:
            with pytest.raises(signals.Stopped):
                merge.write(pair, tmp_path / "merged", MergeConfig(1.5, **options, dtype="bfloat16"))
            assert not (tmp_path / "merged").exists()
            assert len([path for path in tmp_path.iterdir() if ".parts-" in path.name]) == 1
        else:
            merge.write(pair, tmp_path / "merged", MergeConfig(1.5, **options, dtype="bfloat16"))
        counts.append(len(decomposed))
    # The second try gets as far as the first without a decomposition.
    assert counts[1] < counts[0]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "merged"))
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "whole"]


def test_what_overflows_is_named(pair, tmp_path):
    with pytest.raises(ValueError, match=r"^(\w+|[\w/]+, layer \d+,) is not finite as float16"):
        merge.write(pair, tmp_path / "merged", MergeConfig(1e9, dtype="float16"))
    assert not list(tmp_path.iterdir())


def test_something_is_there(pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        merge.write(pair, tmp_path, MergeConfig(1.5))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"alpha": 1.0, "rank": 0}, "rank must be >= 1 and finite, got 0"),
        ({"alpha": 1.0, "energy": 2.0}, "energy must be > 0 and <= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)
