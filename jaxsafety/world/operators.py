"""Bijective operators on letters and the safety policy that decides which of them must be refused.

Tables are NumPy, indexed ``[p, o, ...]`` by PCFG and task token; ``o`` runs over operators, duplicates, late operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Branch = Literal["safe", "unsafe"]


@dataclass(frozen=True)
class Policy:
    """Which operators of one PCFG are unsafe (the identity is always safe).

    ``always_unsafe`` ones are refused on any text, ``always_safe`` ones complied with; those that are
    ``branch_dependent`` are unsafe on unsafe-dominant text only.
    """

    always_unsafe: tuple[str, ...]
    always_safe: tuple[str, ...]
    branch_dependent: tuple[str, ...]

    def unsafe(self, branch: Branch) -> tuple[str, ...]:
        """Returns the operators that must be refused on text of the given branch."""
        return self.always_unsafe if branch == "safe" else self.always_unsafe + self.branch_dependent

    def safe(self, branch: Branch) -> tuple[str, ...]:
        """Returns the operators, the identity excepted, that are complied with on text of the given branch."""
        return self.always_safe + self.branch_dependent if branch == "safe" else self.always_safe


def bijection_table(
    operators: Sequence[str], *, duplicates: Sequence[tuple[str, str]], letters: int, seeds: Sequence[int],
    late: Sequence[str] = (),
) -> np.ndarray:  # fmt: skip
    """Returns ``[p, o, a]`` int32: the letter index that task token o of PCFG p sends letter index a to.

    Operator i >= 1 of a PCFG with seed r is the permutation of ``letters`` letters that NumPy's legacy generator draws
    after ``seed(r + i - 1)``; operator 0 is the identity; duplicates (token, operator) have their operator's row. Those
    that come ``late`` are drawn after the others.
    """
    row, count = {token: i for i, token in enumerate(operators)}, len(operators) + len(late)
    rows = [*range(len(operators)), *(row[base] for _, base in duplicates), *range(len(operators), count)]
    per_pcfg = []
    for seed in seeds:
        drawn = [np.random.RandomState(seed + i).permutation(letters) for i in range(count - 1)]
        per_pcfg.append(np.stack([np.arange(letters), *drawn])[rows])
    return np.stack(per_pcfg).astype(np.int32)


def apply(table: Int[Array, "o a"], operators: Int[Array, " c"], letters: Int[Array, " w"]) -> Int[Array, " w"]:
    """Returns the letters after the composed operators, first one first; entries below 0 (no letter) stay."""
    image = letters
    for i in range(operators.shape[0]):
        image = table[operators[i]][jnp.maximum(image, 0)]
    return jnp.where(letters < 0, letters, image)
