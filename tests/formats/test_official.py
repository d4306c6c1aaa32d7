"""The authors' checkpoints: parity with a second implementation of their model, and every refusal."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.formats import official, official_file
from jaxsafety.models import gpt
from jaxsafety.tree import flatten
from tests.formats import official_reference as reference

GOLDEN = Path(__file__).with_name("golden") / "official.npz"
# Of logits up to 4: two float32 programs that sum in different orders.
PARITY = 1e-4
LAYER = "module.transformer.h.1."


@pytest.fixture
def tensors():
    """A small model of theirs, to be spoilt."""
    return reference.state_dict(v=11, t=8, layers=2, d=8, f=32)


def convert(tensors):
    return official.convert(tensors, heads=2, where="their.pt")


def test_logits_are_those_of_their_model():
    """Tokens, weights and logits of the reference, which PyTorch 2.13.0 computed on a CPU."""
    with np.load(GOLDEN) as golden:
        tensors = {name: golden[name].astype(np.float32) for name in golden.files}
    tokens, logits = tensors.pop("tokens").astype(np.int32), tensors.pop("logits")
    params, config = official.convert(tensors)
    assert (config.layers, config.heads, config.max_tokens) == (2, 3, 40)
    found = jax.jit(partial(gpt.apply, config=config))(params, jnp.asarray(tokens)).logits
    np.testing.assert_allclose(found, logits, rtol=0, atol=PARITY)
    assert GOLDEN.stat().st_size < 3e5


def test_a_model_has_the_shapes_of_a_fresh_one(tensors):
    params, config = convert(tensors)
    fresh = jax.eval_shape(partial(gpt.init, config), key=keys.root(0))
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in flatten(fresh).items()
    }
    assert (config.block, config.positions) == ("paper", "sinusoidal")


def test_the_prefix_of_dataparallel_may_be_missing(tensors):
    plain = {name.removeprefix("module."): value for name, value in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, convert(plain), convert(tensors))


def test_the_norm_that_is_never_read_changes_nothing(tensors):
    other = tensors | {f"{LAYER}ln_2.weight": np.zeros(8, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, convert(other)[0], convert(tensors)[0])


@pytest.mark.parametrize(("width", "heads"), [(192, 6), (48, 3), (768, 12)])
def test_the_number_of_heads_is_that_of_their_models(width, heads):
    assert official.HEADS[width] == heads


def spoilt(tensors, **changes):
    """The tensors with some replaced by what a function makes of them, or dropped."""
    found = dict(tensors)
    for short, change in changes.items():
        name = next(name for name in found if name.endswith(short.replace("__", ".")))
        value = change(found.pop(name))
        found |= {} if value is None else {name: value}
    return found


SPOILT = {
    "missing": ({"h__1__c_fc__weight": lambda _: None}, "lacks transformer.h.1.c_fc.weight, which the authors' GPT"),
    "misshapen": ({"h__1__c_fc__weight": lambda x: x.T}, "h.1.c_fc.weight is [8, 32] in their.pt, expected [32, 8] by"),
    "rank": ({"wte__weight": lambda x: x[0]}, "transformer.wte.weight is [8] in their.pt, expected 2 axes"),
    "empty": ({"wte__weight": lambda x: x[:0]}, "transformer.wte.weight is [0, 8] in their.pt, expected 2 axes, none"),
    "nan": ({"ln_f__bias": lambda x: x * np.nan}, "transformer.ln_f.bias holds values that are not finite in their.pt"),
    "infinite": ({"h__0__ln_2__bias": lambda x: x + np.inf}, "transformer.h.0.ln_2.bias holds values that are not fin"),
    "mask": ({"h__0__attn__bias": np.ones_like}, "transformer.h.0.attn.bias in their.pt is another mask than the"),
    "positions": ({"wpe__pe": lambda x: x[:, ::-1]}, "transformer.wpe.pe in their.pt holds other positions than"),
    "head": ({"lm_head__weight": lambda x: x[1:]}, "lm_head.weight is [10, 8] in their.pt, expected [11, 8] by v 11"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_tensor_that_is_not_theirs_is_refused(tensors, case):
    changes, message = SPOILT[case]
    with pytest.raises(ValueError) as refused:
        convert(spoilt(tensors, **changes))
    assert message in str(refused.value)


def test_an_unknown_tensor_is_refused_with_the_nearest_known_one(tensors):
    tensors[f"{LAYER}c_fcc.weight"] = tensors.pop(f"{LAYER}c_fc.weight")
    message = r"lacks .*h\.1\.c_fc\.weight, .* and holds .*c_fcc.weight, which it does not have; did you mean '.*c_fcc"
    with pytest.raises(ValueError, match=message):
        convert(tensors)


def test_a_tensor_that_is_there_twice_is_refused(tensors):
    tensors["lm_head.weight"] = tensors["module.lm_head.weight"]
    with pytest.raises(ValueError, match=r"holds both lm_head\.weight and module\.lm_head\.weight: expected one"):
        convert(tensors)


def test_an_unknown_width_needs_the_number_of_heads(tensors):
    with pytest.raises(ValueError, match="known for widths 48, 128, 192, 400, 512, 768, not 8"):
        official.convert(tensors)
    with pytest.raises(ValueError, match="heads: got 3, expected a divisor of width 8"):
        official.convert(tensors, heads=3)


def test_filling_the_vocabulary_changes_no_greedy_answer(tensors):
    params, config = convert(tensors)
    filled = official.fill_vocabulary(params, known=10, size=13, like=4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 10, (4, 8)))
    few = gpt.apply(params, tokens, config=config).logits[..., :10]
    more = gpt.apply(filled, tokens, config=config).logits
    np.testing.assert_array_equal(more[..., :10], few)
    np.testing.assert_array_equal(more[..., 10:], np.repeat(few[..., 4:5], 3, axis=-1))
    np.testing.assert_array_equal(more.argmax(-1), few.argmax(-1))
    same = official.fill_vocabulary(params, known=11, size=11, like=4)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_without_torch_the_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'pip install ".\[official\]" in a checkout'):
        official_file.read(tmp_path / "their.pt")


@pytest.mark.parametrize("saving", [{}, {"dtype": "float64"}, {"_use_new_zipfile_serialization": False}])
def test_a_file_of_torch_is_read_as_it_was_written(tensors, tmp_path, saving):
    pytest.importorskip("torch")
    reference.save(tmp_path / "their.pt", tensors, **saving)
    jax.tree.map(np.testing.assert_array_equal, official.load(tmp_path / "their.pt", heads=2), convert(tensors))


def test_logits_are_those_that_torch_computes_now(tmp_path):
    pytest.importorskip("torch")
    tensors = reference.state_dict(v=19, t=12, layers=3, d=48, f=192, seed=5, prefix="")
    reference.save(tmp_path / "their.pt", tensors)
    params, config = official.load(tmp_path / "their.pt")
    tokens = np.random.default_rng(2).integers(0, 19, (3, 12))
    theirs = reference.logits(tensors, tokens, heads=3)
    ours = gpt.apply(params, jnp.asarray(tokens), config=config).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=PARITY)


class Runs:
    """Pickled, it asks whoever reads it to run something."""

    def __reduce__(self):
        return print, ("it ran",)


def content(kind, tensors):
    """What a file holds that is none of theirs, for torch.save."""
    import torch

    return {
        "code": {"lm_head.weight": Runs()},
        "list": [1, 2],
        "nothing": {},
        "nested": {"model": {"lm_head.weight": torch.zeros(1)}},
        "number for a name": {3: torch.zeros(1)},
        "sparse": {"lm_head.weight": torch.eye(3).to_sparse()},
        "complex": {"lm_head.weight": torch.zeros(2, dtype=torch.complex64)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "holds other things than tensors, which could run code when they are read"),
        ("list", "holds a list, expected the tensors of a model by name"),
        ("nothing", "holds a dict, expected the tensors of a model by name"),
        ("nested", "model is a dict in "),
        ("number for a name", "has 3 among its names, expected text"),
        ("sparse", "expected a dense tensor of real numbers"),
        ("complex", "expected a dense tensor of real numbers"),
    ],
)
def test_a_file_of_anything_else_is_refused_and_never_run(tensors, tmp_path, capsys, kind, message):
    torch = pytest.importorskip("torch")
    torch.save(content(kind, tensors), tmp_path / "their.pt")
    with pytest.raises(ValueError) as refused:
        official.load(tmp_path / "their.pt")
    assert message in str(refused.value) and "it ran" not in capsys.readouterr().out


def test_a_file_that_is_missing_torn_or_no_file_of_torch_is_refused(tensors, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "their.pt"
    with pytest.raises(
        FileNotFoundError, match=r"no file at .*their\.pt: expected a checkpoint that torch\.save wrote"
    ):
        official.load(file)
    reference.save(file, tensors)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(tensors["module.lm_head.weight"].tobytes())] ^= 1
    for data in (
        bytes(flipped),
        whole[:-100],
        whole[:1000],
        b"\x80" + whole[:50],
        b"",
        b"weights",
        whole[:100] + whole[200:],
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"is not a PyTorch file|is damaged or holds other things than tensors"):
            official.load(file)
