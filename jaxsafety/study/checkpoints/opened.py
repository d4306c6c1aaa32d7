"""The checkpoints of a study: directories of models, opened, alike, and told from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxsafety.formats import hf
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.formats.hf_tensors import is_unknown
from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Given
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study.checkpoints.batches import Encoded
from jaxsafety.study.pipeline import Study
from jaxsafety.subjects.checkpoint import Config

# What a matrix of one has to have in common with that of the other; positions and window may differ.
_SHAPES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width")
_SAMPLED_BYTES = 64  # of every tensor
_CHOICES = ("tied", "qkv_bias", "out_bias", "mlp_bias", "norms", "norm_offset", "query_norm", "activation")


# Of a model that nobody here runs there are the tensors alone.
Model = hf.Checkpoint | hf.TensorFiles


@dataclass(frozen=True)
class Looked:
    """What an analysis is given: one model of one seed.

    Attributes:
        name: for progress and messages.
        own: the model.
        base: what its update is from; None for one that begins with none.
        folder: where its pieces of this analysis lie.
        labels: the columns that all of its result rows share.
        about: the study's subject.
        encoded: the prompts, None without any.
        answers: token ids of what it answered to each; None where it was not asked.
        verdicts: of each answer what the judge says.
    """

    name: str
    own: Model
    base: Model | None
    folder: Path
    labels: dict[str, Any]
    about: Config
    encoded: Encoded | None = None
    answers: list[list[int]] | None = None
    verdicts: tuple[Verdict, ...] | None = None

    @property
    def complied(self) -> Bool[np.ndarray, " n"] | None:
        """Whether the answers comply."""
        return None if self.verdicts is None else np.array(self.verdicts) == "complied"


def of_lane(study: Study, lane: Lane, seed: int) -> Model:
    """Opens one seed of a lane's model, see :func:`of_directory`."""
    return of_directory(study.recipe, study.model(lane, seed))


def of_directory(recipe: Recipe, directory: Path) -> Model:
    """Opens a model: its tensors alone where nothing but weights is compared, by name or of a model type not known.

    Raises:
        ValueError, FileNotFoundError: see :func:`jaxsafety.formats.hf.open_checkpoint` and ``open_tensors``.
    """
    by_name = any(getattr(node.options, "is_by_name", False) for node in recipe.analyses.values())
    if is_of_weights(recipe) and (by_name or is_unknown(directory)):
        return hf.open_tensors(directory)
    return hf.open_checkpoint(directory, ignored=recipe.subject.options.ignore_config)


def is_of_weights(recipe: Recipe) -> bool:
    """Whether a recipe asks for weights of given models alone, for which nobody has to run them."""
    given = all(isinstance(lane.how, Given) for lane in recipe.lanes) and recipe.subject.options.prompts is None
    return given and all(node.analysis == "weights" for node in recipe.analyses.values())


def check_alike(one: Model, other: Model, *, vocabulary: bool = True) -> None:
    """Checks that one of two checkpoints can have been tuned from the other.

    ``vocabulary`` is whether they must have the same number of tokens.

    Raises:
        ValueError: they are one, or differ in a shape; both sides are named.
    """
    places = (one.directory, other.directory)
    if places[0].resolve() == places[1].resolve():
        raise ValueError(f"{places[0]} is given as two models: expected a model and what was tuned from it")
    if not (isinstance(one, hf.Checkpoint) and isinstance(other, hf.Checkpoint)):
        kinds = [hf.open_tensors(place).kind for place in places]
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(
                f"{places[0]} and {places[1]} have different architectures: model_type is {kinds[0]!r} and {kinds[1]!r}"
            )
        return
    for name in ("vocab_size", *_SHAPES, *_CHOICES)[not vocabulary :]:
        ours, theirs = getattr(one.config, name), getattr(other.config, name)
        if ours != theirs:
            what = "vocabularies" if name == "vocab_size" else "architectures"
            raise ValueError(
                f"{places[0]} and {places[1]} have different {what}: {name} is {ours} and {theirs}, expected a model "
                "and what was tuned from it"
            )


def fingerprint(checkpoint: Model) -> str:
    """Returns what tells a checkpoint from others without reading it: a digest of a few bytes of every tensor."""
    # The file, not what is read from it: that also holds how this library runs a model.
    file = checkpoint.directory / CONFIG_FILE
    digest = hashlib.sha256(file.read_bytes() if file.is_file() else b"")
    for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: (str(tensor.file), tensor.start)):
        digest.update(f"{tensor.name} {tensor.code} {tensor.shape}".encode())
        with tensor.file.open("rb") as file:
            file.seek((tensor.start + tensor.stop) // 2)
            digest.update(file.read(min(_SAMPLED_BYTES, (tensor.stop - tensor.start) // 2)))
    return digest.hexdigest()[:16]
