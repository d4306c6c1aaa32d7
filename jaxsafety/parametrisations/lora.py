"""Low-rank adapters: two factors beside each chosen matrix, whose product is added to it; nothing else moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxsafety import tree
from jaxsafety.config.fields import check as check_fields
from jaxsafety.config.fields import static, traced
from jaxsafety.config.names import check_name
from jaxsafety.models import lora
from jaxsafety.types import Key, Parametrisation, Params


@dataclass(frozen=True)
class Config:
    """Which matrices, and how far their product counts.

    Attributes:
        rank: of the product, r.
        alpha: the product counts ``alpha / r`` times.
        targets: names of matrices of the blocks: q, k, v, o, up, down, and gate where a model has one; or embed and
            unembed, of a model whose unembedding is not its embedding.

    References:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1. Fidelity: faithful; adapters of MLP matrices are ours.
    """

    rank: int = static(8, at_least=1)
    alpha: float = traced(16.0, above=0)
    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down")

    def __post_init__(self):
        check_fields(self)
        for name in self.targets:
            check_name("target of an adapter", name, (*lora.TARGETS, *lora.OUTER))
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name distinct matrices, got {list(self.targets)}")


def init(trees: dict[str, Params], *, config: Config, key: Key) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    return lora.init(trees["parent"], rank=config.rank, targets=config.targets, key=key)


def join(trees: dict[str, Params], trained: Any, *, config: Config, key: Key | None = None) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    factors = tree.flatten(trained)

    def added(path: str, leaf: Any) -> Any:
        if f"{path}_lora_a" not in factors:
            return leaf
        product = factors[f"{path}_lora_a"] @ factors[f"{path}_lora_b"]
        return leaf + (config.alpha / config.rank) * product

    return tree.label(trees["parent"], added)


PARAMETRISATION = Parametrisation(Config, init, join)
