"""The training step beside plain PyTorch's, and DPO's loss beside TRL's: the same parameters, tokens and logits.

Nothing is timed before it computes the same. ``logit_error`` and ``loss_error`` are relative, against ours at the
world's own window; ``later_error`` is that of the mean loss over ``cases.PEER_STEPS`` optimiser steps on one batch.
Batches are drawn beforehand except where a row says otherwise.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench_dpo, bench_train_step, cases, harness
from benchmarks.cases import PeerCase
from benchmarks.harness import Program, Record
from jaxsafety import keys
from jaxsafety.engine import sweep
from jaxsafety.models import gpt
from jaxsafety.models.gpt import GPTConfig
from jaxsafety.recipe.schema import Recipe
from jaxsafety.training import optim, stepping
from jaxsafety.types import Batch, Opened, Params

COLUMNS = {
    "name": "program", "case": "case", "window": "window", "items_per_s": "sequences/s", "median_ms": "median ms",
    "p10_ms": "p10", "p90_ms": "p90", "compile_ms": "compile ms", "peak_mb": "peak MB", "gflops_per_s": "GFLOP/s",
    "speedup": "speed-up", "speedup_p10": "p10", "speedup_p90": "p90", "over": "over",
    "padded_speedup": "vs eager, 159", "logit_error": "logit error", "loss_error": "loss error", "later_error": "later",
    "gradient_error": "gradient error",
}  # fmt: skip

EAGER = "torch, float32"

# float32 products summed in another order; a wrong bias or norm shows at 1e-2.
_LOGIT_TOLERANCE = 1e-4
_LOSS_TOLERANCE = 1e-5
# Adam divides by the size of the gradient, so rounding in small gradients is not small in the update.
_LATER_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Entry:
    """A program of a race, its window and its errors."""

    program: Program
    window: int
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What every program of a case shares: the recipe, parameters and the batch, unpadded."""

    recipe: Recipe
    subject: Opened
    config: GPTConfig
    params: Params
    drawn: Batch

    def at(self, window: int) -> tuple[GPTConfig, Batch]:
        """Returns the model's configuration and the batch for ``window`` inputs."""
        token = self.subject.source.special["pad"]
        return replace(self.config, max_tokens=window), pad(self.drawn, window, token=token)


@dataclass(frozen=True)
class Expected:
    """What every program must compute: logits ``[b, t, v]``, the first loss, and the mean over the later ones."""

    logits: Any
    loss: Any
    later: Any

    def errors(self, logits: Any, loss: Any, later: Any) -> dict[str, float]:
        """Returns the relative errors; positions beyond these are pads that nothing scores."""
        shown = np.asarray(logits)[:, : self.logits.shape[1]]
        return {
            "logit_error": harness.max_relative_error(shown, self.logits),
            "loss_error": harness.max_relative_error(loss, self.loss),
            "later_error": harness.max_relative_error(later, self.later),
        }


def run() -> Iterator[dict[str, Any]]:
    """Yields the rows of every case: training steps, then DPO's loss."""
    harness.say_missing("torch", "trl")
    for case in cases.PEERS:
        yield from train_rows(case)
    for case in cases.DPO:
        yield from bench_dpo.rows(case)


def train_rows(case: PeerCase) -> Iterator[dict[str, Any]]:
    """Races the training steps of one case."""
    setting = _setting(case)
    expected = Expected(*_ours(setting, case.windows[-1]))
    entries = []
    for window in case.windows:
        gflop = _gflop(setting, window)
        if harness.has("torch"):
            entries += _torch_entries(setting, window, expected, gflop=gflop)
        entries.append(_jax_entry(setting, window, expected, gflop=gflop))
    entries += _drawing_entries(case, setting, gflop=gflop)
    results = harness.race([entry.program for entry in entries], rounds=case.train.rounds)
    records = [record for record, _ in results]
    eager = {e.window: r for e, r in zip(entries, records, strict=True) if r.name == EAGER}
    for entry, record in zip(entries, records, strict=True):
        row = asdict(record) | {"case": case.train.name, "window": entry.window} | entry.errors
        if eager:
            row |= _speedups(record, over=eager[entry.window], first=eager[case.windows[0]])
        yield row


def _speedups(record: Record, *, over: Record, first: Record) -> dict[str, float]:
    ratio = harness.speedup(record, over=over)
    return {
        "over": over.name, "speedup": ratio.median, "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
        "padded_speedup": harness.speedup(record, over=first).median,
    }  # fmt: skip


def _setting(case: PeerCase) -> Setting:
    recipe = bench_train_step.recipe_of(case.train)
    subject = bench_train_step.opened(recipe)
    config = recipe.subject.options.model.build(subject.source)
    draw = partial(bench_train_step.draw_batch, recipe, subject, step=jnp.int32(0))
    return Setting(recipe, subject, config, _disturbed(config), jax.jit(lambda key: draw(key=key))(keys.root(1)))


def _disturbed(config: GPTConfig) -> Params:
    """Fresh parameters with noise on every leaf: zero biases and unit scales would hide a peer that drops them."""
    leaves, structure = jax.tree.flatten(gpt.init(config, key=keys.root(0)))
    noise = jax.random.split(keys.root(2), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def pad(batch: Batch, window: int, *, token: int) -> Batch:
    """Returns the batch with pads up to ``window`` inputs, which nothing before them sees and nothing scores."""
    missing = ((0, 0), (0, window - batch.tokens.shape[1]))
    return Batch(
        tokens=jnp.pad(batch.tokens, missing, constant_values=token),
        targets=jnp.pad(batch.targets, missing, constant_values=token),
        mask=jnp.pad(batch.mask, missing),
    )


def _gflop(setting: Setting, window: int) -> float | None:
    """XLA's count of the loss and its gradient: the same work for either side."""
    config, batch = setting.at(window)
    loss = bench_train_step.mean_loss(bench_train_step.totals_of(gpt.model(config)))
    return harness.count_gflop(jax.value_and_grad(loss, has_aux=True), (setting.params, batch))


def _our_step(setting: Setting, config: GPTConfig, *, total_steps: int) -> tuple[Any, Any]:
    training = setting.recipe.lanes[0].training
    optimizer = optim.make_optimizer(training.optim, peak_lr=training.lr, total_steps=total_steps)
    totals = bench_train_step.totals_of(gpt.model(config))
    gradient = stepping.make_gradient(totals, key=keys.root(1), total_steps=total_steps)
    return stepping.make_step(gradient, optimizer), stepping.init_state(setting.params, optimizer)


def _ours(setting: Setting, window: int) -> tuple[Any, Any, Any]:
    config, batch = setting.at(window)
    step, state = _our_step(setting, config, total_steps=cases.PEER_STEPS)
    chunk = jax.jit(lambda state, steps: stepping.run_steps(step, lambda _: batch, state, steps=steps)[1]["loss"])
    forward = jax.jit(lambda params, tokens: gpt.model(config).apply(params, tokens).logits)
    return forward(setting.params, batch.tokens), chunk(state, 1), chunk(state, cases.PEER_STEPS)


def _jax_entry(setting: Setting, window: int, expected: Expected, *, gflop: float | None) -> Entry:
    config, batch = setting.at(window)
    step, state = _our_step(setting, config, total_steps=setting.recipe.lanes[0].training.steps)
    program = harness.compile_program(step, (state, batch), name="jax", items=len(batch.tokens), gflop=gflop)
    return Entry(program, window, expected.errors(*_ours(setting, window)))


def _drawing_entries(case: PeerCase, setting: Setting, *, gflop: float | None) -> Iterator[Entry]:
    """Ours as a real run does it, at the world's own window: the batch is drawn inside, seeds share the devices."""
    for seeds in case.train.seed_counts:
        strategy = sweep.resolve("auto", seeds=seeds)
        start = bench_train_step.start_state(setting.recipe, setting.subject, seeds=seeds)
        items = seeds * case.train.steps * case.train.batch_size
        work = None if gflop is None else gflop * seeds * case.train.steps
        program = bench_train_step.lane_program(
            setting.recipe, setting.subject, start, strategy=strategy, items=items, gflop=work
        )
        name = "jax, drawn inside" if seeds == 1 else f"jax, drawn inside, {seeds} seeds, {strategy}"
        yield Entry(replace(program, name=name), case.windows[-1])


def _torch_entries(setting: Setting, window: int, expected: Expected, *, gflop: float | None) -> Iterator[Entry]:
    import torch

    from benchmarks import plain_gpt

    config, batch = setting.at(window)
    training = setting.recipe.lanes[0].training
    tensors = [torch.from_numpy(np.array(x)) for x in (batch.tokens, batch.targets, batch.mask)]
    tensors[:2] = [x.long() for x in tensors[:2]]
    for name, attention, autocast in (
        (EAGER, "plain", False),
        ("torch, float32, fused attention", "fused", False),
        ("torch, bfloat16 autocast", "plain", True),
    ):
        build = partial(plain_gpt.from_params, setting.params, config=config, attention=attention)
        make = partial(plain_gpt.make_step, config=training.optim, peak_lr=training.lr, autocast=autocast)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = build()(tensors[0]).float().numpy()
        check = make(build(), total_steps=cases.PEER_STEPS)
        values = [check(*tensors).item() for _ in range(cases.PEER_STEPS)]
        errors = expected.errors(logits, values[0], np.mean(values))
        if not autocast:
            require(name, errors)
        step = make(build(), total_steps=training.steps)
        yield Entry(Program(name, partial(step, *tensors), items=len(batch.tokens), gflop=gflop), window, errors)


def require(name: str, errors: dict[str, float]) -> None:
    """Refuses a peer that computes something else.

    Raises:
        RuntimeError: an error is beyond float32 rounding.
    """
    limits = {"logit_error": _LOGIT_TOLERANCE, "loss_error": _LOSS_TOLERANCE, "later_error": _LATER_TOLERANCE}
    for kind, limit in limits.items():
        # Written so that a nan is refused.
        if not errors.get(kind, 0.0) <= limit:
            raise RuntimeError(f"{name} computes something else: {kind} {errors[kind]:.1e}, expected at most {limit:g}")
