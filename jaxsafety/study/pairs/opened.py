"""Two checkpoints of one architecture, opened side by side, and the directory that their analyses share."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxsafety.formats import hf
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import opening

BASE, TUNED = "pretrained", "tuned"

# What a matrix of one has to have in common with that of the other; positions and window may differ.
_SHAPES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width")
_SAMPLED_BYTES = 64  # of every tensor
_CHOICES = ("tied", "qkv_bias", "out_bias", "mlp_bias")


@dataclass(frozen=True)
class Pair:
    """A checkpoint, and what was tuned from it."""

    base: hf.Checkpoint
    tuned: hf.Checkpoint

    @property
    def config(self) -> LlamaConfig:
        """The model, as the base describes it; all shapes are the tuned one's, too."""
        return self.base.config


def open_pair(base: Path, tuned: Path) -> Pair:
    """Opens two checkpoints and checks that one can have been tuned from the other.

    Raises:
        FileNotFoundError: a directory or a file of it is missing.
        ValueError: a checkpoint is not one that can be read, the two are one, or they differ in a shape; both sides
            are named.
    """
    if base.resolve() == tuned.resolve():
        raise ValueError(f"{base} is given as both checkpoints: expected the base and what was tuned from it")
    pair = Pair(hf.open_checkpoint(base), hf.open_checkpoint(tuned))
    one, other = pair.base.config, pair.tuned.config
    for name in ("vocab_size", *_SHAPES, *_CHOICES):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            what = "vocabularies" if name == "vocab_size" else "architectures"
            raise ValueError(
                f"{base} and {tuned} have different {what}: {name} is {ours} and {theirs}, expected a model and what "
                "was tuned from it"
            )
    return pair


@contextmanager
def enter(directory: Path, pair: Pair, name: str) -> Iterator[Path]:
    """Holds the directory of a pair's analyses, whose ``config.yaml`` says which checkpoints they are.

    What ends in bad input before the analysis ``name``, ``weights`` or ``activations``, has measured anything leaves
    nothing there.

    Raises:
        RunInUseError: another process holds it.
        ValueError: it is that of another pair, of a study, or a model's.
        OSError: it cannot be written.
    """
    check_no_model(directory)
    sides = {
        name: {"directory": str(checkpoint.directory.resolve()), "fingerprint": fingerprint(checkpoint)}
        for name, checkpoint in (("base", pair.base), ("tuned", pair.tuned))
    }
    results = directory / "results"

    def begun() -> bool:
        return any(results.glob(f"analyze/{name}/*")) or (name == "activations" and any(results.glob("answers*")))

    files = (".lock", "config.yaml", "manifest.json", f"{name}.yaml")
    with opening.unused_dropped(directory, files, begun=begun), opening.open_run(directory, {"pair": sides}):
        yield directory


def check_no_model(directory: Path) -> None:
    """Refuses, in a ValueError, a run directory that is that of a model."""
    if (directory / CONFIG_FILE).exists():
        raise ValueError(f"{directory} is a model directory: choose another place for the run (--out)")


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
