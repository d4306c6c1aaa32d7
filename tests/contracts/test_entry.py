"""Public functions as strangers call them: from NumPy, eagerly and again, closed over by a trace, for a gradient."""

import contextlib
import importlib
import inspect
import pkgutil
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from jaxsafety import losses
from tests.contracts import public, public_parts
from tests.contracts.public import LOGPROBS, MASK, weighted

# float32 programs that XLA fuses and adds up in another order.
RTOL, ATOL = 1e-4, 1e-5
# Central differences in float64: the step squared, and the rounding over the step.
STEP, SLOPE = 1e-5, 1e-6
CASES = public.CASES | public_parts.CASES
NAMES = sorted(CASES)
# Where people find functions; whole files of them that take functions, or text; and what in other files does, or no
# array of numbers but the trees that others are made of.
HOMES = ("losses", "tree", "keys", "linalg", "methods", "models", "edits", "attacks", "analysis", "parametrisations",
         "pools", "training", "world", "subjects.judge")  # fmt: skip
FUNCTIONS = {
    "objective",
    "stepping",
    "adapter",
    "checks",
    "through",
    "llama_block",
    "llama_cache",
    "llama_layers",
    "widening",
    "branching",
    "gpt_block",
}
TEXT = {"loading", "pcfg_rules", "pcfg_tables", "pcfg_text", "text"}
APART = {
    "tree": {"flatten", "unflatten", "select", "matrix_stacks", "label", "check_structure", "check_match",
             "check_finite", "stack", "lane", "count", "is_stacked"},
    "svd": {"gram_limit", "rounding"}, "unbatched": {"unbatched", "over_batch"},
    "optim": {"is_layer_matrix", "make_optimizer"},
    "gpt": {"preset", "init", "model"}, "llama": {"init", "model", "attention", "block", "embed"},
    "layers": {"sinusoidal_table", "rope_table"}, "sites": {"chosen_layers", "of_layer", "watched"},
    "generation": {"windowed"}, "inputs": {"check_inputs", "embedded"}, "lora": {"init", "merged", "join"},
    "gru": {"init"}, "descent": {"descended"}, "soft_tokens": {"widened"},
    "constrained": {"data", "init_aux", "update_aux"}, "primal_dual": {"init_aux", "update_aux"},
    "full": {"init", "join"}, "mask": {"init", "join"}, "hidden": {"layer_at", "layers_at", "direction_words"},
    "rmu": {"trained_layers"}, "output_space": {"draw_null_spaces", "ascending"},
    "sensitivity": {"gradient_norms", "finish"}, "refusing_text": {"split", "candidates", "scored"},
    "conditions": {"unsafe_table", "grammar_of", "refusing_blocks", "further", "named"},
    "operators": {"bijection_table"}, "drawn": {"redrawn", "reweighted", "together"}, "layout": {"stem"},
    "grammar": {"compose", "compile_grammar", "check_window", "together"}, "kept_energy": {"by_share", "panels"},
}  # fmt: skip
STUDY = {
    "totals",
    "needs",
    "reference",
    "data",
    "edit",
    "attack",
    "condition",
    "points",
    "measure",
    "draw",
}  # of a file of these

# Whose programs take longest to compile. Of those with a gradient that is compiled anyhow.
LONGEST = ("conditions.draw_alike", "refusal_direction.select", "update_spaces.both_spaces", "gcg.search",
           "refusing.scored", "batches.mixed_at", "probes.fit", "sensitivity.jacobian_norm")  # fmt: skip


def _once(name):
    return pytest.param(name, marks=pytest.mark.slow) if name in LONGEST or CASES[name].smooth else name


lowered = []
monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: lowered.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
)


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.abs(left), np.abs(right), rtol=RTOL, atol=ATOL)  # vectors have any sign


def public_functions():
    """By module, every public function that people find there."""
    for home in HOMES:
        module = importlib.import_module(f"jaxsafety.{home}")
        inside = pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}.")
        for one in (module, *(importlib.import_module(found.name) for found in inside)):
            for name, function in vars(one).items():
                if callable(function) and getattr(function, "__module__", None) == one.__name__ and name[0] != "_":
                    yield one, name, function


def test_every_public_function_is_in_the_table():
    there = {name.partition(",")[0] for name in CASES}
    for module, name, function in public_functions():
        short = module.__name__.rpartition(".")[2]
        apart = inspect.isclass(function) or short in FUNCTIONS | TEXT or name in APART.get(short, set()) | STUDY
        assert apart or f"{short}.{name}" in there


def test_signatures_are_as_they_are_written():
    """Where Python would show the classes behind annotations."""
    for module, name, function in public_functions():
        with contextlib.suppress(TypeError, ValueError):  # no signature, as of a type alias
            shown = str(inspect.signature(function))
            assert not {"jaxlib", "jaxtyping"} & {*re.findall(r"\w+", shown)}, f"{module.__name__}.{name}{shown}"


def test_a_signature_is_that_of_the_function():
    signature = inspect.signature(losses.sequence_logprobs)
    assert list(signature.parameters) == ["logprobs", "mask", "reduction"] and "Float[Array, " in str(signature)
    jitted = jax.jit(losses.sequence_logprobs, static_argnames="reduction")
    assert jax.eval_shape(partial(jitted, reduction="sum"), LOGPROBS, MASK).shape == LOGPROBS.shape[:1]


@pytest.mark.parametrize("name", [_once(name) for name in NAMES])
def test_a_second_call_compiles_nothing(name, unchecked):
    """With NumPy's arrays, as a stranger has them."""
    call, arrays = CASES[name][:2]
    first = jax.block_until_ready(call(**arrays))
    lowered.clear()
    second = jax.block_until_ready(call(**arrays))
    assert not lowered
    jax.tree.map(np.testing.assert_array_equal, second, first)


def ways(name):
    """What to jit, and its argument: the function's arguments traced, closed over, the first of them, or the others."""
    call, constants = CASES[name].call, jax.tree.map(jnp.asarray, CASES[name].arrays)
    first, *others = constants
    rest = {other: constants[other] for other in others}
    yield lambda given: call(**given), constants
    yield lambda _: call(**constants), ()
    yield lambda given: call(**{first: given}, **rest), constants[first]
    yield lambda given: call(**{first: constants[first]}, **given), rest


@pytest.mark.parametrize("name", NAMES)
def test_arguments_may_be_traced_closed_over_or_mixed(name, unchecked):
    for function, given in ways(name):
        jax.make_jaxpr(function)(given)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_jitted_is_eager(name, unchecked):
    call, arrays = CASES[name][:2]
    eager = call(**arrays)
    for function, given in ways(name):
        same(jax.jit(function)(given), eager)


def wide(leaf):
    leaf = np.asarray(leaf)
    return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].smooth])
def test_gradients_are_finite_differences(name, unchecked):
    call, arrays, smooth, _ = CASES[name]
    with jax.enable_x64(True):
        arrays = jax.tree.map(wide, arrays)
        moved = {argument: arrays[argument] for argument in smooth}
        rng = np.random.default_rng(1)
        along = jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), moved)

        def value(given):
            return weighted(call(**(arrays | given)))

        @jax.jit
        def slopes(moved, along):
            ends = [value(jax.tree.map(lambda x, v, by=by: x + by * v, moved, along)) for by in (STEP, -STEP)]
            products = jax.tree.map(lambda g, v: jnp.sum(g * v), jax.grad(value)(moved), along)
            return sum(jax.tree.leaves(products)), (ends[0] - ends[1]) / (2 * STEP)

        found, expected = slopes(moved, along)
        np.testing.assert_allclose(found, expected, rtol=SLOPE, atol=SLOPE)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].refused])
def test_a_gradient_that_is_none_is_a_sentence(name):
    call, arrays, _, refused = CASES[name]
    arrays = jax.tree.map(jnp.asarray, arrays)
    short = name.rpartition(".")[2]
    for argument in refused:
        for derivative in (jax.grad, partial(jax.jacfwd)):
            ask = derivative(lambda given, argument=argument: weighted(call(**(arrays | {argument: given}))))
            with pytest.raises(ValueError, match=rf"{short}.* has no gradient here: put jax.lax.stop_gradient around"):
                jax.eval_shape(ask, arrays[argument])
        held = {argument: jax.tree.map(jax.lax.stop_gradient, arrays[argument])}
        jax.eval_shape(jax.grad(lambda x, held=held: x * weighted(call(**(arrays | held)))), 1.0)
