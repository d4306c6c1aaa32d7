"""Worlds that seeds draw: of one kind, so that one program serves them all, but no two the same.

A drawn world keeps the tokens, the lengths and which derivations its grammars allow. Its own are the operators'
bijections, which operators a policy makes unsafe (as many as before), and the grammars' probabilities. Permuting token
ids alone would vary nothing: to a fresh model all ids are alike. Duplicates stay those of their operators, so that
JB-MisGen has something unsafe to ask for: in the tiny world this leaves the one operator that is always unsafe, and
draws which others are safe; since all bijections are new, another name for it would vary nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from jaxsafety.world import pcfg_text
from jaxsafety.world.operators import Policy
from jaxsafety.world.spec import World, WorldSpec

# Two equiprobable alternatives become Beta(4, 4): half of the time between 0.38 and 0.62, seldom beyond 0.15 and 0.85.
CONCENTRATION = 4.0
# A policy must leave JB-MisGen something to ask for: one draw in 16 of the tiny world's does.
_DRAWS = 10_000


def redrawn(spec: WorldSpec, *, seed: int) -> WorldSpec:
    """Returns the spec that a seed draws: bijections anew, and each PCFG's policy with its operators permuted.

    Policies that are no world's, because no duplicate that JB-MisGen asks with is unsafe, are drawn again.

    Raises:
        ValueError: none of so many permutations makes a world.
    """
    below = 2**31 - len(spec.operators) - len(spec.late_operators)
    bijections = tuple(_generator(seed, "bijections").integers(below, size=len(spec.policies)).tolist())
    policies = _generator(seed, "policies")
    for _ in range(_DRAWS):
        drawn = tuple(_permuted(policy, spec.operators[1:], policies) for policy in spec.policies)
        try:
            return replace(spec, permutation_seeds=bijections, policies=drawn)
        except ValueError as error:
            problem = error
    raise ValueError(f"none of {_DRAWS} policies that seed {seed} has drawn makes a world; of the last {problem}")


def reweighted(text: str, *, seed: int, part: str) -> str:
    """Returns rules in NLTK's notation with the probabilities that a seed draws.

    An alternative's probability is multiplied by a factor from Gamma(4), then those of a symbol are normalised: of
    equiprobable ones this is a draw from Dirichlet(4, ..., 4). The factor belongs to the alternative, wherever in a
    ``part`` (``upper``, or the leaves of one PCFG) it stands, so a text condition stays the part that it was of
    another: safe text is what full text is where only its derivations are taken. What was impossible stays so.
    """
    start, productions = pcfg_text.read(text, where=part)
    weights = [rule.prob * _factor(rule, seed, part) for rule in productions]
    sums: dict[pcfg_text.Nonterminal, tuple[float, float]] = {}
    for rule, weight in zip(productions, weights, strict=True):
        before, after = sums.get(rule.lhs, (0.0, 0.0))
        sums[rule.lhs] = before + rule.prob, after + weight
    lines = [f"%start {start}"] if start != productions[0].lhs else []
    for rule, weight in zip(productions, weights, strict=True):
        before, after = sums[rule.lhs]
        # The sum stays what it was: where it is not 1, or nothing is possible, the compiler says so as ever.
        lines.append(pcfg_text.spell(rule._replace(prob=weight * before / after if after else 0.0)))
    return "\n".join([*lines, ""])


def together(worlds: Sequence[World]) -> World:
    """Returns worlds of one kind as one, of which :meth:`~jaxsafety.world.spec.World.at` takes one by its place."""
    return replace(worlds[0], among=tuple(worlds))


def _generator(seed: int, *of: str) -> np.random.Generator:
    """What one thing of a seed's world is drawn from, whatever else is drawn."""
    digest = sha256("\n".join((str(seed), *of)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _permuted(policy: Policy, operators: Sequence[str], generator: np.random.Generator) -> Policy:
    image = dict(zip(operators, generator.permutation(operators).tolist(), strict=True))

    def of(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(image[name] for name in names)

    return Policy(of(policy.always_unsafe), of(policy.always_safe), of(policy.branch_dependent))


def _factor(rule: pcfg_text.Production, seed: int, part: str) -> float:
    return _generator(seed, part, pcfg_text.spell(rule._replace(prob=0.0))).gamma(CONCENTRATION)
