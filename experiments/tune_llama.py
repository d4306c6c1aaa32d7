"""``python -m experiments.tune_llama RUN``: a small Llama, trained and tuned to refuse, by a recipe over checkpoints.

It writes random parameters with a tokenizer for every seed, examples, prompts and the recipe, and runs that: a base is
trained from each, and tuned by every method; every model answers the prompts and is compared with what it was tuned
from. Killed, the same command goes on.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from tokenizers import Tokenizer

from experiments import llama_world
from experiments.llama_world import Asked
from jaxsafety import keys
from jaxsafety.claims.intervals import student_interval
from jaxsafety.config import yaml12
from jaxsafety.formats import hf, prompts, rule_judge
from jaxsafety.models import llama
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic, machine

_COMMAND = (sys.executable, "-c", "import sys; from jaxsafety.cli.main import main; sys.exit(main())")
# Weights of paper_small.yaml.
_WEIGHTS = {
    "sft": {},
    "dpo": {"weight_chosen": 6.28931e-4, "weight_rejected": 6.28931e-6},
    "unlearn": {"weight_chosen": 1.0, "weight_rejected": 0.1, "ascent_bound": 5.0, "reduction": "mean"},
}
_BATCH = 32
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
        OSError: a file cannot be read or written.
    """
    asked, recipe, folder = llama_world.asked(), out / "recipe.yaml", out / "run"
    out.mkdir(parents=True, exist_ok=True)
    for seed in setting.seeds:
        write_start(out / f"start{seed}", seed, setting)
    atomic.atomic_write(out / "prompts.jsonl", prompts.to_jsonl(prompts.own()))
    atomic.atomic_write(out / "base.jsonl", llama_world.base_examples(asked))
    atomic.atomic_write(out / "pairs.jsonl", llama_world.tuning_pairs(asked))
    atomic.atomic_write(recipe, yaml12.dump(written(setting, asked)))
    words = ["run", str(recipe), "--out", str(folder)]
    print(f"jaxsafety {shlex.join(words)}", file=sys.stderr)
    if code := subprocess.run([*_COMMAND, *words], stdout=sys.stderr).returncode:
        return code
    rows = [row | {"seed": seed} for seed in setting.seeds for row in measured(folder, seed, asked)]
    told = {"environment": machine.environment(), "rows": rows}
    atomic.atomic_write(out / "results.json", json.dumps(told) + "\n")
    print("\n".join(tables(pl.DataFrame(rows))))
    return 0


def written(setting: Setting, asked: Sequence[Asked]) -> dict[str, Any]:
    """Returns the recipe of a setting as plain data; its files lie beside it."""
    counts = [text.count("\n") for text in (llama_world.base_examples(asked), llama_world.tuning_pairs(asked))]
    steps = [-(-epochs * n // _BATCH) for epochs, n in zip((setting.base_epochs, setting.epochs), counts, strict=True)]
    shared = {"from": "base", "steps": steps[1], "batch_size": _BATCH, "role": "defence"}
    full = shared | {"lr": setting.full_lr, "parametrisation": {"kind": "full"}}
    lora = shared | {"lr": setting.lora_lr, "parametrisation": {"rank": setting.rank}}
    models = {method: full | {"method": method} | weights for method, weights in _WEIGHTS.items()}
    models |= {f"{method}-adapter": lora | {"method": method} | weights for method, weights in _WEIGHTS.items()}
    # Averaged, as the table's rows were made, when that was the command's default.
    models |= {"dpo-default": full | {"method": "dpo"}}
    models |= {"unlearn-default": full | {"method": "unlearn", "reduction": "mean"}}
    base = {
        "from": "start", "method": "sft", "steps": steps[0], "batch_size": _BATCH, "lr": setting.base_lr,
        "parametrisation": {"kind": "full"}, "data": {"file": "base.jsonl"},
    }  # fmt: skip
    start = "start{seed}"
    return {
        "subject": {
            "checkpoint": start, "pairs": "pairs.jsonl", "prompts": "prompts.jsonl", "max_tokens": 192,
            "recompute": False,
        },
        "seeds": list(setting.seeds),
        "models": {"start": {"checkpoint": start}, "base": base} | models,
        "evaluate": {"answers": 48},
        "analyze": {"base": "parent"},
        "analyses": {"weights": {"on": list(models)}, "activations": {"on": ["base", *models]}},
    }  # fmt: skip


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


def measured(run: Path, seed: int, asked: Sequence[Asked]) -> Iterator[dict[str, str | float]]:
    """Yields rows of model, kind (``refused``, ``answered`` or ``mechanics``), name and value, of one seed."""
    found = pl.read_parquet(run / "results" / "analyze.parquet").filter(seed=seed)
    names = sorted(found["method"].unique(maintain_order=True), key=lambda name: name != "base")
    for model in names:
        lines = (run / "results" / "answers" / model / f"seed_{seed}.jsonl").read_bytes().split(b"\n")[:-1]
        told = [json.loads(line)["answer"] for line in lines]
        for group in _GROUPS:
            own = [(text, one) for text, one in zip(told, asked, strict=True) if one.group == group]
            refused = float(np.mean([rule_judge.is_refusal(text) for text, _ in own]))
            answered = float(np.mean([text.strip() == one.answer for text, one in own]))
            for kind, value in {"refused": refused, "answered": answered}.items():
                yield {"model": model, "kind": kind, "name": group, "value": value}
    before = room(run / "models" / "base" / f"seed_{seed}")
    for model in names:
        if model != "base":
            rooms = {"room": room(run / "models" / model / f"seed_{seed}"), "room_base": before}
            for name, value in (mechanics(found, model) | rooms).items():
                yield {"model": model, "kind": "mechanics", "name": name, "value": value}


def mechanics(rows: pl.DataFrame, model: str) -> dict[str, float]:
    """Returns a model's means over the layers, of ``analyze.parquet``: energy of the update in the base's null space
    beyond chance, its rank, the changed norm, and the gap between safe and unsafe prompts."""

    def mean(method: str, analysis: str, metric: str, part: str) -> float:
        wanted = {"method": method, "analysis": analysis, "metric": metric, "part": part}
        return rows.filter(pl.col(name) == value for name, value in wanted.items())["value"].mean()

    space = {f"null_{part}": mean(model, "output_space", "excess_energy", part) for part in ("down", "up")}
    space |= {"rank": mean(model, "output_space", "rank_delta", "down")}
    space |= {"changed": mean(model, "output_space", "changed_norm", "down")}
    gaps = {"gap": model, "gap_base": "base"}
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
