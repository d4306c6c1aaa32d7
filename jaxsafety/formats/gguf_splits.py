"""The names by which GGUF files say how byte-level BPE splits text: as the models' own ``tokenizer.json`` has it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """How byte-level BPE splits text before it merges.

    Attributes:
        pattern: regular expression of the pieces; None for GPT-2's.
        digits: whether each digit is a piece of its own, before that.
        whole: whether a piece that is a token is not merged from its parts.
        begins: whether text begins with the beginning-of-sequence token where the file does not say so.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    begins: bool = False


_ENDINGS, _WORD, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|",
    r"[^\r\n\p{L}\p{N}]?",
    r"| ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_LLAMA3 = _ENDINGS + _WORD + r"\p{L}+|\p{N}{1,3}" + _REST % ""
_QWEN2 = _ENDINGS + _WORD + r"\p{L}+|\p{N}" + _REST % ""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST % "/"
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "mpt"), Split()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), Split(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), Split(_LLAMA3, whole=True, begins=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), Split(_QWEN2)),
    "tekken": Split(_TEKKEN, whole=True, begins=True),
}
