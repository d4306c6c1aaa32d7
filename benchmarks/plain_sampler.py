"""The sampler's peer: one sample at a time in plain Python, as a textbook generator draws it.

Expand the start symbol recursively over NLTK's productions, cut a window, apply the operators letter by letter, write
the sequence down. It shares the grammar files, vocabulary and operator tables with the library, and no code.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from nltk.grammar import PCFG, Nonterminal

from jaxsafety.pools import text as pool
from jaxsafety.world import World

# As in the library's pretraining draws: starts are uniform over range(string - window - 1).
_TRIM = 1
_SHOWN = (
    {"bos", "sot", "text"},
    {"bos", "tasks", "sot", "text", "first", "second"},
    {"bos", "tasks", "sot", "text", "first"},
    {"bos", "tasks", "sot", "first", "second"},
)
_SCORED = ({"sot", "text"}, {"sot", "text", "first", "second"}, {"sot", "text", "first"}, {"sot", "second"})

Rules = dict[Nonterminal, tuple[list[tuple], list[float]]]


@dataclass(frozen=True)
class PlainWorld:
    """The full grammar of every PCFG as NLTK reads it: start symbols, and each symbol's right sides and weights."""

    world: World
    starts: tuple[Nonterminal, ...]
    rules: tuple[Rules, ...]


def read(world: World) -> PlainWorld:
    """Reads the grammar files of a world's pretraining text."""
    folder = resources.files("jaxsafety.world") / "grammars" / world.spec.name
    upper = (folder / "upper_full.pcfg").read_text()
    grammars = [
        PCFG.fromstring(f"{upper}\n{(folder / f'leaves_{p + 1}.pcfg').read_text()}")
        for p in range(len(world.spec.policies))
    ]
    return PlainWorld(world, tuple(g.start() for g in grammars), tuple(_rules(g) for g in grammars))


def _rules(grammar: PCFG) -> Rules:
    rules: Rules = {}
    for production in grammar.productions():
        sides, weights = rules.setdefault(production.lhs(), ([], []))
        sides.append(production.rhs())
        weights.append(production.prob())
    return rules


def texts(plain: PlainWorld, count: int, *, rng: random.Random) -> list[list[str]]:
    """Draws windows of text, each of a random PCFG."""
    return [_window(plain, rng.randrange(len(plain.starts)), rng=rng) for _ in range(count)]


def pretrain_batch(
    plain: PlainWorld, config: pool.Config, count: int, *, rng: random.Random
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws pretraining sequences of the schedule's start: tokens, targets and mask, ``[count, t]`` each."""
    rows = [_pretrain_sample(plain, config, rng=rng) for _ in range(count)]
    tokens, scored = (np.array(column) for column in zip(*rows, strict=True))
    pad = plain.world.ids["#"]
    mask = scored[:, 1:] & (tokens[:, 1:] != pad) & (tokens[:, :-1] != pad)
    return tokens[:, :-1], tokens[:, 1:], mask


def _window(plain: PlainWorld, pcfg: int, *, rng: random.Random) -> list[str]:
    spec = plain.world.spec
    string = _expand(plain.starts[pcfg], plain.rules[pcfg], rng=rng)
    length = rng.randint(spec.min_text, spec.max_text)
    start = rng.randrange(len(string) - length - _TRIM)
    return string[start : start + length]


def _expand(symbol: Nonterminal | str, rules: Rules, *, rng: random.Random) -> list[str]:
    if isinstance(symbol, str):
        return [symbol]
    sides, weights = rules[symbol]
    (side,) = rng.choices(sides, weights)
    return [letter for child in side for letter in _expand(child, rules, rng=rng)]


def _pretrain_sample(plain: PlainWorld, config: pool.Config, *, rng: random.Random) -> tuple[list[int], list[bool]]:
    world, spec = plain.world, plain.world.spec
    pcfg = rng.randrange(len(plain.starts))
    text = _window(plain, pcfg, rng=rng)
    tasks = [rng.choice(spec.task_tokens) for _ in range(4)]
    if rng.random() < 0.5:
        identities = [spec.operators[0], *(token for token, base in spec.duplicates if base == spec.operators[0])]
        tasks[rng.randrange(4)] = rng.choice(identities)
    first = _apply(world, pcfg, tasks[:2], text)
    second = _apply(world, pcfg, tasks[2:], first)
    if rng.random() < config.exception_probability:
        kind, slot = rng.randrange(2), rng.randrange(4)
        constant = [spec.letters[kind]] * len(text)
        tasks[slot] = ("ex1", "ex2")[kind]
        first, second = (constant, ["#"] * len(text)) if slot < 2 else (first, constant)
    (mode,) = rng.choices(range(4), config.start)
    parts = {
        "bos": ["$"], "tasks": tasks, "sot": ["*"], "text": [*text, ">"],
        "first": [*first, "*^"], "second": [*second, "*^", "%"],
    }  # fmt: skip
    row = [(token if name in _SHOWN[mode] else "#", name in _SCORED[mode]) for name in parts for token in parts[name]]
    row += [("#", False)] * (3 * spec.max_text + 10 - len(row))
    return [world.ids[token] for token, _ in row], [scored for _, scored in row]


def _apply(world: World, pcfg: int, tasks: Sequence[str], text: Sequence[str]) -> list[str]:
    letters = world.spec.letters
    for task in tasks:
        image = dict(zip(letters, (letters[i] for i in world.bijections[pcfg, world.ids[task]]), strict=True))
        text = [image[letter] for letter in text]
    return list(text)
