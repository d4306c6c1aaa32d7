"""DPO's loss and its gradient by the policy's logits, from the same logits: TRL's, the textbook in PyTorch, and ours.

Rows of ``peers``. The weights of the two sides are equal, for ours has one for each. TRL's value comes from its own
``DPOTrainer`` on an object with the few attributes that the loss reads, and its own log-softmax; what it logs of logits
and entropies is not computed, in its favour.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.cases import DPOCase
from benchmarks.harness import Program
from jaxsafety import losses
from jaxsafety.methods import dpo

# Sums of the same float32 log-probabilities in another order.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Pairs:
    """Preferred sequences above dispreferred ones: logits ``[2b, t, v]`` of either model, tokens and answers."""

    policy: np.ndarray
    reference: np.ndarray
    tokens: np.ndarray
    answer: np.ndarray


def rows(case: DPOCase) -> Iterator[dict[str, Any]]:
    """Races a case's losses; those of other packages are left out where they are not installed.

    Raises:
        RuntimeError: a peer's value differs beyond rounding.
    """
    pairs = draw(case)
    arrays = [jnp.asarray(x) for x in (pairs.policy, pairs.reference, pairs.tokens, pairs.answer)]
    ours = jax.value_and_grad(partial(loss, beta=case.beta))
    programs = list(_torch_programs(pairs, beta=case.beta, items=case.pairs)) if harness.has("torch") else []
    programs.append(harness.compile_program(ours, arrays, name="dpo, jax", items=case.pairs))
    expected = jax.tree.map(np.asarray, programs[-1].call())
    errors = [_errors(program.name, program.call(), expected) for program in programs]
    results = harness.race(programs, rounds=case.rounds)
    baseline = results[0][0]
    for (record, _), error in zip(results, errors, strict=True):
        ratio = harness.speedup(record, over=baseline)
        yield asdict(record) | error | {
            "case": case.name, "window": case.tokens, "over": baseline.name, "speedup": ratio.median,
            "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
        }  # fmt: skip


def draw(case: DPOCase) -> Pairs:
    """Draws logits of a policy near its reference, and answers of different lengths."""
    rng = np.random.default_rng(0)
    shape = (2 * case.pairs, case.tokens, case.vocab_size)
    reference = rng.normal(size=shape, scale=2.0).astype(np.float32)
    policy = reference + rng.normal(size=shape, scale=0.3).astype(np.float32)
    ends = rng.integers(case.tokens // 2, case.tokens + 1, size=(2 * case.pairs, 1))
    position = np.arange(case.tokens)[None, :]
    tokens = rng.integers(case.vocab_size, size=shape[:2])
    return Pairs(policy, reference, tokens, (position >= case.tokens // 3) & (position < ends))


def loss(policy: jax.Array, reference: jax.Array, tokens: jax.Array, answer: jax.Array, *, beta: float) -> jax.Array:
    """Returns our mean loss of a batch of :class:`Pairs`."""
    policy, reference = (losses.token_logprobs(x[:, :-1], tokens[:, 1:]) for x in (policy, reference))
    margins = losses.sequence_logprobs(policy - reference, answer[:, 1:], reduction="sum")
    return jnp.mean(dpo.dpo(*jnp.split(margins, 2), weight_chosen=beta, weight_rejected=beta))


def _errors(name: str, output: Any, expected: Any) -> dict[str, float]:
    value, gradient = (np.asarray(x) for x in output)
    error = harness.max_relative_error(value, expected[0])
    # Written so that a nan is refused.
    if not error <= _TOLERANCE:
        raise RuntimeError(f"{name} has another value: relative error {error:.1e}, expected at most {_TOLERANCE:g}")
    return {"loss_error": error, "gradient_error": harness.max_relative_error(gradient, expected[1])}


def _torch_programs(pairs: Pairs, *, beta: float, items: int) -> Iterator[Program]:
    import torch

    policy = torch.from_numpy(pairs.policy).requires_grad_(True)
    reference, tokens, answer = (torch.from_numpy(x) for x in (pairs.reference, pairs.tokens, pairs.answer))

    def with_gradient(fn: Callable[..., Any]) -> tuple[Any, Any]:
        value = fn(policy, reference, tokens, answer, beta=beta)
        return value.detach(), torch.autograd.grad(value, policy)[0]

    if harness.has("trl"):
        yield Program("dpo, TRL", partial(with_gradient, trl_loss), items=items)
    yield Program("dpo, torch, textbook", partial(with_gradient, textbook), items=items)


def textbook(policy: Any, reference: Any, tokens: Any, answer: Any, *, beta: float) -> Any:
    """Returns the mean loss as written in Rafailov et al. 2023, eq. 7, of torch tensors."""
    from torch.nn import functional

    def sequence(logits: Any) -> Any:
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (chosen * answer[:, 1:]).sum(-1)

    preferred, dispreferred = (sequence(policy) - sequence(reference)).chunk(2)
    return -functional.logsigmoid(beta * (preferred - dispreferred)).mean()


def trl_loss(policy: Any, reference: Any, tokens: Any, answer: Any, *, beta: float) -> Any:
    """Returns the mean loss that TRL's trainer computes, of torch tensors."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import selective_log_softmax

    def per_token(logits: Any) -> Any:
        return selective_log_softmax(logits[:, :-1], tokens[:, 1:]) * answer[:, 1:]

    def model(**_: Any) -> SimpleNamespace:
        nothing = torch.zeros(tokens[:, 1:].shape)
        return SimpleNamespace(
            log_probs=per_token(policy), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    with torch.no_grad():
        chosen, rejected = per_token(reference).sum(1).chunk(2)
    inputs = {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": answer.long(),
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    return DPOTrainer._compute_loss(_light_trainer(beta), model, inputs, False)


def _light_trainer(beta: float) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        beta=beta, loss_types=["sigmoid"], loss_weights=[1.0], label_smoothing=0.0, f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
