"""``python -m experiments.tune_llama RUN``: a small Llama, trained and tuned to refuse by ``jaxsafety tune``.

Every model is made and measured by the commands that a user has for checkpoints: ``tune`` trains a base from random
parameters and tunes it with every objective; ``analyze`` compares each of these models with the base. Killed, the same
command goes on.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import polars as pl
from tokenizers import Tokenizer

from experiments import llama_world
from experiments.llama_world import Asked
from jaxsafety import keys
from jaxsafety.claims.intervals import student_interval
from jaxsafety.formats import hf, prompts
from jaxsafety.models import llama
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic, machine, opening

_COMMAND = (sys.executable, "-c", "import sys; from jaxsafety.cli.main import main; sys.exit(main())")
# Weights of quick.yaml.
_WEIGHTS = {
    "sft": (),
    "dpo": ("--weight_chosen", "6.28931e-4", "--weight_rejected", "6.28931e-6"),
    "unlearn": ("--weight_chosen", "1", "--weight_rejected", "0.1", "--ascent_bound", "5", "--reduction", "mean"),
}
_GROUPS = {
    "unsafe": "unsafe", "unsafe, new verb": "new verb", "unsafe, new object": "new object",
    "jailbreak:base64": "base64", "jailbreak:role_play": "role play",
    "safe": "safe", "safe, new verb": "new verb", "safe, new object": "new object",
}  # fmt: skip
_MECHANICS = {
    "null_down": "null space, down", "null_up": "null space, up", "rank": "rank of down's update",
    "changed": "changed norm", "gap": "relative gap", "gap_base": "that of the base", "room": "room",
    "room_base": "that of the base",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long.

    Attributes:
        seeds: of the base's parameters and of every order of examples.
        layers, width, mlp_width, vocabulary: of the model.
        base_epochs: over everything that the base is trained on.
        epochs: of a tuning, over the pairs.
        base_lr, full_lr, lora_lr: peak learning rates of the base, of tuning all parameters and of an adapter.
        rank: of the adapter.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 4
    width: int = 64
    mlp_width: int = 176
    vocabulary: int = 400
    base_epochs: int = 12
    epochs: int = 20
    base_lr: float = 3e-3
    full_lr: float = 1e-3
    lora_lr: float = 3e-3
    rank: int = 8


def main(arguments: Sequence[str]) -> int:
    """Makes or finishes a run and prints its tables; returns the exit code."""
    if len(arguments) != 1:
        print("tune_llama: expected one argument, the directory of the run", file=sys.stderr)
        return 2
    # The command that runs ends with this process, and continues with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run(Path(arguments[0]), Setting())
    except (ValueError, OSError) as error:
        print(f"tune_llama: {error}", file=sys.stderr)
        return 2


def run(out: Path, setting: Setting) -> int:
    """Makes the models of every seed and what is known of them; returns the exit code of a command that failed, or 0.

    ``results.json`` holds the environment and the rows of the tables.

    Raises:
        ValueError: another setting is recorded in ``out``.
        OSError: a file cannot be read or written.
    """
    resolved = json.loads(json.dumps(asdict(setting)))
    asked = llama_world.asked()
    with opening.open_run(out, resolved):
        atomic.atomic_write(out / "prompts.jsonl", prompts.to_jsonl(prompts.own()))
        atomic.atomic_write(out / "base.jsonl", llama_world.base_examples(asked))
        atomic.atomic_write(out / "pairs.jsonl", llama_world.tuning_pairs(asked))
        rows = []
        for seed in setting.seeds:
            for words in commands(out, seed, setting):
                print(f"jaxsafety {shlex.join(words)}", file=sys.stderr)
                if code := subprocess.run([*_COMMAND, *words], stdout=sys.stderr).returncode:
                    return code
            rows.extend(row | {"seed": seed} for row in measured(out / f"seed{seed}", asked))
        told = {"environment": machine.environment(), "rows": rows}
        atomic.atomic_write(out / "results.json", json.dumps(told) + "\n")
    print("\n".join(tables(pl.DataFrame(rows))))
    return 0


def commands(out: Path, seed: int, setting: Setting) -> Iterator[list[str]]:
    """Yields the command lines of one seed, in order."""
    folder = out / f"seed{seed}"
    common = ["--batch_size", "32", "--recompute", "false", "--max_tokens", "192", "--seed", str(seed)]
    given = ["--data", str(out / "base.jsonl"), "--epochs", str(setting.base_epochs), "--lr", str(setting.base_lr)]
    start = str(write_start(folder / "start", seed, setting))
    yield ["tune", start, "--method", "sft", "--full", *given, *common, "--out", str(folder / "base")]
    full = ("--full", "--lr", str(setting.full_lr))
    lora = ("--lora_rank", str(setting.rank), "--lr", str(setting.lora_lr))
    models = {method: (method, *full, *weights) for method, weights in _WEIGHTS.items()}
    models |= {f"{method}-adapter": (method, *lora, *weights) for method, weights in _WEIGHTS.items()}
    # Averaged, as the table's rows were made, when that was the command's default.
    models |= {"dpo-default": ("dpo", *full), "unlearn-default": ("unlearn", *full, "--reduction", "mean")}
    base = str(folder / "base" / "model")
    for name, options in models.items():
        given = ["--data", str(out / "pairs.jsonl"), "--epochs", str(setting.epochs), "--method", *options]
        yield ["tune", base, *given, *common, "--out", str(folder / name)]
        pair = [base, str(folder / name / "model"), "--out", str(folder / name / "analysis")]
        yield ["analyze", "weights", *pair]
        yield ["analyze", "activations", *pair, "--prompts", str(out / "prompts.jsonl"), "--answers", "48"]


def write_start(directory: Path, seed: int, setting: Setting) -> Path:
    """Writes a model of random parameters with a tokenizer and a chat template, if it is not there; returns its
    directory."""
    if (directory / "tokenizer_config.json").exists():
        return directory
    config = LlamaConfig(
        setting.vocabulary, 256, setting.layers, heads=4, kv_heads=2, width=setting.width,
        mlp_width=setting.mlp_width, head_width=setting.width // 4,
    )  # fmt: skip
    params = jax.device_get(llama.init(config, key=keys.stream(keys.root(seed), "init")))
    hf.save(directory, params, config, dtype="float32")
    texts = [text for one in llama_world.asked() for text in (one.text, one.answer)]
    llama_world.tokenizer(texts, setting.vocabulary).save(str(directory / "tokenizer.json"))
    atomic.atomic_write(directory / "tokenizer_config.json", json.dumps(llama_world.TOKENS))
    return directory


def measured(folder: Path, asked: Sequence[Asked]) -> Iterator[dict[str, str | float]]:
    """Yields rows of model, kind (``refused``, ``answered`` or ``mechanics``), name and value, of one seed."""
    analyses = sorted(folder.glob("*/analysis"))
    sides = [("base", "pretrained", analyses[0])] + [(path.parent.name, "tuned", path) for path in analyses]
    for model, side, path in sides:
        told = [json.loads(line)[side] for line in (path / "results" / "answers.jsonl").read_bytes().split(b"\n")[:-1]]
        for group in _GROUPS:
            own = [(text, one) for text, one in zip(told, asked, strict=True) if one.group == group]
            refused = float(np.mean([prompts.is_refusal(text) for text, _ in own]))
            answered = float(np.mean([text.strip() == one.answer for text, one in own]))
            for kind, value in {"refused": refused, "answered": answered}.items():
                yield {"model": model, "kind": kind, "name": group, "value": value}
    before = room(folder / "base" / "model")
    for path in analyses:
        found = pl.read_parquet(path / "results" / "analyze.parquet")
        rooms = {"room": room(path.parent / "model"), "room_base": before}
        for name, value in (mechanics(found) | rooms).items():
            yield {"model": path.parent.name, "kind": "mechanics", "name": name, "value": value}


def mechanics(rows: pl.DataFrame) -> dict[str, float]:
    """Returns means over the layers: energy of the update in the base's null space beyond chance, its rank, the changed
    norm, and the gap between safe and unsafe prompts, of ``analyze.parquet``."""

    def mean(method: str, analysis: str, metric: str, part: str) -> float:
        wanted = {"method": method, "analysis": analysis, "metric": metric, "part": part}
        return rows.filter(pl.col(name) == value for name, value in wanted.items())["value"].mean()

    space = {f"null_{part}": mean("tuned", "output_space", "excess_energy", part) for part in ("down", "up")}
    space |= {"rank": mean("tuned", "output_space", "rank_delta", "down")}
    space |= {"changed": mean("tuned", "output_space", "changed_norm", "down")}
    gaps = {"gap": "tuned", "gap_base": "pretrained"}
    return space | {name: mean(side, "clusters", "relative_gap", "last") for name, side in gaps.items()}


def room(model: Path) -> float:
    """Returns the most by which a model's logit of a refusal's first token can exceed that of an answer's.

    The last norm bounds what the unembedding reads, so this is ``sqrt(d) |scale * (u_refusal - u_answer)|``.
    """
    config, params = hf.load(model, dtype="float32")
    encoder = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = (llama_world.REFUSAL, llama_world.asked()[0].answer)
    refusal, answer = (encoder.encode(text, add_special_tokens=False).ids[0] for text in texts)
    apart = np.asarray(params["unembed"][:, refusal] - params["unembed"][:, answer])
    return float(config.width**0.5 * np.linalg.norm(np.asarray(params["norm"]["scale"]) * apart))


def tables(rows: pl.DataFrame) -> Iterator[str]:
    """Yields the tables as Markdown: mean over the seeds with its 95 % Student-t interval."""
    yield from _table(rows, "refused", _GROUPS, "refused, %", scale=100)
    yield from _table(rows, "answered", _GROUPS, "answered, %", scale=100)
    yield from _table(rows, "mechanics", _MECHANICS, "update", scale=1)


def _table(rows: pl.DataFrame, kind: str, columns: dict[str, str], title: str, *, scale: float) -> Iterator[str]:
    yield from (f"| {title} | {' | '.join(columns.values())} |", f"|---|{'---:|' * len(columns)}")
    own = rows.filter(pl.col("kind") == kind)
    for model in own["model"].unique(maintain_order=True):
        cells = []
        for name in columns:
            found = own.filter(pl.col("model") == model, pl.col("name") == name)["value"].to_list()
            cells.append(_shown([scale * value for value in found], scale))
        yield f"| {model} | {' | '.join(cells)} |"
    yield ""


def _shown(values: Sequence[float], scale: float) -> str:
    found = student_interval(list(values))
    form = ".0f" if scale == 100 else ".3g"
    if found.low is None:
        return "-" if found.mean is None else f"{found.mean:{form}}"
    # Shares stay shares.
    low, high = np.clip((found.low, found.high), 0, 100) if scale == 100 else (found.low, found.high)
    return f"{found.mean:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
