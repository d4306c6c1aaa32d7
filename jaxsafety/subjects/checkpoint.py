"""Hugging Face checkpoints of the Llama family: models are directories, each worked on by itself.

Examples and prompts are files of one's own. A model without ``method`` is a checkpoint as it is, and one that is
trained begins with another and is written as such a directory.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxsafety.config.fields import check, static
from jaxsafety.config.names import SEED
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.lora import TARGETS
from jaxsafety.types import Subject

# The model that the others begin with, where a recipe names none.
FIRST = "pretrained"
# What a model that is trained is like unless its recipe says otherwise.
TRAINED: dict[str, Any] = {"batch_size": 8, "lr": 1e-4, "chunk_steps": 10}
OPTIM: dict[str, Any] = {"weight_decay": 0.0}
ADAPTER: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 32.0}
# The judge of answers that is built in.
RULE = "rule"


def is_verdict_file(judge: str) -> bool:
    """Whether a judge is a file of verdicts, not the built-in rule or a function ``package.module:name``."""
    return judge != RULE and re.fullmatch(r"[\w.]+:\w+", judge) is None


@dataclass(frozen=True)
class Config:
    """The checkpoint, the files, and how models read and compute.

    Attributes:
        checkpoint: the model that others begin with: its directory, its GGUF file, or its name on the Hub,
            ``org/name`` or ``org/name@revision``, also with an adapter, ``BASE+ADAPTER``; ``{seed}`` in it stands for
            each of the seeds.
        pairs: JSONL, JSON, CSV or Parquet of prompts and answers that models are trained on, where their ``data.file``
            names no other.
        prompts: such a file of labelled prompts, as ``jaxsafety prompts`` writes, that models are judged and analysed
            on.
        columns: names of ours for the columns of these files where they differ, ``prompt=goal``.
        judges: who says whether answers refuse, the first decides: ``rule`` (None), a function of prompt and answer as
            ``package.module:name``, or a file of verdicts by id.
        tokenizer: model whose tokenizer and template all models read with; None is that of the checkpoint.
        template: ``chat``, the tokenizer's own, or ``raw``, prompts as they are.
        special_tokens: what becomes of special tokens that prompts and answers spell: ``control``, tokens that act as
            such, as in transformers, or ``text``, their letters; those of the template act in either case.
        max_tokens: inputs of a sequence; of longer prompts and examples the middle, then the end is cut.
        dtype: what products are rounded to, and what weights that stay are held in; an optimiser's state, an adapter
            and, where all parameters are trained, the copy that updates are added to are float32.
        stored_dtype: ``bfloat16`` (with ``dtype``) keeps the activations of training in bfloat16 between operations and
            for the backward pass, about half of their memory and its traffic.
        store: type that models are written in, also those given as a base and an adapter; None is that of the
            checkpoint.
        export: what is written of a model that is trained as an adapter: the model with it ``merged``, the ``adapter``
            as PEFT reads it, or ``both``.
        recompute: whether layers are run again for their gradients, which takes less memory.
        ignore_config: attributes of a ``config.json`` that are passed over though nobody here knows them, as they do
            not matter; none that the model goes by.
        batch_tokens: places of a batch of prompts, padding included, that a model reads or answers.
    """

    checkpoint: str
    pairs: Path | None = None
    prompts: Path | None = None
    columns: tuple[str, ...] | None = None
    judges: tuple[str, ...] | None = None
    tokenizer: Path | None = None
    template: Literal["chat", "raw"] = "chat"
    special_tokens: Literal["control", "text"] = "control"
    max_tokens: int = static(1024, at_least=2)
    dtype: ComputeDtype = "float32"
    stored_dtype: ComputeDtype = "float32"
    store: Literal["float32", "float16", "bfloat16"] | None = None
    export: Literal["merged", "adapter", "both"] = "merged"
    recompute: bool = True
    ignore_config: tuple[str, ...] = ()
    batch_tokens: int = static(4096, at_least=1)

    def __post_init__(self):
        check(self)
        if self.stored_dtype == "bfloat16" != self.dtype:
            raise ValueError("stored_dtype: got 'bfloat16', expected dtype bfloat16 as well")
        for name in ("pairs", "prompts", "tokenizer"):
            if SEED in str(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected one for all seeds, without {SEED}")


def models(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`jaxsafety.types.Subject`."""
    first = any(isinstance(one, Mapping) and "checkpoint" in one and "from" not in one for one in given.values())
    found: dict[str, Any] = {} if first else {FIRST: {"checkpoint": config.checkpoint}}
    return found | {label: _completed(one) for label, one in given.items()}


def _completed(given: Any) -> Any:
    """A model's fields with the defaults of one that is trained over a checkpoint, where it is."""
    trained = isinstance(given, Mapping) and not {"checkpoint", "edit", "select"} & set(given)
    if not trained or isinstance(given.get("from"), Mapping):
        return given
    part, data, optim = (given.get(name, {}) for name in ("parametrisation", "data", "optim"))
    found = TRAINED | dict(given)
    if isinstance(part, Mapping):
        adapter = ADAPTER | {"targets": list(TARGETS)} | dict(part)
        found["parametrisation"] = adapter if part.get("kind", "lora") == "lora" else part
    if isinstance(data, Mapping):
        found["data"] = {"pool": "pairs"} | dict(data)
    if isinstance(optim, Mapping):
        found["optim"] = OPTIM | dict(optim)
    return found


_NOTES = (
    "Activations are the MLP's inputs after its norm, as in the paper's experiments on real models, at the last token "
    "of the prompt and, where answers were written, in the mean over the answer's tokens. The means of safe and unsafe "
    "prompts that a prompt is measured with are those of the other half of the prompts.",
    "By the built-in rule an answer counts as refused if it begins like a refusal in English (a list of openings); as "
    "other if it says nothing, repeats the prompt, runs in a loop, is in another script than the prompt, or was cut "
    "off within three words; else as complied: whether it is of any use is not judged. Claims rest on complied.",
    "A checkpoint that all seeds begin with stands in every seed's rows with the same value, for differences from it. "
    "Where no model differs between the seeds there is one seed.",
)


def notes(config: Config) -> tuple[str, ...]:
    """See :class:`jaxsafety.types.Subject`."""
    return _NOTES


SUBJECT = Subject(Config, None, (), models=models, notes=notes)
