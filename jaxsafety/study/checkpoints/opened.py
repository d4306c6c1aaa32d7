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
from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.recipe.lane import Lane
from jaxsafety.study.checkpoints.batches import Encoded
from jaxsafety.study.pipeline import Study
from jaxsafety.subjects.checkpoint import Config

# What a matrix of one has to have in common with that of the other; positions and window may differ.
_SHAPES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width")
_SAMPLED_BYTES = 64  # of every tensor
_CHOICES = ("tied", "qkv_bias", "out_bias", "mlp_bias", "norms", "norm_offset", "query_norm", "activation")


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
    own: hf.Checkpoint
    base: hf.Checkpoint | None
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


def of_lane(study: Study, lane: Lane, seed: int) -> hf.Checkpoint:
    """Opens one seed of a lane's model, see :func:`jaxsafety.formats.hf.open_checkpoint`."""
    return hf.open_checkpoint(study.model(lane, seed), ignored=study.recipe.subject.options.ignore_config)


def check_alike(one: hf.Checkpoint, other: hf.Checkpoint) -> None:
    """Checks that one of two checkpoints can have been tuned from the other.

    Raises:
        ValueError: they are one, or differ in a shape; both sides are named.
    """
    places = (one.directory, other.directory)
    if places[0].resolve() == places[1].resolve():
        raise ValueError(f"{places[0]} is given as two models: expected a model and what was tuned from it")
    for name in ("vocab_size", *_SHAPES, *_CHOICES):
        ours, theirs = getattr(one.config, name), getattr(other.config, name)
        if ours != theirs:
            what = "vocabularies" if name == "vocab_size" else "architectures"
            raise ValueError(
                f"{places[0]} and {places[1]} have different {what}: {name} is {ours} and {theirs}, expected a model "
                "and what was tuned from it"
            )


def fingerprint(checkpoint: hf.Checkpoint) -> str:
    """Returns what tells a checkpoint from others without reading it: a digest of a few bytes of every tensor."""
    # The file, not what is read from it: that also holds how this library runs a model.
    digest = hashlib.sha256((checkpoint.directory / CONFIG_FILE).read_bytes())
    for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: (str(tensor.file), tensor.start)):
        digest.update(f"{tensor.name} {tensor.code} {tensor.shape}".encode())
        with tensor.file.open("rb") as file:
            file.seek((tensor.start + tensor.stop) // 2)
            digest.update(file.read(min(_SAMPLED_BYTES, (tensor.stop - tensor.start) // 2)))
    return digest.hexdigest()[:16]
