"""Every public function on arrays: arguments, which of them have a gradient, and which a ValueError refuses one."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety import losses, tree
from jaxsafety.analysis import refusal_depth, uncertainty
from jaxsafety.attacks import embedding_pgd, emulated, gcg, prefill, refusal_direction, soft_tokens, steering
from jaxsafety.edits import (
    dare,
    hdr,
    landscape,
    layer_part,
    lox,
    pruned,
    pruned_ranks,
    rank_part,
    safe_projection,
    scaled,
    space_part,
    ties,
    transferred,
    trim,
)
from jaxsafety.edits import directions as directions_edit
from jaxsafety.linalg import (
    alignment,
    clusters,
    contrasts,
    descent,
    directions,
    kept,
    largest,
    low_rank,
    masked,
    power,
    probes,
    refusing,
    refusing_text,
    sensitivity,
    subspace,
    svd,
    update_spaces,
)
from jaxsafety.methods import (
    adversarial,
    circuit_breakers,
    classify,
    constrained,
    constrained_sft,
    deep_alignment,
    derta,
    dpo,
    graddiff,
    ipo,
    npo,
    primal_dual,
    rmu,
    robust_dpo,
    sft,
    simnpo,
    simpo,
    tamper_resistant,
    unlearn,
)
from jaxsafety.models import generation, gpt, gru, inputs, llama, lora
from jaxsafety.parametrisations import mask as gates
from jaxsafety.training import dual, preferences, recovery
from jaxsafety.types import Batch

L, B, T, V, D, F, R = 2, 3, 4, 5, 4, 6, 2
SIZES = {"vocab_size": V, "max_tokens": 2 * T, "layers": 1, "heads": 2, "width": D}
GPT = gpt.GPTConfig(**SIZES)
LLAMA = llama.LlamaConfig(**SIZES, kv_heads=1, mlp_width=F, head_width=2)
KEY = jax.random.key(0)
_RNG = np.random.default_rng(0)


class Case(NamedTuple):
    """A public function, its arrays by argument, and the names of those with a gradient, and of those refused one."""

    call: Any
    arrays: dict[str, Any]
    smooth: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def weighted(found):
    """A number that every float of a result moves."""
    leaves = [leaf for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)) for leaf in leaves)


def normal(*shape):
    return _RNG.normal(size=shape).astype(np.float32)


def basis(*shape):
    return np.linalg.qr(normal(*shape))[0]


def params_of(module, config):
    """Weights of order one for the shapes that a model begins with."""
    shapes = jax.eval_shape(partial(module.init, config), key=KEY)
    return jax.tree.map(lambda leaf: 0.5 * normal(*leaf.shape), shapes)


LOGITS, TARGETS = normal(B, T, V), _RNG.integers(0, V, (B, T)).astype(np.int32)
LOGPROBS, MASK = -np.abs(normal(B, T)), np.arange(T)[None] >= np.array([0, 1, 2])[:, None]
BASE, DELTA = normal(L, D, F), 0.1 * normal(L, D, F)
VALUES = np.sort(np.abs(normal(L, D)), axis=-1)[:, ::-1].copy()
VECTORS, BASIS, OTHER = normal(L, B, F), basis(L, F, R), basis(L, F, R)
SAFE, UNSAFE = normal(L, B, F), normal(L, B, F) + 1
MEANS = clusters.Centroids(normal(L, F), normal(L, F))
TREES = {"base": {"blocks": {"mlp": {"up": BASE}}}, "delta": {"blocks": {"mlp": {"up": DELTA}}}}
SQUARED = np.einsum("lrm,lrn->lmn", DELTA.mT, DELTA.mT)
MOMENTS = {"safe": {"mlp.hook_in": SQUARED}, "unsafe": {"mlp.hook_in": np.einsum("lrm,lrn->lmn", BASE.mT, BASE.mT)}}
PAIR = {"a": TREES["base"], "b": TREES["delta"]}
ROWS = {"margin_chosen": normal(B), "margin_rejected": normal(B)}
WEIGHTS = {"weight_chosen": np.float32(0.3), "weight_rejected": np.float32(0.7)}
MEAN_LOGPS = {"mean_chosen": -np.abs(normal(B)), "mean_rejected": -np.abs(normal(B))}
SCALED = {"beta": np.float32(2), "gamma": np.float32(0.5)}
BETAS = {"first": np.float32(0.5), "early": np.float32(2), "late": np.float32(0.1)}
BATCH = Batch(TARGETS, TARGETS[::-1].copy(), MASK)
REFUSED = Batch(TARGETS, TARGETS[:, ::-1].copy(), MASK)
AT, KEPT = np.array([1, 2, 3], np.int32), np.array([True, True, False])
EMBEDDINGS, MARKED = normal(B, T, D), np.array([True, False, True])
STATES = {name: normal(B, T, D) for name in ("harmful", "safe", "kept")}
PLACES = {"position": np.array([1, 2, 3], np.int32), "prompt": np.arange(T)[None] < np.array([[1], [2], [3]])}
HEAD = jax.tree_util.Partial(lambda w, x: (x.cumsum(1) @ w) ** 2, normal(D, V))
TOLD = jax.tree_util.Partial(lambda w, x: ((x.cumsum(1) @ w) ** 2, x.cumsum(1)), normal(D, V))
SQUARES = jax.tree_util.Partial(lambda w, x: (w @ x) ** 2, normal(F, D))
ADVERSE = jax.tree_util.Partial(lambda w, x: jnp.sum((x @ w) ** 2 + x @ w, axis=(1, 2)), normal(D, V))
QUARTIC = jax.tree_util.Partial(
    lambda w, tree: sum(w * jnp.sum(leaf**4) for leaf in jax.tree.leaves(tree)), np.float32(0.3)
)
GPT_PARAMS, LLAMA_PARAMS = params_of(gpt, GPT), params_of(llama, LLAMA)
ADAPTER = {"blocks": {"attn": {"q_lora_a": normal(1, D, R), "q_lora_b": normal(1, R, D)}}}
GPT_MODEL, LLAMA_MODEL = gpt.model(GPT), llama.model(LLAMA)
DUAL = {"log_multiplier": 0.5, "cost": 0.3, "threshold": 0.1, "rate": 0.2}
RECURRENT = {"reads": normal(D, 3 * F), "keeps": normal(F, 3 * F), "bias": normal(3 * F)}
SHIFT = {"at": AT, "count": np.int32(1)}
ATTACK = {
    "targets": TARGETS,
    "mask": MASK,
    "at": AT,
    "count": np.int32(1),
    "radius": np.float32(1),
    "taken": np.int32(2),
}
BOTH = ("base", "delta")


def generated(model):
    return lambda params, tokens, mask: generation.generate((params, model), tokens, mask=mask, count=3, stop=(1,))


CASES = {
    "losses.token_logprobs": Case(losses.token_logprobs, {"logits": LOGITS, "targets": TARGETS}, ("logits",)),
    "losses.entropy": Case(losses.entropy, {"logits": LOGITS}, ("logits",)),
    "losses.divergence": Case(
        losses.divergence, {"logits": LOGITS, "reference": np.log(np.full_like(LOGITS, 1 / V)), "mask": MASK},
        ("logits", "reference"),
    ),
    "losses.masked_sum": Case(losses.masked_sum, {"values": LOGPROBS, "mask": MASK}, ("values",)),
    "losses.summed": Case(losses.summed, {"values": normal(B)}, ("values",)),
    "losses.quotient": Case(losses.quotient, {"total": normal(B), "count": np.float32(2)}, ("total", "count")),
    "losses.nll": Case(losses.nll, {"logprobs": LOGPROBS, "mask": MASK}, ("logprobs",)),
    "losses.bounded": Case(losses.bounded, {"logprobs": LOGPROBS, "bound": np.float32(1)}, ("logprobs", "bound")),
    "losses.sequence_logprobs": Case(
        partial(losses.sequence_logprobs, reduction="mean"), {"logprobs": LOGPROBS, "mask": MASK}, ("logprobs",)
    ),
    "losses.correct": Case(losses.correct, {"logits": LOGITS, "targets": TARGETS}),
    "losses.exact_match": Case(losses.exact_match, {"ok": TARGETS > 2, "mask": MASK}),
    "losses.token_accuracy": Case(losses.token_accuracy, {"ok": TARGETS > 2, "mask": MASK}),
    "dpo.dpo": Case(dpo.dpo, ROWS | WEIGHTS, (*ROWS, *WEIGHTS)),
    "dpo.slope": Case(dpo.slope, {"margins": normal(B)}, ("margins",)),
    "sft.sft": Case(sft.sft, {"logprobs": LOGPROBS, "mask": MASK}, ("logprobs",)),
    "unlearn.unlearn": Case(
        unlearn.unlearn, {"nll_chosen": normal(B), "nll_rejected": normal(B)} | WEIGHTS, ("nll_chosen", "nll_rejected")
    ),
    "ipo.ipo": Case(ipo.ipo, ROWS | {"tau": np.float32(0.3)}, (*ROWS, "tau")),
    "robust_dpo.robust_dpo": Case(
        robust_dpo.robust_dpo, ROWS | {"beta": np.float32(0.3), "flipped": np.float32(0.2)},
        (*ROWS, "beta", "flipped"),
    ),
    "simpo.simpo": Case(simpo.simpo, MEAN_LOGPS | SCALED, (*MEAN_LOGPS, *SCALED)),
    "npo.npo": Case(npo.npo, {"margin": normal(B), "beta": np.float32(0.3)}, ("margin", "beta")),
    "simnpo.simnpo": Case(simnpo.simnpo, {"mean": -np.abs(normal(B))} | SCALED, ("mean", *SCALED)),
    "graddiff.ascent": Case(
        partial(graddiff.ascent, reduction="mean"), {"logprobs": LOGPROBS, "mask": MASK, "bound": np.float32(1)},
        ("logprobs", "bound"),
    ),
    "primal_dual.primal_dual": Case(
        primal_dual.primal_dual,
        {"logprobs": LOGPROBS, "mask": MASK, "unsafe": KEPT, "log_multiplier": np.float32(0.5)},
        ("logprobs", "log_multiplier"),
    ),
    "preferences.margin": Case(
        partial(preferences.margin, reduction="mean"),
        {"policy": LOGPROBS, "reference": LOGPROBS[::-1].copy(), "mask": MASK}, ("policy", "reference"),
    ),
    "preferences.rewards": Case(preferences.rewards, {"chosen": normal(B), "rejected": normal(B)}),
    "dual.shares": Case(dual.shares, {"log_multiplier": np.float32(0.5)}, ("log_multiplier",)),
    "dual.dual_ascent": Case(
        dual.dual_ascent, {name: np.float32(value) for name, value in DUAL.items()}, tuple(DUAL)
    ),
    "derta.transition": Case(partial(derta.transition, aligned=False), {"chosen": REFUSED, "rejected": BATCH}),
    "deep_alignment.deep_alignment": Case(
        deep_alignment.deep_alignment,
        {"logprobs": LOGPROBS, "mask": MASK, "unsafe": KEPT, "alpha": np.float32(0.3)},
        ("logprobs", "alpha"),
    ),
    "constrained_sft.constrained_sft": Case(
        constrained_sft.constrained_sft, {"margins": LOGPROBS, "betas": np.abs(normal(B, T)) + 1}, ("margins", "betas")
    ),
    "constrained_sft.strengths": Case(
        partial(constrained_sft.strengths, early_tokens=2), {"mask": MASK} | BETAS, tuple(BETAS)
    ),
    "rmu.rmu": Case(
        partial(rmu.rmu, alpha=0.3), STATES | {"goal": normal(D), "on_harmful": MASK, "on_safe": ~MASK},
        (*STATES, "goal"),
    ),
    "circuit_breakers.cosine": Case(
        circuit_breakers.cosine, {"a": EMBEDDINGS, "b": normal(B, T, D), "mask": MASK}, ("a", "b")
    ),
    "circuit_breakers.circuit_breakers": Case(
        circuit_breakers.circuit_breakers,
        {"cosines": normal(B, L, T), "distances": np.abs(normal(B, L, T)), "on_harmful": MASK, "on_kept": ~MASK}
        | {"alpha": np.float32(3), "progress": np.float32(0.4)},
        ("cosines", "distances", "alpha", "progress"),
    ),
    "adversarial.perturbation": Case(
        partial(adversarial.perturbation, ADVERSE, width=D, steps=2), {"places": MASK, "radius": np.float32(0.5)}
    ),
    "tamper_resistant.attacked": Case(
        partial(tamper_resistant.attacked, QUARTIC, steps=2),
        {"params": TREES["base"], "rate": np.float32(0.1)},
    ),
    "tamper_resistant.halves": Case(tamper_resistant.halves, {"unsafe": MARKED}),
    "recovery.recovery": Case(
        partial(recovery.recovery, aligned=False), {"chosen": REFUSED, "rejected": BATCH, "depth": AT}
    ),
    "recovery.recovery, aligned": Case(
        partial(recovery.recovery, aligned=True), {"chosen": REFUSED, "rejected": BATCH, "depth": AT}
    ),
    "recovery.avertable": Case(recovery.avertable, {"batch": BATCH}),
    "classify.classify": Case(
        classify.classify, {"logits": normal(B), "undesirable": np.array([True, False, True])}, ("logits",)
    ),
    "constrained.lagrangian": Case(
        constrained.lagrangian, {"returns": normal(B), "costs": normal(B), "log_multiplier": np.float32(0.5)},
        ("returns", "costs", "log_multiplier"),
    ),
    "constrained.score_function": Case(
        constrained.score_function, {"logprobs": LOGPROBS, "values": normal(B, T)}, ("logprobs",)
    ),
    "tree.difference": Case(tree.difference, {"tuned": TREES["base"], "base": TREES["delta"]}, ("tuned", "base")),
    "tree.interpolate": Case(tree.interpolate, TREES | {"alpha": np.float32(0.5)}, (*BOTH, "alpha")),
    "directions.ordered": Case(
        partial(directions.ordered, choice="random", key=KEY), {"delta": BASE}, refused=("delta",)
    ),
    "directions.directions_part": Case(
        partial(directions_edit.directions_part, choice="singular"), {"delta": TREES["delta"], "rank": np.int32(2)},
        refused=("delta",),
    ),
    "kept.energy_kept": Case(
        partial(kept.energy_kept, side="outputs"), {"delta": BASE, "basis": BASE.mT, "counts": np.array([1, 2])},
        ("delta", "basis"),
    ),
    "kept.known_directions": Case(
        partial(kept.known_directions, count=2), {"before": BASE, "after": 2 * BASE}, refused=("before", "after")
    ),
    "kept.like": Case(partial(kept.like, key=KEY), {"delta": BASE}, refused=("delta",)),
    "svd.decompose": Case(svd.decompose, {"matrices": BASE}, refused=("matrices",)),
    "svd.decompose, gram": Case(partial(svd.decompose, method="gram", rank=1), {"matrices": BASE}),
    "svd.decompose, randomized": Case(
        partial(svd.decompose, method="randomized", rank=2, chunk=1, key=KEY), {"matrices": BASE}
    ),
    "subspace.rank_at_energy": Case(subspace.rank_at_energy, {"values": VALUES, "energy": np.float32(0.9)}),
    "subspace.rank_at_tolerance": Case(subspace.rank_at_tolerance, {"values": VALUES, "tolerance": np.float32(0.3)}),
    "subspace.leading": Case(partial(subspace.leading, size=R), {"rank": np.array([1, 2])}),
    "subspace.projection_energy": Case(
        subspace.projection_energy, {"vectors": VECTORS, "basis": BASIS}, ("vectors", "basis")
    ),
    "subspace.complement_energy": Case(
        subspace.complement_energy, {"vectors": VECTORS, "basis": BASIS}, ("vectors", "basis")
    ),
    "subspace.principal_angles": Case(
        subspace.principal_angles, {"basis_a": BASIS, "basis_b": OTHER}, refused=("basis_a", "basis_b")
    ),
    "subspace.stable_rank": Case(subspace.stable_rank, {"values": VALUES}, ("values",)),
    "subspace.effective_rank": Case(subspace.effective_rank, {"values": VALUES}, ("values",)),
    "subspace.cosine": Case(subspace.cosine, {"a": BASE, "b": DELTA}, ("a", "b")),
    "subspace.random_energy": Case(partial(subspace.random_energy, dimension=F), {"rank": np.array([1, 2])}),
    "subspace.random_norm": Case(partial(subspace.random_norm, dimension=F), {"rank": np.array([1, 2])}),
    "subspace.sample_random_energy": Case(
        partial(subspace.sample_random_energy, key=KEY, samples=3), {"basis": BASIS}, ("basis",)
    ),
    "power.largest_singular_value": Case(
        partial(power.largest_singular_value, SQUARES, key=KEY), {"point": normal(D)}, refused=("point",)
    ),
    "masked.norm": Case(partial(masked.norm, axis=(1, 2)), {"values": BASE}, ("values",)),
    "masked.averaged": Case(masked.averaged, {"values": LOGPROBS, "weights": MASK}, ("values",)),
    "update_spaces.output_space": Case(
        update_spaces.output_space, {"base": BASE, "delta": DELTA, "energy": np.float32(0.9)}, refused=BOTH
    ),
    "update_spaces.output_space, gram": Case(
        partial(update_spaces.output_space, method="gram", energy=0.5), {"base": BASE, "delta": DELTA}
    ),
    "update_spaces.both_spaces": Case(
        partial(update_spaces.both_spaces, method="randomized", rank=2, key=KEY), {"base": BASE, "delta": DELTA},
        refused=BOTH,
    ),
    "update_spaces.range_basis": Case(update_spaces.range_basis, {"base": BASE}, refused=("base",)),
    "update_spaces.input_space": Case(
        update_spaces.input_space, {"base": BASE, "delta": DELTA, "inputs": normal(L, B, D)}, ("base", "inputs"),
        ("delta",),
    ),
    "update_spaces.changed_norm": Case(update_spaces.changed_norm, {"base": BASE, "delta": DELTA}, BOTH),
    "clusters.centroids": Case(
        clusters.centroids, {"safe": SAFE, "unsafe": UNSAFE, "safe_weights": KEPT}, ("safe", "unsafe")
    ),
    "clusters.tau": Case(clusters.tau, {"activations": SAFE, "centroids": MEANS}, ("activations", "centroids")),
    "clusters.tau, cosine": Case(
        partial(clusters.tau, form="cosine"), {"activations": SAFE, "centroids": MEANS}, ("activations", "centroids")
    ),
    "clusters.relative_tau": Case(
        clusters.relative_tau, {"activations": SAFE, "centroids": MEANS}, ("activations", "centroids")
    ),
    "clusters.separation": Case(
        clusters.separation,
        {"tau_safe": normal(L, B), "tau_unsafe": normal(L, B), "centroids": MEANS, "safe_weights": KEPT},
        ("tau_safe", "tau_unsafe"),
    ),
    "clusters.leading_share": Case(
        clusters.leading_share, {"activations": SAFE, "weights": KEPT}, refused=("activations",)
    ),
    "sensitivity.gradient_norm": Case(
        partial(sensitivity.gradient_norm, HEAD), {"embeddings": EMBEDDINGS} | PLACES, ("embeddings",)
    ),
    "sensitivity.jacobian_norm": Case(
        partial(sensitivity.jacobian_norm, HEAD, key=KEY), {"embeddings": EMBEDDINGS} | PLACES, refused=("embeddings",)
    ),
    "alignment.align": Case(
        partial(alignment.align, rank=R), {"delta_a": TREES["base"], "delta_b": TREES["delta"]},
        refused=("delta_a", "delta_b"),
    ),
    "alignment.overlap": Case(alignment.overlap, {"angles": np.abs(normal(L, R))}, ("angles",)),
    "alignment.tree_cosine": Case(alignment.tree_cosine, PAIR, ("a", "b")),
    "scaled.part_delta": Case(partial(scaled.part_delta, part="mlp"), {"delta": TREES["delta"]}, ("delta",)),
    "scaled.tree_part": Case(partial(scaled.tree_part, pattern=".*/up"), {"delta": TREES["delta"]}, ("delta",)),
    "scaled.scaled": Case(scaled.scaled, TREES | {"alpha": np.float32(0.5)}, (*BOTH, "alpha")),
    "transferred.transferred": Case(
        transferred.transferred, {"tuned": TREES["base"], "other_delta": TREES["delta"], "alpha": np.float32(0.5)},
        ("tuned", "other_delta", "alpha"),
    ),
    "trim.trimmed": Case(trim.trimmed, {"delta": TREES["delta"], "keep": np.float32(0.4)}, ("delta",)),
    "hdr.harm_removed": Case(
        hdr.harm_removed,
        {"target": TREES["base"], "harm_delta": TREES["delta"], "keep": np.float32(0.4), "scale": np.float32(2)},
        ("target", "harm_delta", "scale"),
    ),
    "ties.merged": Case(
        ties.merged, {"deltas": [TREES["base"], TREES["delta"]], "keep": np.float32(0.4)}, ("deltas",)
    ),
    "dare.dropped": Case(
        partial(dare.dropped, key=KEY), {"delta": TREES["delta"], "drop": np.float32(0.5)}, ("delta", "drop")
    ),
    "landscape.landscape": Case(
        partial(landscape.landscape, key=KEY),
        {"params": TREES["base"], "alpha": np.float32(0.3), "beta": np.float32(-0.2), "direction": np.int32(1)},
        ("params", "alpha", "beta"),
    ),
    "landscape.visage": Case(
        landscape.visage,
        {"success": np.abs(np.tanh(normal(B, T))), "alphas": np.linspace(-0.4, 0.4, T, dtype=np.float32),
         "capability": np.ones((B, T), np.float32)},
        ("success",),
    ),
    "layer_part.layer_part": Case(
        layer_part.layer_part, {"delta": TREES["delta"], "layer": np.int32(1)}, ("delta",)
    ),
    "rank_part.rank_part": Case(
        rank_part.rank_part, {"delta": TREES["delta"], "rank": np.int32(2)}, refused=("delta",)
    ),
    "low_rank.truncated": Case(
        low_rank.truncated, {"matrices": DELTA, "rank": np.int32(2)}, refused=("matrices",)
    ),
    "lox.extrapolated": Case(
        lox.extrapolated,
        {"aligned": TREES["base"], "base": TREES["delta"], "rank": np.int32(2), "alpha": np.float32(0.5)},
        ("alpha",),
    ),
    "safe_projection.onto_alignment": Case(
        safe_projection.onto_alignment, {"update": DELTA, "alignment": BASE}, ("update", "alignment")
    ),
    "safe_projection.similarity": Case(
        safe_projection.similarity, {"update": DELTA, "alignment": BASE}, ("update", "alignment")
    ),
    "safe_projection.projected": Case(
        safe_projection.projected,
        {"tuned": TREES["base"], "aligned": TREES["delta"], "base": {"blocks": {"mlp": {"up": normal(L, D, F)}}},
         "threshold": np.float32(2)},
        ("tuned", "aligned", "base"),
    ),
    "largest.largest": Case(largest.largest, {"values": BASE, "count": np.int32(3)}),
    "pruned.importance": Case(
        pruned.importance, {"weights": BASE, "moments": SQUARED}, ("weights", "moments")
    ),
    "pruned.critical": Case(
        pruned.critical,
        {"unsafe": BASE, "safe": DELTA, "safety": np.float32(0.4), "utility": np.float32(0.2)},
    ),
    "pruned.pruned": Case(
        pruned.pruned,
        {"params": TREES["base"], "moments": MOMENTS, "safety": np.float32(0.4), "utility": np.float32(0.2)},
        ("params",),
    ),
    "pruned_ranks.without_directions": Case(
        pruned_ranks.without_directions,
        {"weights": BASE, "unsafe": BASIS, "safe": OTHER, "safety": np.int32(2), "utility": np.int32(1)},
        ("weights", "unsafe", "safe"),
    ),
    "pruned_ranks.ranks_removed": Case(
        pruned_ranks.ranks_removed,
        {"params": TREES["base"], "moments": MOMENTS, "safety": np.int32(2), "utility": np.int32(1)},
    ),
    "space_part.space_part": Case(
        partial(space_part.space_part, space="random", keep="only", key=KEY), TREES, ("delta",), ("base",)
    ),
    "soft_tokens.insert": Case(
        soft_tokens.insert, {"array": EMBEDDINGS, "inserted": normal(B, R, D)} | SHIFT, ("array", "inserted")
    ),
    "soft_tokens.shifted": Case(partial(soft_tokens.shifted, fill=0), {"array": TARGETS} | SHIFT),
    "soft_tokens.shifted_mask": Case(soft_tokens.shifted_mask, {"mask": MASK} | SHIFT),
    "soft_tokens.fits": Case(soft_tokens.fits, {"mask": MASK} | SHIFT),
    "soft_tokens.optimise": Case(
        partial(soft_tokens.optimise, HEAD, max_count=R, steps=2, key=KEY), {"embeddings": EMBEDDINGS} | ATTACK,
        refused=("embeddings",),
    ),
    "descent.unit": Case(descent.unit, {"vectors": EMBEDDINGS}, ("vectors",)),
    "descent.projected": Case(
        descent.projected, {"vectors": EMBEDDINGS, "radius": np.float32(0.5)}, ("vectors", "radius")
    ),
    "embedding_pgd.distance": Case(
        embedding_pgd.distance, {"hidden": EMBEDDINGS, "reference": normal(B, T, D), "mask": MASK},
        ("hidden", "reference"),
    ),
    "embedding_pgd.perturb": Case(
        partial(embedding_pgd.perturb, TOLD, steps=2),
        {"embeddings": EMBEDDINGS, "targets": TARGETS, "mask": MASK, "prompt": ~MASK, "radius": np.float32(1),
         "match": np.float32(0.5), "reference": normal(B, T, D)},
        refused=("embeddings",),
    ),
    "gcg.search": Case(
        partial(gcg.search, HEAD, max_count=R, steps=2, top_k=2, candidates=3, key=KEY),
        {"tokens": TARGETS, "table": normal(V, D), "allowed": np.arange(V) > 0, "targets": TARGETS, "mask": MASK}
        | SHIFT,
        refused=("table",),
    ),
    "probes.fit": Case(probes.fit, {"activations": normal(2, B, D), "labels": MARKED}, refused=("activations",)),
    "probes.scores": Case(
        probes.scores, {"probe": probes.Probe(normal(2, D), normal(2)), "activations": normal(2, B, D)},
        ("activations",),
    ),
    "probes.auc": Case(probes.auc, {"scores": normal(2, B), "labels": MARKED}),
    "contrasts.direction": Case(
        partial(contrasts.direction, component="first"), {"differences": normal(2, B, D)}, refused=("differences",)
    ),
    "contrasts.ablated": Case(
        contrasts.ablated, {"values": EMBEDDINGS, "unit": normal(D), "strength": np.float32(0.5)},
        ("values", "unit", "strength"),
    ),
    "refusing.refusal_score": Case(
        refusing.refusal_score, {"logits": LOGITS[:, 0], "refusal": TARGETS[:, 0], "complied": AT}, ("logits",)
    ),
    "refusing_text.refusal_odds": Case(
        refusing_text.refusal_odds, {"logits": LOGITS[:, 0], "refusals": np.array([0, 2], np.int32)}, ("logits",)
    ),
    "refusing.removed": Case(
        partial(refusing.removed, "hook_resid_mid"), {"layer": np.int32(1), "positions": TARGETS, "h": EMBEDDINGS,
         "unit": normal(D), "strength": np.float32(0.5)}, ("h", "unit", "strength"),
    ),
    "refusing.added": Case(
        partial(refusing.added, "hook_resid_post"), {"layer": np.int32(1), "positions": TARGETS, "h": EMBEDDINGS,
         "at": np.int32(1), "vector": normal(D)}, ("h", "vector"),
    ),
    "refusing.ranked": Case(
        refusing.ranked, {"scores": refusing.Scores(normal(L, T), normal(L, T), normal(L, T)), "most_kl": np.float32(0)}
    ),
    "refusal_direction.orthogonalised": Case(
        refusal_direction.orthogonalised,
        {"params": {"blocks": {"mlp": {"down": BASE, "up": DELTA}}}, "unit": normal(F), "strength": np.float32(0.5)},
        ("params", "unit", "strength"),
    ),
    "steering.steered": Case(steering.steered, {"h": EMBEDDINGS, "unit": normal(D), "alpha": np.float32(0.5)}, ("h",)),
    "emulated.combined": Case(
        partial(emulated.combined, weights=[np.float32(0.5)]),
        {"target": VALUES, "tuned": [VALUES], "reference": [VALUES]},
        ("target", "tuned", "reference"),
    ),
    "prefill.prefilled": Case(prefill.prefilled, {"complied": BATCH, "refused": REFUSED, "depth": np.int32(1)}),
    "prefill.complied_after": Case(prefill.complied_after, {"complied": BATCH, "depth": np.int32(1)}),
    "prefill.beyond": Case(prefill.beyond, {"mask": MASK, "depth": np.int32(1)}),
    "refusal_depth.first_refusal": Case(
        refusal_depth.first_refusal, {"predicted": TARGETS, "complied": BATCH, "refused": REFUSED}
    ),
    "uncertainty.perplexity": Case(uncertainty.perplexity, {"logprobs": LOGPROBS, "mask": MASK}, ("logprobs",)),
    "uncertainty.halves": Case(partial(uncertainty.halves, key=KEY), {"letters": MASK, "count": np.int32(1)}),
    "uncertainty.replaced": Case(
        partial(uncertainty.replaced, key=KEY), {"tokens": TARGETS, "places": MASK, "by": np.arange(V) > 1}
    ),
    "mask.gated": Case(
        gates.gated, {"delta": TREES["delta"], "gates": jax.tree.map(np.abs, TREES["delta"]), "scale": np.float32(2)},
        ("delta", "gates", "scale"),
    ),
    "lora.joined": Case(
        lora.joined, {"params": LLAMA_PARAMS, "adapter": ADAPTER, "scale": np.float32(2)},
        ("params", "adapter", "scale"),
    ),
    "gru.gru": Case(gru.gru, {"params": RECURRENT, "x": EMBEDDINGS}, ("params", "x")),
    # Models compute in float32: tests/models compares their gradients with oracles.
    "inputs.embed": Case(inputs.embed, {"params": GPT_PARAMS, "tokens": TARGETS}),
    "gpt.apply": Case(
        partial(gpt.apply, config=GPT, sites=("mlp.hook_post",)),
        {"params": GPT_PARAMS, "inputs": TARGETS, "at": AT[:, None], "positions": AT[:, None]},
    ),
    "llama.apply": Case(
        partial(llama.apply, config=LLAMA), {"params": LLAMA_PARAMS, "inputs": TARGETS, "mask": MASK}
    ),
    "generation.generate, windowed": Case(
        generated(GPT_MODEL), {"params": GPT_PARAMS, "tokens": TARGETS, "mask": MASK}
    ),
    "generation.generate": Case(
        generated(LLAMA_MODEL), {"params": LLAMA_PARAMS, "tokens": TARGETS, "mask": MASK}
    ),
}  # fmt: skip
