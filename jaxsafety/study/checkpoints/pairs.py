"""Pairs of matrices of two checkpoints by the names of their tensors: which are compared, and why others are not."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jaxsafety.formats import safetensors_file
from jaxsafety.formats.hf_tensors import TensorFiles
from jaxsafety.formats.safetensors_file import Tensor

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|blk)\.(\d+)\.")
# The names that figures have for the matrices of a layer, by the last word or two of others' names.
_PARTS = {
    "gate": r"(mlp|ffn|feed_forward)\.(gate_proj|w1)",
    "up": r"(mlp|ffn|feed_forward)\.(up_proj|w3|c_fc|fc_in|fc1|dense_h_to_4h)",
    "down": r"(mlp|ffn|feed_forward)\.(down_proj|w2|c_proj|fc_out|fc2|dense_4h_to_h)",
    "q": r"(self_attn|attn|attention)\.(q_proj|wq|query)",
    "k": r"(self_attn|attn|attention)\.(k_proj|wk|key)",
    "v": r"(self_attn|attn|attention)\.(v_proj|wv|value)",
    "o": r"(self_attn|attn|attention|self_attention)\.(o_proj|out_proj|wo|c_proj|dense)",
}


@dataclass(frozen=True)
class Pair:
    """What two checkpoints hold under one name.

    Attributes:
        name: of the tensor.
        layer: the number in its name, from 0; None outside of layers.
        part: what it is in its layer: one of ours, such as ``up``, or the rest of its name.
        shapes: in base and tuned, as stored; None where it is not there.
        rows: how many of them are compared, the first, which both have.
        left_out: why it is not compared, empty if it is.
    """

    name: str
    layer: int | None
    part: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    rows: int = 0
    left_out: str = ""

    @property
    def is_common(self) -> bool:
        """Whether rows of only one of the two are left out."""
        return not self.left_out and self.shapes[0] != self.shapes[1]


def find(base: TensorFiles, tuned: TensorFiles, *, include: str = "", exclude: str = "") -> list[Pair]:
    """Returns what two checkpoints hold, by layer and name.

    ``include`` and ``exclude`` are regular expressions that are looked for in a name; empty ones choose nothing.
    """
    names = {name: _place(name) for name in (*base.tensors, *tuned.tensors)}
    made = [_pair(name, *names[name], base, tuned, include=include, exclude=exclude) for name in names]
    several = Counter((pair.layer, pair.part) for pair in made if not pair.left_out)
    made = [replace(pair, part=_whole(pair.name)) if several[pair.layer, pair.part] > 1 else pair for pair in made]
    return sorted(made, key=lambda pair: (-1 if pair.layer is None else pair.layer, pair.name))


def told(pairs: Sequence[Pair]) -> str:
    """Returns a sentence on what is compared and what is not."""
    reasons = Counter(pair.left_out for pair in pairs if pair.left_out)
    left = f"; left out: {', '.join(f'{count} ({reason})' for reason, count in reasons.items())}" if reasons else ""
    common = [
        f"{pair.name} has {pair.shapes[0][0]} and {pair.shapes[1][0]} rows, of which the first {pair.rows} are compared"
        for pair in pairs
        if pair.is_common
    ]
    return f"{_count(pairs)} pairs of matrices by name{left}{''.join(f'; {one}' for one in common)}"


def _count(pairs: Iterable[Pair]) -> int:
    return sum(not pair.left_out for pair in pairs)


def _pair(
    name: str, layer: int | None, part: str, base: TensorFiles, tuned: TensorFiles, *, include: str, exclude: str
) -> Pair:
    tensors = base.tensors.get(name), tuned.tensors.get(name)
    shapes = tuple(one and one.shape for one in tensors)
    rows = [one.shape[0] if one is not None and one.shape else 0 for one in tensors]
    reason = _reason(name, tensors, (base, tuned), include=include, exclude=exclude)
    return Pair(name, layer, part, shapes, 0 if reason else min(rows), reason)


def _reason(
    name: str, tensors: tuple[Tensor | None, Tensor | None], sides: tuple[TensorFiles, TensorFiles], *, include: str,
    exclude: str,
) -> str:  # fmt: skip
    for one, side in zip(tensors, reversed(sides), strict=True):
        if one is None:
            return f"in {side.directory} alone"
    if exclude and re.search(exclude, name):
        return "excluded"
    if include and not re.search(include, name):
        return "not included"
    for one in tensors:
        if len(one.shape) != 2:
            return f"{len(one.shape)} axes" if len(one.shape) != 1 else "a vector"
        if one.code not in safetensors_file.DTYPES:
            return f"stored as {one.code}"
        if 0 in one.shape:
            return "empty"
    first, second = (one.shape for one in tensors)
    if first == second:
        return ""
    of_tokens = all(one.shape[0] == side.vocab_size for one, side in zip(tensors, sides, strict=True))
    return "" if of_tokens and first[1] == second[1] else "of different shapes"


def _place(name: str) -> tuple[int | None, str]:
    """The layer in a name, and what the tensor is there."""
    own, found = name.removesuffix(".weight"), _LAYER.search(name)
    if found is None:
        return None, own
    rest = own[found.end() :]
    part = next((part for part, pattern in _PARTS.items() if re.fullmatch(pattern, rest)), rest)
    return int(found[1]), part


def _whole(name: str) -> str:
    """A name without the number of its layer, which tells it from others that are called alike."""
    return _LAYER.sub(lambda found: found[0].replace(f"{found[1]}.", "", 1), name, count=1).removesuffix(".weight")
