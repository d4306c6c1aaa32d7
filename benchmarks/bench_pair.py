"""Two checkpoints: one update beside its base at the sizes of 7B and 8B models, and the command's memory.

A pair of matrices is measured by :func:`jaxsafety.study.checkpoints.weights.measure_matrix` with every method;
``energy_error`` is the largest difference of a null-space energy from that of the first program, ``estimate`` the
residual that the method reports itself. Each command runs as a process of its own on checkpoints in sparse files, in
which the MLPs' matrices and some rows of the embeddings are random and all else is holes; ``rss_mb`` is the most memory
that it has held (VmHWM).
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import cases, harness
from benchmarks.cases import CheckpointCase, PairCase
from benchmarks.harness import Program
from jaxsafety import keys
from jaxsafety.formats import hf_config, hf_names, prompts
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.study.checkpoints import weights

COLUMNS = {
    "name": "program", "shape": "matrices", "median_ms": "median ms", "p10_ms": "p10", "p90_ms": "p90",
    "compile_ms": "compile ms", "peak_mb": "peak MB", "rss_mb": "process MB", "speedup": "speed-up", "over": "over",
    "energy_error": "energy error", "estimate": "estimate",
}  # fmt: skip

_ENERGY = 0.9
_TOKENS = 256  # bytes
_FEW = 15
_ROOT = Path(__file__).resolve().parents[1]
_CLI = (
    "import sys; from jaxsafety.cli.main import main; code = main(); "
    "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]); sys.exit(code)"
)


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each program: pairs of matrices by case, then the command."""
    for case in cases.PAIRS:
        yield from pair_rows(case)
    with tempfile.TemporaryDirectory() as scratch:
        yield from command_rows(cases.CHECKPOINTS, Path(scratch))


def pair_rows(case: PairCase) -> Iterator[dict[str, Any]]:
    """Races the methods on one pair; the update's spectrum falls as ``i^-1``, the base is a random matrix."""
    base, tuned = random_pair(case.shape)
    programs = [
        harness.compile_program(
            partial(weights.measure_matrix, energy=_ENERGY, method=method, rank=case.rank), (base, tuned), name=method
        )
        for method in case.methods
    ]
    results = harness.race(programs, rounds=case.rounds, warmups=0)
    baseline, expected = results[0]
    for record, found in results:
        yield asdict(record) | {
            "shape": "x".join(map(str, case.shape)),
            "over": baseline.name,
            "speedup": harness.speedup(record, over=baseline).median,
            "energy_error": float(np.max(np.abs(_energies(found) - _energies(expected)))),
            "estimate": float(found["spaces"].output.errors[0]),
        }


def random_pair(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns a random matrix and one with an update of decaying spectrum, float32."""
    streams, rank = jax.random.split(keys.root(0), 3), min(256, *shape)
    base = jax.random.normal(streams[0], shape) / math.sqrt(shape[0])
    left, right = (
        jnp.linalg.qr(jax.random.normal(stream, (size, rank)))[0]
        for stream, size in zip(streams[1:], shape, strict=True)
    )
    update = (left * (0.1 / jnp.arange(1, rank + 1))[None, :]) @ right.T
    return base, base + update


def _energies(found: dict[str, Any]) -> np.ndarray:
    spaces = found["spaces"]
    return np.array([float(side.null_energy[0]) for side in (spaces.output, spaces.input)])


def command_rows(case: CheckpointCase, scratch: Path) -> Iterator[dict[str, Any]]:
    """Runs each command on a pair of checkpoints, in a process of its own."""
    base, tuned = (
        sparse_checkpoint(scratch / name, case.config, seed=seed) for seed, name in enumerate(("base", "tuned"))
    )
    every = prompts.own()
    asked = {"prompts": every, "few": every[::_FEW]}
    files = {name: scratch / f"{name}.jsonl" for name in asked}
    for name, file in files.items():
        file.write_text(prompts.to_jsonl(asked[name]))

    def command(verb: str, options: tuple[str, ...]) -> float:
        out = Path(tempfile.mkdtemp(dir=scratch)) / "out"
        arguments = ("analyze", verb, str(base), str(tuned), "--out", str(out), "--compilation_cache", "off", *options)
        done = subprocess.run([sys.executable, "-c", _CLI, *arguments], cwd=_ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the command failed: {done.stderr.strip()[-500:]}")
        shutil.rmtree(out)
        return float(done.stdout.split()[-1]) * 1024 / 1e6

    config = case.config
    shape = f"{config.layers} layers of {config.width}, {config.mlp_width}"
    for verb, options in case.commands:
        given = tuple(option.format(**files) for option in options)
        shown = [f"of {len(asked[one.strip('{}')])}" if one.strip("{}") in asked else one for one in options]
        program = Program(" ".join((verb, *shown)).replace("--prompts of", "of"), partial(command, verb, given))
        ((record, rss_mb),) = harness.race([program], rounds=1, warmups=0)
        yield asdict(record) | {"shape": shape, "rss_mb": rss_mb}


def sparse_checkpoint(directory: Path, config: LlamaConfig, *, seed: int) -> Path:
    """Writes a bfloat16 checkpoint in one sparse file, with a tokenizer of bytes and a plain chat template.

    Args:
        directory: to be made.
        config: the model.
        seed: of the random numbers: those of the MLPs' matrices and of the embeddings that the tokenizer can ask for.
    """
    directory.mkdir(parents=True)
    (directory / hf_config.CONFIG_FILE).write_text(hf_config.config_text(config, dtype="bfloat16"))
    header, end, random = {}, 0, []
    for slot in hf_names.slots(config):
        begin, end = end, end + 2 * math.prod(slot.shape)
        header[slot.name] = {"dtype": "BF16", "shape": list(slot.shape), "data_offsets": [begin, end]}
        if slot.path.startswith("blocks/mlp/"):
            random.append((begin, slot.shape))
        elif slot.path == "embed":
            random.append((begin, (_TOKENS, *slot.shape[1:])))
    text = json.dumps(header).encode()
    drawn = np.random.default_rng(seed)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, shape in random:
            file.seek(8 + len(text) + begin)
            values = drawn.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write(values.astype(ml_dtypes.bfloat16).view(np.uint8).tobytes())
        file.truncate(8 + len(text) + end)
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
