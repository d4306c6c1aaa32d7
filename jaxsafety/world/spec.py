"""World records: vocabulary, operators, safety policy, lengths; the two worlds that ship, and how to load one.

A :class:`World` holds NumPy tables only, so building one touches no device. Text conditions follow the paper:
``full`` (pretraining), ``safe`` (safe-dominant), ``unsafe`` (unsafe-dominant), ``id_mg`` and ``ood_mg`` (its training
and held-out part) and ``intermediate``.

Fidelity: facts of Jain et al. 2024 (arXiv 2407.10264). Where the released code and its intent disagree, the intent
is taken:

=====================================  =====================================  ==========================================
topic                                  released code                          here
=====================================  =====================================  ==========================================
permutation seeds (start_random)       0 for all PCFGs in pretraining,        0/150/300/450 everywhere
                                       0/150/300/450 in fine-tuning
safe operators in unsafe-type text     the 8 of safe-dominant text            only those safe there (3): no
                                       (flag forgotten)                       contradictory labels
JB-MisGen pool                         flag without effect: ordinary safe     operators from the duplicates
                                       operators
JB-MisGen prompts with nothing unsafe  9 % of the set                         redrawn: they are no attack
scored targets of fine-tuning          start of text, answers, both stops,    the judged blocks with their stops
                                       end of sequence
safe prompts in DPO and unlearning     the masks of the two answers are       each answer has its own mask: both
                                       swapped: block 2 is never trained on   blocks are trained on
response log-probs of DPO, unlearning  divided by the window, 159             summed or per token; the division is in
                                                                              the weights of ``experiments/paper.yaml``
clipping in pretraining                clips gradients that are discarded     none in ``experiments/paper.yaml``
identity pool of pretraining           ``( r4 r3`` (list filled from its      ``( + ^``, identity and its duplicates
                                       wrong end)
vocabulary                             52 / 54 / 59 by script                 59 everywhere, same ids
end of sequence                        fixed index 159, behind the pads       right after the last stop token
targets predicted from a pad input     scored (stop tokens, EOS)              never scored
second composition refused,            no content target left (train split)   its block is the scored one
dispreferred side
window                                 padded to 160                          tight: 3 * longest text + 9 inputs
PCFGs of the evaluation                PCFG 1 only                            the same (the JB-MisGen duplicates are
                                                                              unsafe in PCFG 1 and 4 only)
=====================================  =====================================  ==========================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxsafety.config.names import check_name
from jaxsafety.world import grammar, operators
from jaxsafety.world.grammar import Grammar
from jaxsafety.world.operators import Policy

TextCondition = Literal["full", "safe", "unsafe", "id_mg", "ood_mg", "intermediate"]
WorldName = Literal["paper", "tiny"]

_SPECIAL = {"eot": ">", "bos": "$", "eos": "%", "sot": "*", "pad": "#", "stop": "*^"}
EXCEPTIONS = ("ex1", "ex2")


@dataclass(frozen=True)
class WorldSpec:
    """A synthetic world as data.

    Attributes:
        letters: the alphabet; its first letter is the refusal ("null") letter.
        operators: task tokens of the distinct bijections; the first is the identity.
        duplicates: task tokens that repeat an operator's bijection, seen in pretraining.
        late_duplicates: duplicate tokens reserved at the end of the vocabulary, never trained.
        misgen_tokens: the duplicates that JB-MisGen asks with (the first operator is added as the anchor).
        permutation_seeds: per PCFG, NumPy legacy seed of its first non-identity bijection.
        policies: per PCFG, which operators are unsafe where.
        eval_pcfgs: indices of the PCFGs that evaluation prompts are drawn from.
        min_text, max_text: length range of the text window, in letters, inclusive.
    """

    name: str
    letters: tuple[str, ...]
    operators: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    misgen_tokens: tuple[str, ...]
    permutation_seeds: tuple[int, ...]
    policies: tuple[Policy, ...]
    eval_pcfgs: tuple[int, ...]
    min_text: int
    max_text: int
    late_duplicates: tuple[str, ...] = ()

    @property
    def task_tokens(self) -> tuple[str, ...]:
        """Operators and duplicates: the tokens that pretraining asks with; ids 0 .. n-1."""
        return self.operators + tuple(token for token, _ in self.duplicates)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary; a token's position is its id."""
        special = tuple(_SPECIAL.values())
        return self.task_tokens + special + self.letters + EXCEPTIONS + self.late_duplicates


def _letters(first: str, count: int) -> tuple[str, ...]:
    return tuple(f"{first}{chr(ord('a') + i)}" for i in range(count))


PAPER = WorldSpec(
    name="paper",
    letters=_letters("2", 26) + _letters("3", 4),
    operators=("(", ")", "[", "]", "{", "}", "?", "!", "@", "£"),
    duplicates=(("+", "("), ("^", "("), ("r1", ")"), ("r2", ")"), ("r3", "["), ("r4", "[")),
    misgen_tokens=("+", "^", "r1", "r2"),
    permutation_seeds=(0, 150, 300, 450),
    policies=(
        Policy(always_unsafe=(")", "["), always_safe=("]", "{"), branch_dependent=("}", "?", "!", "@", "£")),
        Policy(always_unsafe=("]", "{"), always_safe=(")", "["), branch_dependent=("}", "?", "!", "@", "£")),
        Policy(always_unsafe=("@", "£"), always_safe=("?", "!"), branch_dependent=(")", "[", "]", "{", "}")),
        Policy(always_unsafe=(")", "}"), always_safe=("{", "!"), branch_dependent=("[", "]", "?", "@", "£")),
    ),
    eval_pcfgs=(0,),
    min_text=25,
    max_text=35,
    late_duplicates=("dup1", "dup2", "dup3", "dup4", "dup5"),
)

TINY = WorldSpec(
    name="tiny",
    letters=tuple("abcdefghijkl"),
    operators=("(", ")", "[", "]", "{"),
    duplicates=(("+", "("), ("r1", ")"), ("r2", ")"), ("r3", "[")),
    misgen_tokens=("+", "r1", "r2"),
    permutation_seeds=(0, 150),
    policies=(
        Policy(always_unsafe=(")",), always_safe=("[",), branch_dependent=("]", "{")),
        Policy(always_unsafe=(")",), always_safe=("]",), branch_dependent=("[", "{")),
    ),
    eval_pcfgs=(0, 1),
    min_text=6,
    max_text=8,
)


def _read(path: str | Path, condition: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the grammar file {path} of text condition {condition!r}: {error}") from error


def _leaf_names(leaves: str) -> str:
    rules = (line.split("->") for line in leaves.splitlines() if "->" in line and not line.startswith("#"))
    return ", ".join(rule[0].strip() for rule in rules)


# The authors' pretraining generator never starts a window at the last two letters, their fine-tuning one at the last.
PRETRAIN_TRIM = 1

_SPECS = {spec.name: spec for spec in (PAPER, TINY)}


@dataclass(frozen=True, eq=False)
class World:
    """A world ready to draw from. Hashed by identity: jitted functions close over it.

    Attributes:
        spec: the world as data.
        grammars: per text condition, the compiled grammars of all PCFGs.
        bijections: ``[p, o, a]`` int32, image of letter a under task token o in PCFG p.
        ids: token name to id.
    """

    spec: WorldSpec
    grammars: Mapping[str, Grammar]
    bijections: np.ndarray
    ids: Mapping[str, int] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, v."""
        return len(self.spec.tokens)

    @property
    def max_tokens(self) -> int:
        """Inputs of the longest sequence, t = 3 * max_text + 9 (the targets are shifted by one)."""
        return 3 * self.spec.max_text + 9

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of ``bos eos sot eot pad stop``."""
        return {name: self.ids[token] for name, token in _SPECIAL.items()}

    @property
    def first_letter(self) -> int:
        """Id of the first letter, the refusal letter; letter a has id ``first_letter + a``."""
        return self.ids[self.spec.letters[0]]


def load(name: str, *, grammars: Mapping[str, str | Path] | None = None) -> World:
    """Builds the world ``paper`` or ``tiny``.

    ``grammars`` are text conditions whose grammar is read from a file of the user's instead, in NLTK's PCFG notation
    over the world's letters; leaf nonterminals that it uses without defining them are the world's own.

    Raises:
        ValueError: unknown world or text condition, a grammar file that cannot be read, or a bad grammar (see
            :mod:`jaxsafety.world.grammar`).
    """
    check_name("world", name, _SPECS)
    spec = _SPECS[name]
    conditions = get_args(TextCondition)
    own = dict(grammars or {})
    for condition in own:
        check_name("text condition", condition, conditions)
    tables = {c: _load_grammar(spec, c, own.get(c)) for c in conditions}
    ids = {token: i for i, token in enumerate(spec.tokens)}
    bijections = operators.bijection_table(
        spec.operators, duplicates=spec.duplicates, letters=len(spec.letters), seeds=spec.permutation_seeds
    )
    return World(spec=spec, grammars=tables, bijections=bijections, ids=ids)


def _load_grammar(spec: WorldSpec, condition: str, path: str | Path | None) -> Grammar:
    folder = resources.files("jaxsafety.world") / "grammars" / spec.name
    upper = (folder / f"upper_{condition}.pcfg").read_text() if path is None else _read(path, condition)
    leaves = [(folder / f"leaves_{p + 1}.pcfg").read_text() for p in range(len(spec.policies))]
    name = f"{spec.name}/{condition}" if path is None else str(path)
    texts = [grammar.compose(upper, leaf, name=name) for leaf in leaves]
    compiled = grammar.compile_grammar(texts, name=name, alphabet=spec.letters)
    trim = PRETRAIN_TRIM if condition == "full" else 0
    grammar.check_window(compiled, max_window=spec.max_text, trim=trim)
    if len(set(texts)) < len(texts):
        raise ValueError(
            f"grammar {name!r} defines all its leaves itself, so its text is the same in every PCFG while their "
            f"operators differ: leave some of {_leaf_names(leaves[0])} to the world"
        )
    return compiled
