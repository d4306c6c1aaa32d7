"""World records: vocabulary, operators, safety policy, lengths.

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsafety.config.fields import check, static
from jaxsafety.config.names import nearest
from jaxsafety.entry.checks import known
from jaxsafety.types import Leaf
from jaxsafety.world.grammar import Grammar
from jaxsafety.world.operators import Policy

TextCondition = Literal["full", "safe", "unsafe", "id_mg", "ood_mg", "intermediate"]

_SPECIAL = {"eot": ">", "bos": "$", "eos": "%", "sot": "*", "pad": "#", "stop": "*^"}
EXCEPTIONS = ("ex1", "ex2")


@dataclass(frozen=True)
class WorldSpec:
    """A synthetic world as data: the fields of a world's file.

    Attributes:
        letters: the alphabet; the first two are what the exception tokens answer.
        operators: task tokens of the distinct bijections; the first is the identity.
        duplicates: task tokens that repeat an operator's bijection, seen in pretraining, and that operator.
        late_duplicates: duplicate tokens reserved behind all others that the paper has, never trained.
        misgen_tokens: the duplicates that JB-MisGen asks with (the first operator is added as the anchor).
        permutation_seeds: per PCFG, NumPy legacy seed of its first non-identity bijection.
        policies: per PCFG, which operators are unsafe where.
        eval_pcfgs: indices of the PCFGs that evaluation prompts are drawn from.
        min_text, max_text: length range of the text window, in letters, inclusive.
        refusal: the letters of a refusal, said in turn until the block is full; empty is the first letter, as in the
            paper. Its world says one letter alone, so that a refusal is a constant answer; here it may be a phrase.
        late_operators: task tokens of further bijections that pretraining never asks with: tasks to be learned later,
            unsafe in no policy.
        persona: a token that pretraining never shows and that prompts may begin with; empty is none.
        cipher: for each letter a token that pretraining never shows, a second alphabet; empty is none.

    Raises:
        ValueError: what does not make a world; the sentence says what.
    """

    name: str
    letters: tuple[str, ...]
    operators: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    misgen_tokens: tuple[str, ...]
    permutation_seeds: tuple[int, ...] = static(at_least=0, below=2**31)
    policies: tuple[Policy, ...]
    eval_pcfgs: tuple[int, ...] = static(at_least=0)
    min_text: int = static(at_least=1)
    max_text: int = static(at_least=1)
    late_duplicates: tuple[str, ...] = ()
    refusal: tuple[str, ...] = ()
    late_operators: tuple[str, ...] = ()
    persona: str = ""
    cipher: tuple[str, ...] = ()

    def __post_init__(self):
        check(self)
        if problem := next(_problems(self), None):
            raise ValueError(problem)

    @property
    def task_tokens(self) -> tuple[str, ...]:
        """Operators and duplicates: the tokens that pretraining asks with; ids 0 .. n-1."""
        return self.operators + tuple(token for token, _ in self.duplicates)

    @property
    def asked(self) -> tuple[str, ...]:
        """All tokens that may stand for a task: those of pretraining, then late operators; ids 0 .. n-1."""
        return self.task_tokens + self.late_operators

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary; a token's position is its id."""
        special = tuple(_SPECIAL.values())
        late = self.late_duplicates + ((self.persona,) if self.persona else ()) + self.cipher
        return self.asked + special + self.letters + EXCEPTIONS + late


# The authors' pretraining generator never starts a window at the last two letters, their fine-tuning one at the last.
PRETRAIN_TRIM = 1


@dataclass(frozen=True, eq=False)
class World:
    """A world ready to draw from. Hashed by identity: jitted functions close over it.

    Attributes:
        spec: the world as data.
        grammars: per text condition, the compiled grammars of all PCFGs.
        bijections: ``[p, o, a]`` int32, image of letter a under the o-th token of ``spec.asked`` in PCFG p.
        ids: token name to id.
        among: where seeds have worlds of their own, those of all seeds, of which this is one, see :meth:`at`.
        place: which of them, int32 and maybe traced; the tables of ``spec``, ``grammars`` and ``bijections`` are then
            read by :meth:`table` alone, since those of this record are the first one's.
    """

    spec: WorldSpec
    grammars: Mapping[str, Grammar]
    bijections: np.ndarray
    ids: Mapping[str, int] = field(repr=False)
    among: tuple["World", ...] = field(default=(), repr=False)
    place: Leaf = field(default=None, repr=False)

    def at(self, place: Leaf) -> "World":
        """Returns the world in a place among several, see :func:`jaxsafety.world.drawn.together`.

        Of a place that is known it is that world itself; a traced one is looked up within the program.

        Raises:
            ValueError: there is no such place.
        """
        at = known(place)
        if at is None:
            return replace(self, place=place)
        if not 0 <= at < len(self.among):
            raise ValueError(f"place of a world: got {place}, expected an index below {len(self.among)}")
        return self.among[int(at)]

    def table(self, read: Callable[["World"], np.ndarray]) -> np.ndarray | Array:
        """Returns what ``read`` makes of this world: a table of one shape and meaning in all worlds of its kind."""
        if self.place is None and self.among:
            raise ValueError("these are several worlds: take one by its place, `world.at(place)`")
        if self.place is None:
            return read(self)
        return jnp.asarray(np.stack([read(one) for one in self.among]))[self.place]

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
        """Id of the first letter; letter a has id ``first_letter + a``."""
        return self.ids[self.spec.letters[0]]


def _problems(spec: WorldSpec) -> Iterator[str]:
    """Yields what keeps a spec from being a world's, in the order of its fields."""
    if bad := next((pair for pair in spec.duplicates if len(pair) != 2), None):
        yield f"duplicates must be pairs of a token and an operator, got {list(bad)}"
    seen: set[str] = set()
    for token in spec.tokens:
        if token in seen or not token or token.split() != [token]:
            yield f"every token must be a name of its own without spaces, got {token!r}{' twice' * (token in seen)}"
        seen.add(token)
    if len(spec.letters) < 2 or len(spec.operators) < 2:
        yield f"letters and operators must be at least two each, got {len(spec.letters)} and {len(spec.operators)}"
    for token, base in spec.duplicates:
        if base not in spec.operators:
            yield f"duplicates.{token} must be an operator, got {base!r}{nearest(base, spec.operators)}"
    for token in spec.misgen_tokens:
        if token not in dict(spec.duplicates):
            yield f"misgen_tokens must be duplicates, got {token!r}{nearest(token, dict(spec.duplicates))}"
    if not spec.policies or len(spec.policies) != len(spec.permutation_seeds):
        yield (
            f"policies and permutation_seeds must have an entry a PCFG each, got {len(spec.policies)} and "
            f"{len(spec.permutation_seeds)}"
        )
    for number, policy in enumerate(spec.policies, 1):
        yield from _policy_problems(spec, policy, f"policy {number}")
    if not spec.eval_pcfgs or max(spec.eval_pcfgs) >= len(spec.policies):
        yield f"eval_pcfgs must be indices below {len(spec.policies)}, got {list(spec.eval_pcfgs)}"
    base = dict(spec.duplicates)
    for index in spec.eval_pcfgs:
        # Or JB-MisGen has nothing to attack with.
        if not {base[token] for token in spec.misgen_tokens} & set(spec.policies[index].always_unsafe):
            yield f"misgen_tokens must have a duplicate of what policy {index + 1} makes always_unsafe, got none"
    if spec.min_text > spec.max_text:
        yield f"min_text must be at most max_text ({spec.max_text}), got {spec.min_text}"
    for letter in spec.refusal:
        if letter not in spec.letters:
            yield f"refusal must be letters, got {letter!r}{nearest(letter, spec.letters)}"
    if spec.cipher and len(spec.cipher) != len(spec.letters):
        yield f"cipher must have a token for each of the {len(spec.letters)} letters, got {len(spec.cipher)}"


def _policy_problems(spec: WorldSpec, policy: Policy, name: str) -> Iterator[str]:
    parts = (*policy.always_unsafe, *policy.always_safe, *policy.branch_dependent)
    if sorted(parts) != sorted(spec.operators[1:]):
        yield (
            f"{name} must name every operator but the first once ({', '.join(spec.operators[1:])}), "
            f"got {', '.join(parts)}"
        )
    for kind in ("always_unsafe", "always_safe", "branch_dependent"):
        if not getattr(policy, kind):
            yield f"{name}.{kind} must name at least one operator, got none"
