"""Edits of checkpoints: the arithmetic matrix by matrix, and a directory that is whole or not there."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsafety import edits, keys, tree
from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe import graph
from jaxsafety.rundir import signals
from jaxsafety.study import lanes
from jaxsafety.study.checkpoints import edited
from tests.study.checkpoints.conftest import CONFIG, save

ATOL = 2e-6
# Of a decomposition in float32 beside one in float64, and of another program of the same one.
DECOMPOSED, PROGRAM = 1e-5, 2e-6
MATRICES = ("blocks/mlp/", "blocks/attn/")


def node(edit, **fields):
    """An edit as a recipe writes it."""
    models = {"b": {"checkpoint": "b"}, "o": {"checkpoint": "o"}, "t": {"from": "b", "checkpoint": "t"}}
    roles = dict.fromkeys(set(edits.load(edit).roles) & {"other", "harmful", "aligned"}, "o")
    return graph.expand(models | {"e": {"from": "t", "edit": edit} | roles | fields})[-1].how


@pytest.mark.parametrize(
    ("how", "path", "least"),
    [
        # Two sides and what comes of them.
        (node("scaled", alpha=0.5), "blocks/mlp/up", 3 * 4 * 4096 * 14336),
        # A direction of an embedding is drawn whole.
        (node("landscape", alpha=0.5, direction=0), "unembed", 3 * 4 * 4096 * 128256),
    ],
)
def test_the_need_of_an_edit_is_that_of_its_largest_tensor(how, path, least):
    """At the shapes of eight billion parameters, of which nothing is read, and the same at any depth."""
    shape = LlamaConfig(128256, 8192, layers=32, heads=32, kv_heads=8, width=4096, mlp_width=14336, head_width=128)
    roles = edits.load(how.edit).roles
    found = edited.need(shape, how, roles)
    assert found[0] == path and least <= found[1] < 4 * least
    assert edited.need(replace(shape, layers=2), how, roles) == found


@pytest.fixture(scope="module")
def trees(checkpoints):
    base, tuned = (hf.open_checkpoint(place) for place in checkpoints)
    return {"target": tuned, "base": base}


@pytest.fixture
def write(trees, tmp_path):
    """Writes an edit, or goes on with it."""

    def run(how, *, sides=trees, name="edited", dtype="float32", seed=0):
        parts, key = tmp_path / f"{name} parts", keys.root(seed)
        edited.write(sides, tmp_path / name, how, dtype=dtype, parts=parts, key=key, name=name)
        return tmp_path / name

    return run


@pytest.fixture
def made(write):
    def run(edit, **fields):
        return loaded(write(node(edit, **fields)))

    return run


def loaded(directory):
    return tree.flatten(hf.load(directory, dtype="float32")[1])


def sides(params):
    return tuple(tree.flatten(side) for side in params)


def test_beyond_the_tuned_model(made, params):
    before, after = sides(params)
    for path, got in made("scaled", alpha=1.5).items():
        np.testing.assert_allclose(got, before[path] + 1.5 * (after[path] - before[path]), atol=ATOL)


@pytest.mark.parametrize(
    ("part", "paths"),
    [("mlp", "blocks/mlp/"), ("attention", "blocks/attn/"), ("mlp_matrices", "blocks/mlp/"), ("up", "blocks/mlp/up")],
)
def test_a_part_alone(made, params, part, paths):
    before, after = sides(params)
    for path, got in made("scaled", alpha=-1.0, part=part).items():
        moved = path.startswith(paths)
        np.testing.assert_allclose(got, before[path] - (after[path] - before[path]) * moved, atol=ATOL)


def null_projector(matrix, energy):
    _, values, right = np.linalg.svd(matrix)
    kept = right[: np.searchsorted(np.cumsum(values**2) / np.sum(values**2), energy) + 1]
    return np.eye(matrix.shape[1]) - kept.T @ kept


def null_part(base, tuned, energy):
    base = np.asarray(base, float)
    return (tuned - base) @ null_projector(base, energy)


def leading(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]


def test_the_null_space_part(made, params):
    before, after = sides(params)
    for path, got in made("space_part", energy=0.8, method="gram").items():
        if not path.startswith("blocks/mlp/"):
            np.testing.assert_array_equal(got, before[path])
            continue
        for layer in range(3):
            part = null_part(before[path][layer], after[path][layer], 0.8)
            np.testing.assert_allclose(got[layer], before[path][layer] + part, atol=DECOMPOSED)


@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_chain_of_edits_is_one_formula(main, checkpoints, params, tmp_path, rank):
    """As ``analyze merge`` writes it: a part, its leading directions, and how far."""
    words = ["--part", "null_space", "--energy", "0.8", "--alpha", "2", *(["--rank", rank] if rank else [])]
    assert main("analyze", "merge", *checkpoints, *words, "--out", tmp_path / "run") == 0
    made_ = sorted(path.name for path in (tmp_path / "run" / "models").iterdir())
    assert made_ == (["merged", "merged_1", "merged_2"] if rank else ["merged", "merged_1"])
    before, after = sides(params)
    for path, got in loaded(tmp_path / "run" / "models" / "merged" / "seed_0").items():
        if not path.startswith("blocks/mlp/"):
            np.testing.assert_array_equal(got, before[path])
            continue
        for layer in range(3):
            part = null_part(before[path][layer], after[path][layer], 0.8)
            part = part if rank is None else leading(part, rank)
            np.testing.assert_allclose(got[layer], before[path][layer] + 2 * part, atol=DECOMPOSED)


def test_leading_directions_of_every_matrix(made, params):
    before, after = sides(params)
    for path, got in made("rank_part", rank=1, method="gram").items():
        delta = np.asarray(after[path], float) - before[path]
        delta = leading(delta, 1) if path.startswith(MATRICES) else delta
        np.testing.assert_allclose(got, before[path] + delta, atol=DECOMPOSED)


@pytest.mark.parametrize(
    ("edit", "fields"),
    [
        ("scaled", {"alpha": 1.5, "part": "down"}),
        pytest.param("space_part", {"energy": 0.8}, marks=pytest.mark.slow),
        pytest.param("space_part", {"energy": 0.8, "keep": "all_but", "space": "range"}, marks=pytest.mark.slow),
        ("rank_part", {"rank": 2}),
    ],
)
def test_files_are_edited_as_a_whole_tree_in_memory(made, params, edit, fields):
    how = node(edit, **fields)
    given = {"base": params[0], "target": params[1]}
    run = jax.jit(lambda given: lanes.edited(how, given, point=how.point, key=keys.root(0)))
    whole = tree.flatten(jax.device_get(run(given)))
    for path, got in made(edit, **fields).items():
        np.testing.assert_allclose(got, whole[path], atol=PROGRAM, err_msg=path)


@pytest.mark.parametrize(
    ("edit", "fields"),
    [
        ("hdr", {"keep": 0.3, "scale": 0.5}),
        pytest.param("lox", {"rank": 2, "alpha": 0.5}, marks=pytest.mark.slow),
        pytest.param("safe_projection", {"threshold": 0.5}, marks=pytest.mark.slow),
        ("dare", {"drop": 0.5}),
        pytest.param("trim", {"keep": 0.3, "scale": 2.0}, marks=pytest.mark.slow),
        pytest.param("ties", {"keep": 0.5}, marks=pytest.mark.slow),
        pytest.param("transferred", {"alpha": -0.5}, marks=pytest.mark.slow),
    ],
)
def test_arithmetic_of_files_is_that_of_whole_trees(write, trees, params, tmp_path, monkeypatch, edit, fields):
    """Entries in their places and draws that are the same, though the embeddings are more than a slice."""
    monkeypatch.setattr(edited, "_SLICE", 1000)
    third = tree.label(params[0], lambda path, leaf: leaf + 1e-2 * np.sin(np.arange(leaf.size)).reshape(leaf.shape))
    how, other = node(edit, **fields), jax.tree.map(np.float32, third)
    third = hf.open_checkpoint(save(tmp_path / "other", other))
    roles = {"base": params[0], "target": params[1], "other": other, "harmful": other, "aligned": other}
    files = {role: trees.get(role, third) for role in how.load().roles}
    run = jax.jit(lambda given: lanes.edited(how, given, point=how.point, key=keys.root(3)))
    whole = tree.flatten(jax.device_get(run({role: roles[role] for role in files})))
    for path, got in loaded(write(how, sides=files, seed=3)).items():
        np.testing.assert_allclose(got, whole[path], atol=PROGRAM, err_msg=path)


@pytest.mark.slow
def test_a_random_space_is_that_of_its_layer_and_seed(write, params, tmp_path):
    """All layers have the same matrices here, so that what differs between them is drawn."""
    alike = [
        tree.label(one, lambda path, leaf: np.repeat(leaf[:1], 3, axis=0) if path.startswith("blocks/") else leaf)
        for one in params
    ]
    given = {role: hf.open_checkpoint(save(tmp_path / role, one)) for role, one in
             zip(("base", "target"), alike, strict=True)}  # fmt: skip
    how = node("space_part", space="random", energy=0.5)
    one, again, other = (
        loaded(write(how, sides=given, name=name, seed=seed)) for name, seed in (("one", 4), ("again", 4), ("other", 5))
    )
    known = loaded(write(node("space_part", space="range", energy=0.5), sides=given, name="known"))
    # A walk along what is drawn has its directions, however far.
    along = given | {"target": hf.open_checkpoint(tmp_path / "one")}
    far, farther = (loaded(write(node("scaled", alpha=alpha), sides=along, name=f"far{alpha}")) for alpha in (2.0, 3.0))
    for name in ("gate", "up", "down"):
        path = f"blocks/mlp/{name}"
        base = tree.flatten(alike[0])[path]
        np.testing.assert_array_equal(one[path], again[path])
        np.testing.assert_allclose(known[path][0], known[path][1], atol=PROGRAM)
        assert np.abs(one[path][0] - one[path][1]).max() > 0.01 * np.abs(one[path] - base).max()
        assert np.abs(one[path] - other[path]).max() > 0.01 * np.abs(one[path] - base).max()
        np.testing.assert_allclose((far[path] - base) / 2, (farther[path] - base) / 3, atol=PROGRAM)


def test_a_random_direction_is_as_long_as_every_tensor(write, params, monkeypatch):
    """Embeddings, too, which other edits take in slices."""
    monkeypatch.setattr(edited, "_SLICE", 100)
    far, start = {"alpha": -0.5, "beta": 0.25, "direction": 1}, tree.flatten(params[1])
    one, other = (loaded(write(node("landscape", **far), name=str(seed), seed=seed)) for seed in (4, 5))
    for path in start:
        for own, moved, again in zip(*((side[path] if path.startswith("blocks") else side[path][None])
                                       for side in (start, one, other)), strict=True):  # fmt: skip
            # Of norms nothing.
            expected = np.hypot(0.5, 0.25) * np.linalg.norm(own) * (own.ndim > 1)
            np.testing.assert_allclose(np.linalg.norm(moved - own), expected, rtol=DECOMPOSED)
            assert own.ndim == 1 or np.abs(moved - again).max() > 0.01 * np.abs(own).max()
    rows = one["embed"] - start["embed"]
    cosines = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(cosines).max() < 0.9  # no slice repeats another


def test_what_gram_does_not_resolve_is_decomposed_in_full(params, tmp_path):
    drawn = np.random.default_rng(0)
    left, right = (np.linalg.qr(drawn.normal(size=(size, 5)))[0] for size in (32, 48))
    hard = np.asarray(left * [1, 4e-3, 3e-3, 2e-3, 1e-3] @ right.T, np.float32)
    flat = tree.flatten(params[0])
    flat["blocks/mlp/up"] = np.concatenate([hard[None], flat["blocks/mlp/up"][1:]])
    given = {"target": hf.open_checkpoint(save(tmp_path / "t", params[1])),
             "base": hf.open_checkpoint(save(tmp_path / "b", tree.unflatten(flat)))}  # fmt: skip
    how, after = node("space_part", energy=1 - 1e-5, method="gram"), tree.flatten(params[1])["blocks/mlp/up"]
    matrix = {role: side.leaf("blocks/mlp/up", index=(slice(0, 1),), dtype="float32") for role, side in given.items()}
    assert np.isnan(edited._edited(given, how, "blocks/mlp/up", matrix, key=keys.root(0))).any()
    edit = edited.editor(given, how, dtype="float32", parts=tmp_path / "parts", key=keys.root(0))
    found = edit("blocks/mlp/up", 0)
    np.testing.assert_allclose(found, hard + null_part(hard, after[0], 1 - 1e-5), atol=DECOMPOSED)


def test_the_ends_are_the_checkpoints(write, params, tmp_path):
    """In the checkpoints' own 16 bits exactly: float32 holds the difference of two such numbers."""
    for name, side in zip(("b", "t"), params, strict=True):
        hf.save(tmp_path / name, side, CONFIG, dtype="bfloat16")
    rounded = {"base": hf.open_checkpoint(tmp_path / "b"), "target": hf.open_checkpoint(tmp_path / "t")}
    for alpha, name in ((0.0, "b"), (1.0, "t")):
        out = write(node("scaled", alpha=alpha), sides=rounded, name=f"end{alpha}", dtype="bfloat16")
        assert (out / "model.safetensors").read_bytes() == (tmp_path / name / "model.safetensors").read_bytes()
    here = write(node("landscape", alpha=0.0, beta=0.0), sides=rounded, name="here", dtype="bfloat16")
    assert (here / "model.safetensors").read_bytes() == (tmp_path / "t" / "model.safetensors").read_bytes()


def test_slices_are_put_together(made, params, monkeypatch):
    monkeypatch.setattr(edited, "_SLICE", 100)
    before, after = sides(params)
    for path, got in made("scaled", alpha=0.5).items():
        np.testing.assert_allclose(got, (before[path] + after[path]) / 2, atol=ATOL)


def test_configuration_and_tokenizer_are_the_targets(write, trees):
    out = write(node("scaled", alpha=1.5), dtype="float16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (trees["target"].directory / name).read_bytes()


@pytest.mark.parametrize(("edit", "fields"), [("scaled", {"alpha": (0.25, 0.75)}), ("rank_part", {"rank": (1, 3)})])
def test_edits_of_several_strengths_are_one_program(write, monkeypatch, edit, fields):
    compiled, real = [], programs.fitted
    monkeypatch.setattr(programs, "fitted", lambda *given, **more: compiled.append(None) or real(*given, **more))
    ((name, strengths),) = fields.items()
    edited._program.cache_clear()
    counts = []
    for strength in strengths:
        how = node(edit, **{name: strength}, role="defence" if counts else "model")
        write(how, name=str(strength))
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0


def test_nothing_is_left_of_an_edit_that_fails(write, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edited, "_streamed", fail)
    with pytest.raises(OSError, match="cannot write"):
        write(node("scaled", alpha=1.5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "fields"), [("space_part", {}), pytest.param("rank_part", {"rank": 2}, marks=pytest.mark.slow)]
)
def test_a_killed_edit_decomposes_nothing_twice(write, tmp_path, monkeypatch, edit, fields):
    how = node(edit, method="gram", **fields)
    write(how, name="whole", dtype="bfloat16")
    decomposed, real = [], edited._resolved

    def counted(trees, node, path, given, *, key, layer):
        decomposed.append((path, bytes(jax.random.key_data(key))))
        return real(trees, node, path, given, key=key, layer=layer)

    def stop_after(count):
        seen = iter(range(count))

        def check(where):
            if next(seen, None) is None:
                raise signals.Stopped(15, where)

        return check

    monkeypatch.setattr(edited, "_resolved", counted)
    counts = []
    for count in (14, 14, 1000):
        monkeypatch.setattr(signals, "check", stop_after(count))
        before = len(decomposed)
        if count < 1000:
            with pytest.raises(signals.Stopped, match=r"before blocks/[\w/]+ of layer \d"):
                write(how, dtype="bfloat16")
            assert not (tmp_path / "edited").exists() and list((tmp_path / "edited parts").iterdir())
        else:
            write(how, dtype="bfloat16")
        counts.append(len(decomposed) - before)
    # The second try gets as far as the first without a decomposition.
    assert counts[1] == 0 < counts[0] and len(set(decomposed)) == len(decomposed) == 21
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "edited"))
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited", "whole"]


@pytest.mark.parametrize(("edit", "fields"), [("scaled", {"alpha": 1e9}), ("rank_part", {"rank": 2})])
def test_what_overflows_is_named(write, trees, params, tmp_path, edit, fields):
    if edit == "rank_part":
        # Behind matrices that are kept, which a call that fails again needs no longer.
        flat = tree.flatten(params[1])
        far = tree.unflatten(flat | {"unembed": 1e9 * flat["unembed"]})
        trees = trees | {"target": hf.open_checkpoint(save(tmp_path / "far", far))}
    with pytest.raises(ValueError, match=r"^(\w+|[\w/]+, layer \d+,) is not finite as float16"):
        write(node(edit, **fields), sides=trees, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["far"])


def test_something_is_there(trees, tmp_path):
    (tmp_path / "file").write_text("mine")
    more = {"dtype": "float32", "parts": tmp_path / "parts", "key": keys.root(0), "name": "e"}
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        edited.write(trees, tmp_path, node("scaled", alpha=1.5), **more)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_matrix_that_does_not_fit_is_refused(write, monkeypatch, tmp_path):
    edited._program.cache_clear()
    monkeypatch.setattr(programs.memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match=r"the edit of [\w/]+ of \([\d, ]+\) needs .* GiB, and the device has"):
        write(node("scaled", alpha=1.5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "fields", "message"),
    [
        ("scaled", {"alpha": float("nan")}, "alpha must be finite, got nan"),
        ("rank_part", {"rank": 0}, "rank must be >= 1 and finite, got 0"),
        ("space_part", {"energy": 2.0}, "energy must be > 0 and <= 1"),
    ],
)
def test_bad_options(edit, fields, message):
    with pytest.raises(ValueError, match=f"models.e.*{message}"):
        node(edit, **fields)


def test_a_strength_is_no_part_of_the_program():
    one, other = node("scaled", alpha=0.5), node("scaled", alpha=0.7)
    assert edited._stripped(one) == edited._stripped(other) != edited._stripped(node("rank_part", rank=2))
