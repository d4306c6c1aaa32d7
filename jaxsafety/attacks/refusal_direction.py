"""The refusal direction: one direction of the residual stream, without which a model no longer refuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, static, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.linalg import refusing_text
from jaxsafety.linalg.contrasts import ablated
from jaxsafety.linalg.descent import unit
from jaxsafety.linalg.refusing import Ranking, Scores, added, candidates, ranked, removed, scored
from jaxsafety.types import Asked, Attack, Attacked, Key, Leaf, Model, Params, Point, Section, Target, Trial, Written

# What writes to the residual stream: its last axis is the stream's.
WRITES = r"embed|positions|blocks/(attn/o|mlp/down)(_bias|_lora_b)?"
Scalar = float | Float[Array, ""]


@checked
def orthogonalised(params: Params, unit: Float[Array, " d"], *, strength: Scalar = 1.0) -> Params:
    """Returns the parameters with all that writes to the residual stream made orthogonal to a direction.

    These are the embeddings, learned positions, and the last matrices and biases of attention and MLPs.

    Raises:
        ValueError: no parameter has such a path.

    References:
        Arditi et al. 2024 (arXiv 2406.11717), weight orthogonalisation.

    Fidelity: as ablating at every layer and position where the stream is a sum of what is written; a GPT of this
        package adds sinusoidal positions that are no weights, and that of the paper's block is normalised in between.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": jnp.float32([[1.0, 2.0], [3.0, 4.0]])}
        >>> print(orthogonalised(params, jnp.float32([1.0, 0.0]))["embed"])
        [[0. 2.]
         [0. 4.]]
    """
    writes = tree.select(params, WRITES)
    return tree.label(params, lambda path, leaf: ablated(leaf, unit, strength=strength) if path in writes else leaf)


@flax.struct.dataclass
class Found:
    """All candidates and what came of them.

    Attributes:
        directions: ``[l, p, d]`` differences of means.
        scores: what each does, see :class:`jaxsafety.linalg.refusing.Scores`.
        ranking: which is best, and why each was kept or dropped, see :class:`jaxsafety.linalg.refusing.Ranking`.
    """

    directions: Leaf
    scores: Scores
    ranking: Ranking


@checked
def select(
    model: Model, params: Params, held_out: Trial, *, positions: int = 1, prompts: int = 32, most_kl: Scalar = 0.1,
    depth: Scalar = 0.8,
) -> Found:  # fmt: skip
    """Finds and ranks candidates on ``[2, b, ...]`` safe and unsafe prompts; the arguments are those of ``Config``.

    Raises:
        ValueError: fewer than two pairs.
    """
    count = held_out.last.shape[1]
    if count < 2:
        raise ValueError(f"held_out: got {count} pair of prompts, expected at least 2: some make, others score")
    first = count - min(prompts, count // 2)
    makes, scores = (
        jax.tree.map(lambda leaf: leaf[:, :first], held_out),
        jax.tree.map(lambda leaf: leaf[:, first:], held_out),
    )
    directions = candidates(model, params, makes, positions=positions)
    found = scored(model, params, scores, directions)
    return Found(directions, found, ranked(found, most_kl=most_kl, depth=depth))


@dataclass(frozen=True)
class Config:
    """What is done with the direction, how it is chosen, and how far.

    Attributes:
        how: ``ablate`` it from the residual stream of every layer and position; ``add`` the negative difference of
            means at its layer; or ``orthogonalise`` the weights.
        positions: last prompt tokens whose candidates there are.
        prompts: held-out pairs that candidates are scored on, at most half of them; the others make the candidates.
            Over a checkpoint they are of one half of the prompts of the file, and the other half is answered.
        most_kl: see :func:`jaxsafety.linalg.refusing.ranked`.
        depth: see :func:`jaxsafety.linalg.refusing.ranked`.
        strength: 1 is the whole of it.

    References: Arditi et al. 2024 (arXiv 2406.11717).
    Fidelity: the rule and its thresholds are the paper's, directions are of what a layer hands on, not of what it is
        given, and where no candidate is kept the best of all is used (``kept`` is 0 then). Over a checkpoint refusing
        is scored as in the paper, by the log-odds of the first tokens of some refusals in English. Weights of a model
        whose embeddings are tied lose the direction in the unembedding, too, and norms behind attention and MLPs write
        it anew: there orthogonalising does not do what ablating does.
    """

    how: Literal["ablate", "add", "orthogonalise"] = "ablate"
    positions: int = static(1, at_least=1)
    prompts: int = static(32, at_least=1)
    most_kl: float = static(0.1, above=0)
    depth: float = static(0.8, above=0, at_most=1)
    strength: tuple[float, ...] = swept(0.0, 0.5, 1.0)
    __post_init__ = check


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`; metrics are of the chosen candidate."""
    given = {"positions": config.positions, "prompts": config.prompts, "most_kl": config.most_kl, "depth": config.depth}
    found = select(target.model, target.params, target.held_out, **given)
    told = _best(found.directions, found.scores, found.ranking)
    vector, layer, each = told.pop("vector"), told["layer"], target.trial.last.shape
    metrics = {name: jnp.broadcast_to(one.astype(jnp.float32), each) for name, one in told.items()}
    return _done(target, config.how, vector, layer, point["strength"])._replace(metrics=metrics)


def _find(model: Model, params: Params, asked: Asked, config: Config) -> dict[str, Array]:
    """The best candidate and what came of it, over a checkpoint."""
    makes, parts = refusing_text.split(asked, prompts=config.prompts)
    directions = refusing_text.candidates(model, params, asked, makes=makes, positions=config.positions)
    scores = refusing_text.scored(model, params, parts, directions, refusals=asked.refusals)
    return _best(directions, scores, ranked(scores, most_kl=config.most_kl, depth=config.depth))


def _best(directions: Array, scores: Scores, ranking: Ranking) -> dict[str, Array]:
    best, (_, positions, width) = ranking.order[0], directions.shape
    told = {name: getattr(scores, name).reshape(-1)[best] for name in ("bypass", "induce", "kl")}
    told |= {"layer": best // positions, "position": best % positions, "kept": ranking.reason[best] == 0}
    return told | {"vector": directions.reshape(-1, width)[best]}


def _written(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    return _done(target, config.how, target.found["vector"], target.found["layer"], point["strength"])


def _done(target: Target, how: str, vector: Array, layer: Array, strength: Scalar) -> Attacked:
    if how == "add":
        return Attacked(edit=partial(added, at=layer, vector=-strength * vector))
    if how == "orthogonalise":
        return Attacked(params=orthogonalised(target.params, unit(vector), strength=strength))
    return Attacked(edit=partial(removed, unit=unit(vector), strength=strength))


SECTION = Section(
    "The refusal direction",
    "arXiv 2406.11717",
    "To the right more of one direction is taken out of the model: where refusals turn into compliance and safe "
    "prompts are still answered, refusing hangs on that direction alone.",
)
ATTACK = Attack(Config, attack, section=SECTION, written=Written(_written, find=_find))
