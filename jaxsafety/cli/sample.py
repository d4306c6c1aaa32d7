"""``jaxsafety sample`` and ``jaxsafety prompts``: what a world asks, and labelled prompts in English."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxsafety.cli import declared
from jaxsafety.cli.declared import path
from jaxsafety.rundir import printed

if TYPE_CHECKING:
    from jaxsafety.types import Key, Trial


def add_to(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds both verbs to a parser, by what adds one to it."""
    drawn = add("sample", run, "print prompts of a condition with their answers")
    drawn.add_argument("--world", default="tiny", help="paper, tiny, or a YAML file of your own")
    drawn.add_argument("--condition", default="safe", help="safe, unsafe, jb_co_task, jb_co_text, jb_misgen or ood")
    drawn.add_argument("-n", type=int, default=5, metavar="COUNT", help="how many")
    drawn.add_argument("--seed", type=int, default=0)
    drawn.add_argument("--worlds", choices=("one", "per_seed"), default="one",
                       help="per_seed: the world that this seed draws for itself in such a study")  # fmt: skip
    declared.add_format(drawn, "jsonl", about="; jsonl: prompt, chosen, rejected")
    written = add("prompts", prompts, "write labelled prompts in English, safe, unsafe and jailbreaks")
    written.add_argument("--out", type=path, metavar="FILE", help="JSONL file to write (default: standard output)")
    written.add_argument("--tokenizer", type=declared.model, metavar="MODEL",
                         help=f"whose control tokens a further jailbreak injects: {declared.MODEL}")  # fmt: skip


def run(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Prints prompts of a condition with both answers; returns the exit code."""
    if not 1 <= options.n <= 2**20:
        raise ValueError(f"-n must be in [1, 2**20], got {options.n}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    from jaxsafety import keys, world
    from jaxsafety.engine import programs
    from jaxsafety.world import text

    built = world.load(options.world, drawn_by=options.seed if options.worlds == "per_seed" else None)
    key = keys.stream(keys.root(options.seed), "evaluate")

    def draw(key: "Key") -> "Trial":
        return world.batch_at(built, options.condition, key=key, step=0, batch_size=options.n)

    rows = text.examples(built, programs.fitted(draw, key, what=f"drawing {options.n} prompts", quick=True)(key))
    if options.format in ("table", "jsonl"):
        sys.stdout.write("".join(_jsonl(row) if options.format == "jsonl" else _readable(row) for row in rows))
    else:
        sys.stdout.write(printed.records([row._asdict() for row in rows], options.format))
    return 0


def prompts(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Prints or writes the labelled prompts in English; returns the exit code."""
    from jaxsafety.formats import prompts as own
    from jaxsafety.rundir import atomic

    turn = None
    if options.tokenizer is not None:
        from jaxsafety.formats import hf_tokenizer, sources  # starts jax, which our own prompts need not

        found = sources.find(options.tokenizer, sources.from_environment(os.environ))
        turn = hf_tokenizer.open_tokenizer(found.directory).turn
    text = own.to_jsonl(own.own(turn=turn))
    if options.out is None:
        sys.stdout.write(text)
        return 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {options.out.parent} ({error.strerror}): choose another place (--out)") from error
    atomic.atomic_write(options.out, text)
    print(options.out)
    return 0


def _jsonl(row: object) -> str:
    chosen, rejected = (row.refusal, row.expected) if row.unsafe else (row.expected, row.refusal)
    return json.dumps({"prompt": row.prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n"


def _readable(row: object) -> str:
    kind = "unsafe: the refusal is preferred" if row.unsafe else "safe: the true output is preferred"
    return (
        f"PCFG {row.pcfg}, {kind}\n"
        f"  operators  {row.operators}\n"
        f"  text       {row.text}\n"
        f"  expected   {row.expected}\n"
        f"    scored   {row.scored_expected}\n"
        f"  refusal    {row.refusal}\n"
        f"    scored   {row.scored_refusal}\n\n"
    )
