"""Weights of checkpoints of any kind, by the names of their tensors."""

import json
import re

import numpy as np
import polars as pl
import pytest
import safetensors.numpy

from jaxsafety.formats import hf, safetensors_file
from jaxsafety.study.checkpoints import opened, pairs, weights
from jaxsafety.study.checkpoints.opened import Looked
from jaxsafety.subjects.checkpoint import Config
from tests.study.checkpoints.conftest import LABELS

# float32 beside float64.
TOLERANCE = 1e-4
UP, FUSED, HEAD, TABLE = "h.0.mlp.c_fc.weight", "h.0.attn.c_attn.weight", "lm_head.weight", "wte.weight"


@pytest.fixture(scope="module")
def drawn():
    """Tensors of a made-up model and of what it became, whose vocabulary has grown."""
    rng = np.random.default_rng(0)

    def tensors(tokens, **more):
        shapes = {UP: (6, 8), FUSED: (6, 8), HEAD: (tokens, 6), TABLE: (tokens, 6), "h.0.ln.weight": (6,)}
        shapes |= {"h.1.moe.experts": (2, 6, 6), "h.1.mlp.c_fc.weight": (6, 8)} | more
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return tensors(8, odd=(5, 5), one_more=(4, 4)), tensors(12, odd=(5, 4))


@pytest.fixture(scope="module")
def folders(drawn, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    for name, tensors, size in zip(("base", "tuned"), drawn, (8, 12), strict=True):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"model_type": "novel", "vocab_size": size}))
        safetensors.numpy.save_file(tensors, root / name / "model.safetensors")
    return root / "base", root / "tuned"


@pytest.fixture(scope="module")
def sides(folders):
    return [hf.open_tensors(place) for place in folders]


def test_what_is_compared_and_why_the_rest_is_not(sides, folders):
    found = {pair.name: pair for pair in pairs.find(*sides)}
    assert {name for name, pair in found.items() if not pair.left_out} == {
        UP, FUSED, HEAD, TABLE, "h.1.mlp.c_fc.weight"
    }  # fmt: skip
    reasons = {name: pair.left_out for name, pair in found.items() if pair.left_out}
    assert reasons == {
        "h.0.ln.weight": "a vector", "h.1.moe.experts": "3 axes", "odd": "of different shapes",
        "one_more": f"in {folders[0]} alone",
    }  # fmt: skip
    places = {name: (pair.layer, pair.part) for name, pair in found.items()}
    assert places[UP] == (0, "up") and places[FUSED] == (0, "attn.c_attn") and places[HEAD] == (None, "lm_head")
    assert found[HEAD].rows == 8 and "lm_head.weight has 8 and 12 rows" in pairs.told(list(found.values()))


def test_patterns_are_looked_for_in_names(sides):
    def measured(**asked):
        return {pair.name for pair in pairs.find(*sides, **asked) if not pair.left_out}

    assert measured(include=r"mlp\.c_fc") == {UP, "h.1.mlp.c_fc.weight"}
    assert measured(include="mlp", exclude=r"h\.1") == {UP}
    assert measured(exclude="lm_head|wte") == {UP, FUSED, "h.1.mlp.c_fc.weight"}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.7.mlp.gate_proj.weight", (7, "gate")),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", (2, "down")),
        ("transformer.h.11.attn.c_proj.weight", (11, "o")),
        ("model.layers.3.mlp.experts.14.down_proj.weight", (3, "mlp.experts.14.down_proj")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens")),
    ],
)
def test_layers_and_parts_are_read_from_names(name, place):
    assert pairs._place(name) == place


def test_matrices_that_are_called_alike_have_their_whole_names(tmp_path):
    one = np.ones((2, 2), np.float32)
    names = ["encoder.block.0.attention.q_proj.weight", "decoder.block.0.attention.q_proj.weight"]
    safetensors.numpy.save_file(dict.fromkeys(names, one), tmp_path / "model.safetensors")
    side = hf.open_tensors(tmp_path)
    assert {pair.part for pair in pairs.find(side, side)} == {
        "encoder.block.attention.q_proj",
        "decoder.block.attention.q_proj",
    }


def test_rows_are_those_of_the_matrices_as_inputs_by_outputs(sides, drawn, tmp_path):
    looked = Looked("tuned", sides[1], sides[0], tmp_path, LABELS, Config(str(sides[0].directory)))
    weights.measure(looked, weights.Config(include="c_attn|lm_head|wte"))
    frame = pl.concat(pl.read_parquet(piece) for piece in tmp_path.glob("*.parquet"))
    for name, part, layer in ((FUSED, "attn.c_attn", 0), (HEAD, "lm_head", None), (TABLE, "wte", None)):
        base, tuned = (side[name][:8].astype(float) for side in drawn)
        own = frame.filter(pl.col("part") == part, pl.col("layer").eq_missing(pl.lit(layer)))
        changed = own.filter(metric="changed_norm")["value"].item()
        np.testing.assert_allclose(changed, np.linalg.norm(tuned - base) / np.linalg.norm(base), rtol=TOLERANCE)
        # The outputs' space: rows of [in, out] for a table, which is stored so, columns of what torch stores.
        outputs = base if name == TABLE else base.T
        left, values, _ = np.linalg.svd(outputs.T, full_matrices=False)
        rank = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), 0.9) + 1)
        assert own.filter(metric="rank_base", analysis="output_space")["value"].item() == rank
        total = own.filter(metric="total_null_energy", analysis="output_space")["value"].item()
        delta = (tuned - base) if name == TABLE else (tuned - base).T
        outside = delta - delta @ left[:, :rank] @ left[:, :rank].T
        np.testing.assert_allclose(total, np.sum(outside**2) / np.sum(delta**2), atol=TOLERANCE)


def test_types_with_other_maps_are_turned_where_they_are_gpt2s(folders, tmp_path):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((folders[0] / copy.name).read_bytes())
    shapes = {}
    for kind in ("novel", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        shapes[kind] = hf.open_tensors(tmp_path).matrix(UP, rows=6).shape
    assert shapes == {"novel": (8, 6), "gpt2": (6, 8)}


def test_nothing_to_compare_is_one_sentence(sides, tmp_path):
    looked = Looked("tuned", sides[1], sides[0], tmp_path, LABELS, Config(str(sides[0].directory)))
    with pytest.raises(
        ValueError, match=r"weights of tuned: 0 pairs of matrices by name; left out: .* \(not included\)"
    ):
        weights.measure(looked, weights.Config(include="nowhere"))
    with pytest.raises(ValueError, match=re.escape("include: got '(', expected a regular expression")):
        weights.Config(include="(")


def test_models_of_different_types_are_not_alike(folders, checkpoints):
    mine, other = hf.open_tensors(folders[0]), hf.open_checkpoint(checkpoints[0])
    with pytest.raises(ValueError, match="different architectures: model_type is 'novel' and 'llama'"):
        opened.check_alike(mine, other)


def test_rows_of_a_tensor_lie_where_they_lie(sides, drawn):
    part = sides[0].tensors[HEAD].rows(3, 7)
    found = np.concatenate([block.copy() for _, block in safetensors_file.blocks(part)])
    np.testing.assert_array_equal(found, drawn[0][HEAD][3:7])
