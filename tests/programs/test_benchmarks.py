"""The harness on trivial functions, the plain generator against the world, and what the run module prints and writes.

Nothing here asserts how long anything took.
"""

import ast
import dataclasses
import json
import random
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    bench_branches,
    bench_dpo,
    bench_linalg,
    bench_pair,
    bench_peers,
    bench_profile,
    bench_sampler,
    bench_sensitivity,
    bench_train_step,
    bench_tuning,
    cases,
    harness,
    hlo,
    plain_sampler,
    run,
)
from benchmarks.harness import Program, Record
from jaxsafety.cli import main
from jaxsafety.formats import hf, prompts
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.pools import text as pool
from jaxsafety.types import Batch

M, N, K = 8, 16, 32


def own_imports(path):
    """The modules of benchmarks/ that one of them imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            folder = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{folder}{alias.name}".split(".") for alias in node.names]
            yield from (name[1] for name in names if name[0] == "benchmarks")


def test_modules_import_each_other_in_one_direction():
    files = Path(run.__file__).parent.glob("*.py")
    TopologicalSorter({path.stem: set(own_imports(path)) for path in files}).prepare()  # raises for a circle


def record(*times_ms, items=1):
    """A record with given times; the rest of it does not matter to a ratio."""
    low, mid, high = np.percentile(times_ms, (10, 50, 90))
    return Record("x", items, None, None, mid, low, high, 0.0, None, None, times_ms, "device", {})


@pytest.fixture
def matrices(key):
    left, right = jax.random.split(key)
    return jax.random.normal(left, (M, K)), jax.random.normal(right, (K, N))


def test_a_matmul_is_measured_with_its_work_and_memory(matrices):
    result = harness.measure(jnp.matmul, matrices, name="matmul", items=3, rounds=4)
    assert result.name == "matmul" and len(result.times_ms) == 4
    assert 0 < result.p10_ms <= result.median_ms <= result.p90_ms
    assert min(result.lower_ms, result.compile_ms) > 0
    assert result.items_per_s == pytest.approx(3e3 / result.median_ms)
    assert result.gflops_per_s == pytest.approx(2e-6 * M * N * K / result.median_ms)
    assert result.peak_mb >= 4e-6 * (M * K + K * N + M * N)
    assert result.device and result.versions["jax"] == jax.__version__


def test_work_inside_a_loop_has_no_count_unless_the_caller_gives_it(matrices):
    def looped(a, b):
        return jax.lax.map(lambda row: row @ b, a)

    assert harness.count_gflop(jnp.matmul, matrices) == pytest.approx(2e-9 * M * N * K)
    assert harness.count_gflop(looped, matrices) is None
    assert harness.compile_program(looped, matrices, name="x").gflop is None
    assert harness.compile_program(looped, matrices, name="x", gflop=5.0).gflop == 5.0


def test_a_race_interleaves_after_warming_up_and_keeps_the_last_output():
    calls = []

    def caller(name):
        def call():
            calls.append(name)
            return len(calls)

        return call

    results = harness.race([Program(name, caller(name)) for name in "AB"], rounds=2, warmups=1)
    assert "".join(calls) == "AB" + "ABAB"
    assert [(r.name, len(r.times_ms), output) for r, output in results] == [("A", 2, 5), ("B", 2, 6)]
    assert results[0][0].compile_ms is results[0][0].peak_mb is results[0][0].gflops_per_s is None


def test_a_race_waits_for_results():
    class Pending:
        waited = 0

        def block_until_ready(self):
            Pending.waited += 1
            return self

    harness.race([Program("pending", Pending)], rounds=3, warmups=2)
    assert Pending.waited == 5


def test_the_time_of_a_call_is_its_wall_clock():
    results = harness.race([Program("sleep", lambda: time.sleep(0.01))], rounds=2, warmups=0)
    assert min(results[0][0].times_ms) >= 10


def test_speedup_counts_work_and_its_spread_comes_from_neighbouring_runs():
    # Both drift by a factor of 3; per unit of work the second is 4 times faster in every round.
    ratio = harness.speedup(record(1.0, 2.0, 3.0, items=2), over=record(2.0, 4.0, 6.0))
    assert (ratio.median, ratio.p10, ratio.p90) == pytest.approx((4.0, 4.0, 4.0))
    ratio = harness.speedup(record(1.0, 1.0, 1.0), over=record(1.0, 2.0, 9.0))
    assert (ratio.median, ratio.p10, ratio.p90) == pytest.approx((2.0, 1.2, 7.6))


def test_the_error_is_relative_to_the_largest_entry_of_its_leaf():
    reference = {"a": jnp.array([1.0, -4.0]), "b": jnp.array([100.0])}
    assert harness.max_relative_error(reference, reference) == 0.0
    assert harness.max_relative_error({"a": jnp.array([1.0, -3.0]), "b": jnp.array([110.0])}, reference) == 0.25
    assert harness.max_relative_error(jnp.array([0.5]), jnp.array([0.0])) == 0.5


def test_total_variation_and_bigrams_of_known_rows(tiny_world):
    table = bench_sampler.letter_bigrams(tiny_world, np.array([[0, 1, 1, -1], [2, 99, 0, 1]]))
    expected = np.zeros((12, 12))
    expected[0, 1], expected[1, 1] = 2 / 3, 1 / 3
    np.testing.assert_allclose(table, expected)
    assert bench_sampler.total_variation(table, table) == 0.0
    assert bench_sampler.total_variation(table, expected.T) == pytest.approx(2 / 3)


@pytest.mark.parametrize("draw", ["text", "pretrain"])
def test_the_plain_generator_and_the_world_draw_the_same_bigrams(tiny_world, draw, monkeypatch):
    monkeypatch.setattr(cases, "STATISTIC_SAMPLES", 2048)
    peer = bench_sampler.plain_draws(tiny_world, draw)(2048, rng=random.Random(0))
    accuracy = bench_sampler._accuracy(tiny_world, draw, peer)
    # Two right generators differ by the noise alone; unsafe-dominant text by nine times as much.
    assert accuracy["tv"] < 1.5 * accuracy["tv_noise"]


def test_the_plain_generator_applies_its_operators_in_order(tiny_world):
    whole = pool.Config(start=(0.0, 1.0, 0.0, 0.0), exception_probability=0.0)
    plain = plain_sampler.read(tiny_world)
    tokens, _, _ = plain_sampler.pretrain_batch(plain, whole, 100, rng=random.Random(0))
    for row in tokens:
        length = list(row).index(tiny_world.special["eot"]) - 6
        text, first, second = (row[start : start + length] for start in (6, 7 + length, 8 + 2 * length))
        images = []
        for table in tiny_world.bijections:
            a, b, c, d = (table[task] for task in row[1:5])
            image = b[a[text - tiny_world.first_letter]]
            images.append((*image, *d[c[image]]))
        assert tuple(np.concatenate([first, second]) - tiny_world.first_letter) in images


def test_the_plain_generator_lays_out_and_scores_sequences_as_the_world_does(tiny_world):
    count, pad = 2048, tiny_world.special["pad"]
    fast = jax.jit(bench_sampler.draws(tiny_world, "pretrain", batch_size=count))(jax.random.key(0))
    tokens, targets, mask = bench_sampler.plain_draws(tiny_world, "pretrain")(count, rng=random.Random(0))
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    # Shares of pads and of scored targets by position: their difference has a standard deviation of at most 0.016.
    for ours, theirs in ((fast.tokens == pad, tokens == pad), (fast.mask, mask)):
        assert np.abs(np.asarray(ours).mean(axis=0) - theirs.mean(axis=0)).max() < 0.06


def random_batch(built, _, *, key, step, batch_size, **__):
    """Random sequences: they compile faster than the world's and serve a comparison as well."""
    tokens = jax.random.randint(jax.random.fold_in(key, step), (batch_size, 9), 0, built.vocab_size)
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=tokens[:, 1:] > 0)


@pytest.mark.slow
def test_training_steps_agree_between_strategies(monkeypatch):
    monkeypatch.setattr(pool, "POOL", pool.POOL._replace(draw=random_batch))
    case = cases.TrainCase("x", "tiny", "tiny", "learned", "adamw", batch_size=2, steps=1, seed_counts=(2,), rounds=1)
    small = {"world": "tiny", "model": {"positions": "learned", "layers": 1, "heads": 1, "width": 8}}
    recipe = dataclasses.replace(bench_train_step.recipe_of(case), subject=small)
    rows = list(bench_train_step._rows(case, recipe, seeds=2, gflop=1.0, peak=10.0))
    assert [row["strategy"] for row in rows] == ["map", "vmap", "sharded"]
    # float32 sums in another order.
    assert all(row["loss_error"] < 1e-5 for row in rows)
    assert all(row["gflops_per_s"] == pytest.approx(row["items_per_s"]) and row["items"] == 2 for row in rows)
    # Two seeds on two of the devices: one a device.
    assert rows[2]["seed_mb"] == pytest.approx(rows[2]["peak_mb"])
    assert rows[0]["seed_mb"] == pytest.approx(rows[0]["peak_mb"] / 2)
    assert all(row["of_peak"] == pytest.approx(row["gflops_per_s"] / 10) for row in rows)
    assert bench_train_step.strategies(1) == ("map", "vmap")


@pytest.mark.slow
def test_a_seed_also_trains_in_bfloat16_and_its_error_shows(small_training):
    recipe = bench_train_step.recipe_of(SMALL)
    rows = {row["strategy"]: row for row in bench_train_step._rows(SMALL, recipe, seeds=1, gflop=1.0, peak=10.0)}
    assert list(rows) == ["map", "vmap", "map, bfloat16", "map, bfloat16 stored"]
    # Rounding, and no more: bfloat16 has 8 significant bits.
    assert rows["vmap"]["loss_error"] < 1e-6 < rows["map, bfloat16"]["loss_error"] < 2**-8
    assert 1e-6 < rows["map, bfloat16 stored"]["loss_error"] < 2**-8


SMALL = cases.TrainCase("x", "tiny", "tiny", "sinusoidal", "adamw", 2, steps=1, seed_counts=(2,), rounds=1)


@pytest.fixture
def small_training(monkeypatch):
    """Training cases of a small model, on random sequences of 8. XLA has no count of a scan over a single layer."""
    small = {"world": "tiny", "model": {"positions": "sinusoidal", "layers": 2, "heads": 2, "width": 8}}
    recipe_of = bench_train_step.recipe_of
    monkeypatch.setattr(bench_train_step, "recipe_of", lambda case: dataclasses.replace(recipe_of(case), subject=small))
    monkeypatch.setattr(pool, "POOL", pool.POOL._replace(draw=random_batch))
    return cases.PeerCase(SMALL, windows=(12, 8))


def without(*packages):
    return lambda package: package not in packages


@pytest.mark.slow
def test_padding_a_window_changes_no_result(small_training, monkeypatch):
    monkeypatch.setattr(harness, "has", without("torch"))
    rows = list(bench_peers.train_rows(small_training))
    assert [row["name"] for row in rows] == [
        "jax", "jax", "jax, drawn inside, 2 seeds, sharded",
    ]  # fmt: skip
    assert [row["window"] for row in rows] == [12, 8, 8] and [row["items"] for row in rows] == [2, 2, 4]
    assert all(row[error] < 1e-5 for row in rows[:2] for error in ("logit_error", "loss_error", "later_error"))
    assert "speedup" not in rows[0]


def test_the_plain_model_and_its_step_compute_the_same(small_training):
    pytest.importorskip("torch", reason='torch is not installed: pip install ".[peers]" in a checkout')
    given_batches = dataclasses.replace(small_training, train=dataclasses.replace(SMALL, seed_counts=()))
    rows = list(bench_peers.train_rows(given_batches))
    exact = [row for row in rows if row["name"] in (bench_peers.EAGER, "torch, float32, fused attention")]
    assert len(exact) == 4 and all(row["logit_error"] < 1e-5 and row["loss_error"] < 1e-6 for row in exact)
    assert all(row["later_error"] < 1e-5 for row in exact)
    assert all(row["over"] == bench_peers.EAGER for row in rows) and rows[0]["speedup"] == 1.0


def test_the_plain_model_refuses_another_block(small_training):
    pytest.importorskip("torch", reason='torch is not installed: pip install ".[peers]" in a checkout')
    from benchmarks import plain_gpt

    setting = bench_peers._setting(small_training)
    with pytest.raises(ValueError, match="paper's block and sinusoidal positions, got block 'pre_ln'"):
        plain_gpt.from_params(setting.params, config=dataclasses.replace(setting.config, block="pre_ln"))


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_peer_that_computes_something_else_is_refused(error):
    bench_peers.require("peer", {"logit_error": 1e-6, "loss_error": 1e-7, "later_error": 1e-7})
    with pytest.raises(RuntimeError, match="peer computes something else: loss_error"):
        bench_peers.require("peer", {"logit_error": 0.0, "loss_error": error})


PAIRS = cases.DPOCase("x", pairs=3, tokens=9, vocab_size=7, beta=0.3, rounds=1)


def test_dpo_from_logits_is_the_loss_of_the_margins(monkeypatch):
    monkeypatch.setattr(harness, "has", without("torch", "trl"))
    (row,) = bench_dpo.rows(PAIRS)
    assert row["name"] == "dpo, jax" and row["loss_error"] == 0.0
    pairs = bench_dpo.draw(PAIRS)
    arrays = map(jnp.asarray, (pairs.policy, pairs.reference, pairs.tokens, pairs.answer))
    value = bench_dpo.loss(*arrays, beta=PAIRS.beta)
    logps = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (pairs.policy, pairs.reference)]
    chosen = [np.take_along_axis(x[:, :-1], pairs.tokens[:, 1:, None], -1)[..., 0] for x in logps]
    margins = ((chosen[0] - chosen[1]) * pairs.answer[:, 1:]).sum(-1)
    expected = np.log1p(np.exp(-PAIRS.beta * (margins[:3] - margins[3:]))).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("missing", ["trl", ""])
@pytest.mark.filterwarnings("ignore")  # of TRL's own imports
def test_dpo_has_the_value_and_gradient_of_trl(missing, monkeypatch):
    pytest.importorskip("torch", reason='torch is not installed: pip install ".[peers]" in a checkout')
    if not missing:
        pytest.importorskip("trl", reason='trl is not installed: pip install ".[peers]" in a checkout')
    monkeypatch.setattr(harness, "has", without(missing))
    rows = list(bench_dpo.rows(PAIRS))
    names = ["dpo, TRL", "dpo, torch, textbook", "dpo, jax"]
    assert [row["name"] for row in rows] == names[bool(missing) :]
    assert all(row["loss_error"] < 1e-5 and row["gradient_error"] < 1e-5 for row in rows)


def test_time_is_shared_by_what_runs_at_once():
    shares = hlo.shares([(0.0, 4.0, "a"), (1.0, 3.0, "b"), (6.0, 7.0, "b"), (6.0, 7.0, "b")])
    assert shares == pytest.approx({"a": 3.0, "b": 2.0})


def test_operations_are_told_apart_by_scope_and_shape(key):
    tokens, width = 5, 3

    def program(x, weights):
        with jax.named_scope("sampler"):
            drawn = jnp.cumsum(x, axis=0)
        with jax.named_scope(hlo.MODEL):
            scores = jnp.exp(jnp.einsum("btk,buk->btu", x, x))
            out = jnp.tanh(jnp.einsum("btu,buk->btk", scores, x).reshape(-1, width) @ weights)
        return jnp.sort(out, axis=0), drawn

    compiled = jax.jit(program).lower(jax.random.normal(key, (2, tokens, width)), jnp.ones((width, 8))).compile()
    kind_of = hlo.kinds(compiled.as_text(), tokens=tokens, scopes=("sampler",), default="rest")
    assert {hlo.WEIGHTS, hlo.ATTENTION, hlo.SOFTMAX, hlo.REST, "sampler", "rest"} == set(kind_of.values())
    work = hlo.dot_gflop(compiled.as_text(), kind_of)
    assert work[hlo.WEIGHTS] == pytest.approx(2e-9 * 2 * tokens * width * 8)
    assert work[hlo.ATTENTION] == pytest.approx(2 * 2e-9 * 2 * tokens * tokens * width)


def test_a_trace_holds_the_operations_of_that_program(matrices):
    compiled = jax.jit(jnp.matmul).lower(*matrices).compile()
    meanwhile = jax.jit(jnp.sin)
    ran, took = hlo.trace(lambda: (compiled(*matrices), meanwhile(matrices[0])), text=compiled.as_text())
    known = hlo.kinds(compiled.as_text(), tokens=0, scopes=(), default="rest")
    assert ran and {name for _, _, name in ran} <= known.keys()
    assert all(start <= end for start, end, _ in ran) and 0 < max(e for _, e, _ in ran) - ran[0][0] <= took


@pytest.mark.slow
def test_a_profile_lists_parts_kinds_and_the_floor(small_training, monkeypatch):
    monkeypatch.setattr(cases, "PROFILE", (dataclasses.replace(SMALL, steps=2),))
    monkeypatch.setattr(cases, "GEMMS", (cases.GemmCase(M, K, N),))
    rows = {row["name"]: row for row in bench_profile.run()}
    parts = ("sampler", "forward", "forward, backward", "step, batch given", "chunk, batch drawn inside")
    assert list(rows)[1:6] == list(parts) and rows["chunk, batch drawn inside"]["share"] == 1.0
    kinds = [row for name, row in rows.items() if name.startswith("in the chunk")]
    assert kinds.pop()["share"] == 1.0
    # Medians of few rounds need not sum; one round does.
    assert sum(row["share"] for row in kinds) == pytest.approx(1.0)
    assert rows["floor of the step"]["gflop"] == rows["forward, backward"]["gflop"]


@pytest.fixture
def small_linalg(monkeypatch):
    """The linear algebra cases at shapes that compile in a moment, on a machine without torch."""
    svd = cases.SVDCase((2, 10, 24), cases.SVD[0].programs, rank=8, judged=3, rounds=1, warmups=0)
    monkeypatch.setattr(cases, "SVD", (svd,))
    monkeypatch.setattr(cases, "PROJECTION", cases.ProjectionCase((2, 10, 24), 5, 1e-3, condition=20.0, rounds=1))
    monkeypatch.setattr(harness, "has", without("torch"))
    return svd


@pytest.mark.parametrize("shape", [(2, 6, 15), (1, 15, 6)])
def test_matrices_are_made_with_the_triplets_that_are_claimed(shape):
    spectrum = np.geomspace(1, 0.1, 6)
    matrices, outputs = bench_linalg.known(shape, spectrum, directions=4)
    _, values, right = np.linalg.svd(np.asarray(matrices, np.float64))
    # The matrices are rounded to float32.
    np.testing.assert_allclose(values, np.broadcast_to(spectrum, values.shape), rtol=1e-6)
    leading = right[:, :4].swapaxes(-1, -2)
    for found in (leading, outputs):
        np.testing.assert_allclose(found @ found.swapaxes(-1, -2), leading @ right[:, :4], atol=1e-5)
    assert np.count_nonzero(matrices) == matrices.size and shape[0] == len(np.unique(matrices[:, 0, 0]))


def test_decompositions_and_projections_agree_with_the_construction(small_linalg, capsys):
    rows = {row["name"]: row for row in bench_linalg.run()}
    assert list(rows) == [
        "full", "jnp.linalg.svd, wide", "numpy svd, float64", "gram", "randomized", "projection, numpy svd, float64",
        "projection, svd basis", "projection, qr basis", "projection, gram basis", "projection, basis given",
    ]  # fmt: skip
    # float32 decompositions with condition 20 at most; each relative to its own value.
    assert all(row["energy_error"] < 1e-3 for row in rows.values())
    decomposed = [row for row in rows.values() if "value_error" in row]
    assert len(decomposed) == 5 and all(row["value_error"] < 1e-5 for row in decomposed)
    assert rows["full"]["speedup"] == rows["projection, numpy svd, float64"]["speedup"] == 1.0
    assert all((row["estimate"] is not None) == (row["name"] in ("full", "gram", "randomized")) for row in decomposed)
    told = 'torch is not installed, its rows are left out: pip install ".[peers]" in a checkout\n'
    assert capsys.readouterr().err == told
    assert "10 x 24" in run.table(list(rows.values()), bench_linalg.COLUMNS)


def test_torch_runs_beside_where_it_is_installed(small_linalg, monkeypatch):
    def low_rank(a, *, q, niter):
        assert (q, niter) == (18, small_linalg.power_iterations)
        left, values, right = np.linalg.svd(a, full_matrices=False)
        return left[..., :q], values[..., :q], right[..., :q, :].mT

    torch = SimpleNamespace(from_numpy=np.asarray, svd_lowrank=low_rank, linalg=SimpleNamespace(svd=np.linalg.svd))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(harness, "has", without())
    monkeypatch.setattr(harness, "versions", dict)  # this torch has none
    case = dataclasses.replace(small_linalg, programs=("numpy", "torch", "torch_lowrank"))
    rows = list(bench_linalg.svd_rows(case))
    assert [row["name"] for row in rows] == ["numpy svd, float64", "torch", "torch svd_lowrank"]
    assert all(row["value_error"] < 1e-5 and row["energy_error"] < 1e-4 for row in rows)


def test_every_entry_is_judged_by_its_own_size():
    assert bench_linalg.largest_relative_error(np.array([1.0, 0.02]), np.array([1.0, 0.01])) == pytest.approx(1.0)


def test_a_case_prints_its_table_and_appends_json_lines(tmp_path, monkeypatch, capsys):
    rows = [{"name": name, "median_ms": 1.5, "times_ms": (1.0, 2.0), "peak_mb": None} for name in ("first", "second")]
    monkeypatch.setattr(bench_sampler, "run", lambda: iter(rows))
    results = tmp_path / "results.jsonl"
    run.run_case("sampler", results=results)
    run.run_case("sampler", results=results)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["first", "second"] * 2
    assert all(line["case"] == "sampler" and line["date"] and line["times_ms"] == [1.0, 2.0] for line in lines)
    printed = capsys.readouterr().out
    assert printed.count("first") == 2 and "median ms" in printed


def test_tables_align_and_leave_absent_values_empty():
    printed = run.table([{"a": "x", "b": 1234.5}, {"a": "longer", "b": None}, {"a": "y"}], {"a": "name", "b": "ms"})
    assert printed.splitlines() == [
        "| name   |    ms |",
        "| ------ | ----: |",
        "| x      | 1,234 |",
        "| longer |       |",
        "| y      |       |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (3, "3"), (0.0, "0"), (1.234, "1.23"), (99.96, "100"), (0.00123, "1.2e-03")]
)
def test_cells_show_about_three_digits(value, text):
    assert run.cell(value) == text


def test_an_unknown_benchmark_is_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["smapler"])
    assert (
        "unknown benchmark 'smapler': expected any of sampler, train_step, branches, peers, profile, first_step, linalg"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_matrix_free_sensitivities_agree_with_the_dense_jacobian(monkeypatch):
    monkeypatch.setattr(cases, "SENSITIVITY", (cases.SensitivityCase("tiny", "tiny", prompts=2, rounds=1),))
    dense, power, gradient = bench_sensitivity.run()
    assert dense["value_error"] == 0.0 and dense["speedup"] == 1.0
    # jacobian_norm stops at a relative residual of 1e-2, which its value's error is about the square of.
    assert power["value_error"] < 1e-3 and gradient["value_error"] < 1e-4


@pytest.mark.slow
def test_what_begins_alike_is_read_once_for_the_same_gradient(monkeypatch):
    monkeypatch.setattr(cases, "BRANCHES", (cases.BranchCase("tiny", "tiny", prompts=2, methods=("dpo",), rounds=1),))
    whole, once = bench_branches.run()
    assert whole["loss_error"] == whole["gradient_error"] == 0.0 and whole["speedup"] == 1.0
    assert once["loss_error"] < 1e-5 and once["gradient_error"] < 1e-4
    assert once["gflop"] < 0.85 * whole["gflop"]


@pytest.mark.slow
def test_a_pair_is_raced_and_commands_run_on_sparse_checkpoints(tmp_path, monkeypatch):
    rows = list(bench_pair.pair_rows(cases.PairCase((24, 32), rank=8)))
    assert [row["name"] for row in rows] == ["full", "gram", "randomized"]
    assert rows[0]["energy_error"] == 0 and rows[1]["energy_error"] < 1e-4
    config = LlamaConfig(300, 512, 2, 4, 2, 32, 48, 8)
    base, tuned = (bench_pair.sparse_checkpoint(tmp_path / str(seed), config, seed=seed) for seed in (0, 1))
    _, params = hf.load(base, dtype="float32")
    assert np.std(params["blocks"]["mlp"]["up"]) == pytest.approx(0.02, rel=0.1) and not params["unembed"].any()
    monkeypatch.setattr(main, "_configure_jax", lambda *_, **__: None)
    asked = tmp_path / "prompts.jsonl"
    asked.write_text(prompts.to_jsonl([one for one in prompts.own() if one.label in prompts.LABELS][::40]))
    words = ("activations", str(base), str(tuned), "--prompts", str(asked), "--out", str(tmp_path / "out"))
    assert main.main(["analyze", *words]) == 0
    for verb, options in cases.CheckpointCase(config).commands:
        extra = [option.format(prompts=asked, few=asked) for option in options]
        words = (verb, str(base), str(tuned), "--out", str(tmp_path / "run"), *extra)
        assert main.main(["analyze", *words, "--print_config"]) == 0


@pytest.mark.slow
def test_plans_of_tuning_come_from_shapes_and_steps_agree(monkeypatch):
    model = LlamaConfig(64, 32, 2, 2, 1, 16, 24, 8)
    monkeypatch.setattr(
        cases, "PLANS", (cases.PlanCase(model, "dpo", 4, 2, 16), cases.PlanCase(model, "sft", None, 2, 16))
    )
    monkeypatch.setattr(cases, "TUNED", model)
    adapter, everything, *steps = bench_tuning.run()
    # q, k, v, o, gate, up and down of two layers: four times the sum of inputs and outputs.
    sides = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    assert adapter["trained"] == 2 * 4 * sum(map(sum, sides))
    assert everything["weights_gb"] == 0 and everything["trained"] > adapter["trained"]
    assert steps[0]["loss_error"] == 0 and all(row["loss_error"] < 1e-5 for row in steps)
