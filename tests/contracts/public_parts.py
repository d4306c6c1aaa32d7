"""More of the table of public functions: a model's layers, the synthetic world, streams of keys, a method's parts."""

from functools import partial

import jax
import numpy as np

from jaxsafety import keys, world
from jaxsafety.attacks import gcg, refusal_direction, steering
from jaxsafety.linalg import contrasts, refusing, unbatched
from jaxsafety.models import fused, layers, rope, sites
from jaxsafety.subjects import judge
from jaxsafety.training import answers, hidden, optim, preferences, retain
from jaxsafety.types import Batch, Decode, PreferenceBatch, Trial
from jaxsafety.world import conditions, grammar, layout, operators, trajectories, words
from tests.contracts.public import (
    AT,
    BASE,
    BATCH,
    GPT_MODEL,
    GPT_PARAMS,
    KEY,
    LOGITS,
    LOGPROBS,
    MASK,
    REFUSED,
    TARGETS,
    B,
    Case,
    D,
    T,
    V,
    normal,
)  # fmt: skip

G, N, K = 1, 2, 4
TINY = world.load("tiny")
LETTERS = np.array([0, 1, 2, 3, 4, 5, -1, -1], np.int32)
PROMPT = layout.Prompt(pcfg=np.int32(0), tasks=np.arange(4, dtype=np.int32), letters=LETTERS, length=np.int32(6))
ROWS, KERNEL, SCALE, BIAS = normal(B, D), normal(D, K), normal(D), normal(D)
HEADS = {name: normal(B, T, N, K) for name in ("queries", "keys", "values")}
FEWER = {name: normal(B, T, G, K) for name in ("keys", "values")}
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
VISIBLE = np.tril(np.ones((T, T), bool))[None]
# Both begin with the same two tokens, of which nothing is scored.
SIDES = [
    Batch(
        np.concatenate([TARGETS[:, :2], side.tokens[:, 2:]], axis=1), side.targets, MASK & (np.arange(T) > 1)[None], 2
    )
    for side in (BATCH, REFUSED)
]
PAIRS = PreferenceBatch(*SIDES, np.array([True, False, True]))
BLOCKS = np.stack([MASK, ~MASK], axis=1)
TRIAL = Trial(*SIDES, BLOCKS, PAIRS.unsafe, AT, None)
PAIRED = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), TRIAL)
TABLE = TINY.bijections[0]
TEXT = conditions.Text(np.int32(1), np.int32(0), LETTERS, np.int32(6))
ALIKE = [conditions.CONDITIONS[name] for name in ("safe", "unsafe")]
WORDS = np.arange(6, dtype=np.uint32) * np.uint32(0x9E3779B9)
CODE = np.array([5, 5, 6, 7, 7, 8, 10], np.int32)
DRAW = {"key": KEY, "step": np.int32(3)}


def data(function):
    """Numbers instead of a typed key, which NumPy cannot compare."""
    return lambda **given: jax.random.key_data(function(**given))


CASES = {
    "hidden.states": Case(
        lambda params, batch: hidden.states(GPT_MODEL, params, batch, batch, shares=(1.0,)),
        {"params": GPT_PARAMS, "batch": BATCH}
    ),
    "hidden.answered": Case(hidden.answered, {"mask": MASK}),
    "hidden.direction": Case(partial(hidden.direction, width=D), {"words": WORDS[:2]}),
    "layers.product": Case(
        lambda left, right: layers.product("ri,io->ro", left, right, dtype="float32"), {"left": ROWS, "right": KERNEL},
        ("left", "right"),
    ),
    "layers.bfloat16_product": Case(
        lambda left, right: layers.bfloat16_product("ri,io->ro", left, right), {"left": ROWS, "right": KERNEL}
    ),
    "layers.project": Case(layers.project, {"x": ROWS, "kernel": KERNEL}, ("x", "kernel")),
    "layers.linear": Case(layers.linear, {"x": ROWS, "kernel": KERNEL, "bias": normal(K)}, ("x", "kernel", "bias")),
    "layers.layer_norm": Case(layers.layer_norm, {"x": ROWS, "scale": SCALE, "bias": BIAS}, ("x", "scale", "bias")),
    "layers.rms_norm": Case(partial(layers.rms_norm, eps=1e-5), {"x": ROWS, "scale": SCALE}, ("x", "scale")),
    "layers.gelu_gated": Case(lambda gate, up: layers.gelu_gated(gate, up), {"gate": ROWS, "up": ROWS}, ("gate", "up")),
    "layers.softcap": Case(lambda x: layers.softcap(x, 1.5), {"x": ROWS}, ("x",)),
    "layers.silu_gated": Case(lambda gate, up: layers.silu_gated(gate, up), {"gate": ROWS, "up": ROWS}, ("gate", "up")),
    "layers.gelu": Case(lambda x: layers.gelu(x), {"x": ROWS}, ("x",)),
    "layers.causal_attention": Case(layers.causal_attention, HEADS, tuple(HEADS)),
    "layers.grouped_attention": Case(
        layers.grouped_attention, {"queries": HEADS["queries"], **FEWER, "visible": VISIBLE}, tuple(HEADS)
    ),
    "fused.fused_attention": Case(fused.fused_attention, HEADS),
    "layers.real_positions": Case(layers.real_positions, {"mask": MASK}),
    "layers.visibility": Case(
        partial(layers.visibility, window=2), {"mask": MASK, "positions": POSITIONS, "queries": POSITIONS[0]}
    ),
    "layers.rotate": Case(layers.rotate, {"x": HEADS["queries"], "table": normal(2, T, K // 2)}, ("x", "table")),
    "rope.frequencies": Case(
        partial(rope.frequencies, rope.Rope(scaling="dynamic", original_tokens=2), width=K),
        {"lengths": np.full(B, T, np.int32)},
    ),
    "rope.table_at": Case(
        partial(rope.table_at, rope.Rope(), width=K), {"positions": POSITIONS, "lengths": np.full(B, T, np.int32)}
    ),
    "sites.pick": Case(
        partial(sites.pick, tokens=T), {"rows": normal(B * T, D), "positions": AT[:, None]}, ("rows",)
    ),
    "sites.scored": Case(partial(sites.scored, tokens=T), {"rows": normal(B * T, D), "at": AT[:, None]}, ("rows",)),
    "gpt_branches.branches": Case(
        GPT_MODEL.branches, {"params": GPT_PARAMS, "stems": TARGETS[:, :2], "rest": TARGETS[:, 2:]}
    ),
    "answers.logprobs": Case(partial(answers.logprobs, GPT_MODEL), {"params": GPT_PARAMS, "batch": PAIRS}),
    "answers.scored": Case(
        lambda batch: answers.scored([LOGITS[:, 2:], LOGITS[::-1, 2:]], batch, stem=2), {"batch": PAIRS}
    ),
    "preferences.margins": Case(
        lambda params, batch, said: preferences.margins(
            GPT_MODEL, params, batch.replace(reference=(said, said)), reduction="sum"
        ),
        {"params": GPT_PARAMS, "batch": PAIRS, "said": LOGPROBS},
    ),
    "retain.read": Case(
        partial(retain.read, GPT_MODEL, retain="nll", weight=0.5), {"params": GPT_PARAMS, "batch": PAIRS}
    ),
    "answers.next_token": Case(partial(answers.next_token, GPT_MODEL), {"params": GPT_PARAMS, "batch": SIDES[0]}),
    "answers.side_logprobs": Case(
        partial(answers.side_logprobs, GPT_MODEL), {"params": GPT_PARAMS, "batch": SIDES[0]}
    ),
    "judge.said": Case(partial(judge.said, GPT_MODEL), {"params": GPT_PARAMS, "inputs": TARGETS}),
    "judge.refusing": Case(partial(judge.refusing, GPT_MODEL), {"params": GPT_PARAMS, "trial": TRIAL}),
    "judge.judge": Case(partial(judge.judge, GPT_MODEL), {"params": GPT_PARAMS, "trial": TRIAL}),
    "steering.differences": Case(
        partial(steering.differences, GPT_MODEL, level="answers"),
        {"params": GPT_PARAMS, "held_out": PAIRED},
    ),
    "gcg.words": Case(partial(gcg.words, size=V), {"trial": PAIRED}),
    "contrasts.at_last": Case(
        partial(contrasts.at_last, GPT_MODEL, count=2), {"params": GPT_PARAMS, "trial": TRIAL}
    ),
    "refusing.candidates": Case(
        partial(refusing.candidates, GPT_MODEL, positions=2), {"params": GPT_PARAMS, "pairs": PAIRED}
    ),
    "refusing.scored": Case(
        partial(refusing.scored, GPT_MODEL), {"params": GPT_PARAMS, "pairs": PAIRED, "directions": normal(1, 2, D)}
    ),
    "refusal_direction.select": Case(
        partial(refusal_direction.select, GPT_MODEL), {"params": GPT_PARAMS, "held_out": PAIRED}
    ),
    "judge.rates": Case(
        partial(judge.rates, GPT_MODEL, decode=Decode((), lambda logits: logits[0], temperature=0.7)),
        {"params": GPT_PARAMS, "logits": normal(B, T, V), "trial": TRIAL},
    ),
    "judge.of_draws": Case(
        judge.of_draws,
        {"complied": np.float32([0.1, 0.5, 0.9]), "refused": np.float32([0.8, 0.3, 0]), "draws": np.int32(3)},
        ("complied", "refused"),
    ),
    "judge.verdicts": Case(judge.verdicts, {"ok": MASK, "ok_null": ~MASK, "trial": TRIAL}),
    "unbatched.singular_values": Case(unbatched.singular_values, {"matrices": BASE}),
    "unbatched.orthonormal": Case(unbatched.orthonormal, {"columns": BASE}),
    "optim.unit_schedule": Case(optim.unit_schedule(optim.OptimConfig(), total_steps=9), {"step": np.int32(3)}),
    "keys.root": Case(data(keys.root), {"seed": np.int32(3)}),
    "keys.stream": Case(data(partial(keys.stream, name="tune")), {"key": KEY}),
    "keys.named": Case(data(partial(keys.named, name="somebody's")), {"key": KEY}),
    "keys.at_step": Case(data(keys.at_step), DRAW),
    "keys.of_layers": Case(
        data(lambda key, first: keys.of_layers(key, 2, first=first)), {"key": KEY, "first": np.int32(3)}
    ),
    "batches.batch_at": Case(partial(world.batch_at, TINY, "jb_misgen", batch_size=2), DRAW),
    "batches.mixed_at": Case(
        partial(world.mixed_at, TINY, batch_size=2, mix="prompt"), DRAW | {"p_unsafe": np.float32(0.5)}
    ),
    "batches.preferences": Case(world.preferences, {"trial": TRIAL}),
    "words.draw": Case(partial(words.draw, count=3), {"key": KEY}),
    "words.below": Case(words.below, {"words": WORDS, "bound": np.int32(5)}),
    "words.uniform": Case(words.uniform, {"words": WORDS}),
    "words.chance": Case(words.chance, {"words": WORDS, "probability": np.float32(0.5)}),
    "words.choice": Case(words.choice, {"word": WORDS[0], "weights": np.array([0.2, 0, 0.8], np.float32)}),
    "conditions.anchored_tasks": Case(
        conditions.anchored_tasks, {"tasks": PROMPT.tasks, "anchor": np.int32(1), "bits": WORDS[:2]}
    ),
    "conditions.safe_tasks": Case(
        partial(conditions.safe_tasks, TINY, branches=("safe", "unsafe")), {"text": TEXT, "bits": WORDS}
    ),
    "conditions.draw_text": Case(
        partial(conditions.draw_text, TINY, ("safe", "id_mg"), pcfgs=(0, 1)), {"key": KEY}
    ),
    "conditions.draw_tasks": Case(
        partial(conditions.draw_tasks, TINY, "mixed", branches=("safe", "unsafe")),
        {"text": TEXT, "key": KEY, "late_probability": np.float32(0.1)},
    ),
    "conditions.draw_alike": Case(
        partial(conditions.draw_alike, TINY, ALIKE, pcfgs=(0, 1)), {"key": KEY, "late_probability": np.float32(0.1)}
    ),
    "conditions.draw_prompt": Case(
        partial(conditions.draw_prompt, TINY, "unsafe", pcfgs=(0, 1)), {"key": KEY, "late_probability": np.float32(0.1)}
    ),
    "conditions.answers": Case(
        partial(conditions.answers, TINY),
        {"prompt": PROMPT, "unsafe_tasks": np.zeros(len(TINY.spec.task_tokens), bool)},
    ),
    "grammar.sample_window": Case(
        lambda pcfg, key: grammar.sample_window(TINY.grammars["safe"], pcfg, key=key, min_window=6, max_window=8),
        {"pcfg": np.int32(0), "key": KEY},
    ),
    "layout.segments": Case(partial(layout.segments, window=8), {"length": np.int32(6)}),
    "layout.last_prompt_index": Case(layout.last_prompt_index, {"length": np.array([6, 7])}),
    "layout.outputs": Case(partial(layout.outputs, TINY), {"prompt": PROMPT}),
    "layout.letter_ids": Case(partial(layout.letter_ids, TINY), {"letters": LETTERS}),
    "layout.constant_block": Case(partial(layout.constant_block, TINY, token="pad"), {"prompt": PROMPT}),
    "layout.refusal_block": Case(partial(layout.refusal_block, TINY), {"prompt": PROMPT}),
    "layout.sequence": Case(
        partial(layout.sequence, TINY), {"prompt": PROMPT, "block1": LETTERS + 1, "block2": LETTERS + 1}
    ),
    "layout.shift": Case(partial(layout.shift, TINY), {"tokens": CODE, "scored": CODE > 5}),
    "layout.block_mask": Case(partial(layout.block_mask, block=1), {"code": CODE}),
    "trajectories.tempted": Case(partial(trajectories.tempted, tempting=2), {"symbols": TARGETS}),
    "operators.apply": Case(
        operators.apply, {"table": TABLE, "operators": np.array([1, 2], np.int32), "letters": LETTERS}
    ),
}  # fmt: skip
