"""The tokenizer in a GGUF file as the files of a Hugging Face checkpoint: byte-level BPE and SentencePiece.

A file holds tokens, their kinds, merges or scores, and the name of how text is split, for which see ``gguf_splits``.
"""

import json
from collections.abc import Iterator
from typing import Any

from jaxsafety.config.names import nearest
from jaxsafety.formats.gguf_file import GGUF
from jaxsafety.formats.gguf_splits import SPLITS, Split
from jaxsafety.formats.hf_special import CONFIG_FILE

_UNKNOWN, _CONTROL, _OWN = 2, 3, 4  # kinds of tokens: the last are matched whole in text, and are part of it
_SPACE = "\u2581"
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What ends an answer: a text, a turn, a message.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def files(own: GGUF, *, max_tokens: int) -> dict[str, str]:
    """Returns the tokenizer's files by name, none where the GGUF file holds no tokenizer.

    ``max_tokens`` is the model's longest input, which transformers warns beyond.

    Raises:
        ImportError: the extra ``gguf`` is not installed.
        ValueError: a tokenizer of another kind, another way of splitting text, or tokens that make no tokenizer.

    Fidelity:
        Token for token what llama.cpp and the models' own files do. transformers, asked for the GGUF file itself, knows
        fewer names: digits of SmolLM are not split there (other ids where several spaces come before a number), whole
        tokens of Llama 3 are merged from parts, and SentencePiece puts no space behind a special token. Where a file
        names no way of splitting text or ``default``, it is GPT-2's, as there. Text is not normalised, as Qwen2's own
        tokenizer does (NFC) and neither of the others.
    """
    kind = own.values.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in _BUILT:
        raise ValueError(
            f"{own.file}: tokenizer.ggml.model is {kind!r}, expected one of {', '.join(_BUILT)}{nearest(kind, _BUILT)}"
        )
    if lost := next((name for name in ("tokens", "token_type") if f"tokenizer.ggml.{name}" not in own.values), None):
        raise ValueError(f"{own.file} holds a tokenizer without tokenizer.ggml.{lost}: expected its tokens and kinds")
    try:
        import tokenizers  # noqa: F401  (said before any work, not after it)
    except ImportError as error:
        raise ImportError("a GGUF file's tokenizer needs tokenizers: pip install '.[gguf]' in a checkout") from error
    special = {role: text for role, name in _ROLES.items() if (text := _token(own, name)) is not None}
    told = special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    template = _template(own)
    told |= {"model_max_length": max_tokens} | ({} if template is None else {"chat_template": template})
    encoder = _finished(_BUILT[kind](own), own, begins=_begins(own, kind))
    texts = {"tokenizer.json": encoder.to_str(pretty=True), CONFIG_FILE: json.dumps(told, indent=2, ensure_ascii=False)}
    return {name: text + "\n" for name, text in texts.items()}


def token_ids(own: GGUF) -> dict[str, int | list[int]]:
    """Returns the ids of the special tokens as a ``config.json`` has them; the end is a list where several end answers.

    Raises:
        ValueError: an id that is of no token.
    """
    for name in (*_ROLES.values(), *_ENDS):
        _token(own, name)
    found = {name: own.values.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", *_ENDS, "padding_token_id")}
    ends = [*dict.fromkeys(found[name] for name in _ENDS if found[name] is not None)]
    ids = {"bos_token_id": found["bos_token_id"], "pad_token_id": found["padding_token_id"]}
    ids |= {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    return {name: number for name, number in ids.items() if number is not None}


def _token(own: GGUF, name: str) -> str | None:
    """The text of the token whose id a file gives under a name."""
    number, tokens = own.values.get(f"tokenizer.ggml.{name}"), own.values.get("tokenizer.ggml.tokens", [])
    if number is None:
        return None
    if number not in range(len(tokens)):
        raise ValueError(f"{own.file}: tokenizer.ggml.{name} is {number}, expected one of its {len(tokens)} tokens")
    return tokens[number]


def _template(own: GGUF) -> str | list[dict[str, str]] | None:
    """The chat template; with further ones, all by name."""
    start = "tokenizer.chat_template"
    found = {"default" if name == start else name.removeprefix(f"{start}."): text
             for name, text in own.values.items() if name == start or name.startswith(f"{start}.")}  # fmt: skip
    if found.keys() - {"default"}:
        return [{"name": name, "template": text} for name, text in found.items()]
    return found.get("default")


def _begins(own: GGUF, kind: str) -> bool:
    default = kind == "llama" or _split(own).begins
    return own.values.get("tokenizer.ggml.add_bos_token", default)


def _split(own: GGUF) -> Split:
    name = own.values.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise ValueError(
            f"{own.file}: tokenizer.ggml.pre is {name!r}, a way of splitting text that is not known here: expected one "
            f"of {', '.join(SPLITS)}{nearest(name, SPLITS)}"
        )
    return SPLITS[name]


def _byte_level(own: GGUF) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    split = _split(own)
    merges = [tuple(merge.split(" ")) for merge in own.values.get("tokenizer.ggml.merges", [])]
    encoder = Tokenizer(_bpe(own, merges, ignore_merges=split.whole))
    first = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        first = [pre_tokenizers.Split(Regex(split.pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _sentencepiece(own: GGUF) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers

    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if own.values.get(f"tokenizer.ggml.{name}"):
            raise ValueError(f"{own.file}: tokenizer.ggml.{name} is set, expected text that is taken as it is")
    unknown = _token(own, "unknown_token_id")
    encoder = Tokenizer(_bpe(own, list(_merges(own)), byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefixed = own.values.get("tokenizer.ggml.add_space_prefix", True)
    replaced, back = normalizers.Replace(" ", _SPACE), decoders.Replace(_SPACE, " ")
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE)] * prefixed + [replaced])
    stripped = [decoders.Strip(" ", 1, 0)] * prefixed
    encoder.decoder = decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return encoder


_BUILT = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(own: GGUF) -> Iterator[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: the best token first, from its longest beginning on."""
    tokens, scores = (own.values.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "scores"))
    if len(scores) != len(tokens):
        raise ValueError(f"{own.file} has {len(scores)} scores of {len(tokens)} tokens: expected one of each")
    known = set(tokens)
    cuts = [
        (-score, -cut, cut - len(token), token)
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    cuts.sort(key=lambda one: one[:3])
    return ((token[:-cut], token[-cut:]) for _, cut, _, token in cuts)


def _bpe(own: GGUF, merges: list[tuple[str, ...]], **options: Any) -> Any:
    from tokenizers import models

    vocabulary = {token: number for number, token in enumerate(own.values["tokenizer.ggml.tokens"])}
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the library raises nothing more particular
        raise ValueError(f"{own.file}: its tokens and merges make no tokenizer: {error}") from error


def _finished(encoder: Any, own: GGUF, *, begins: bool) -> Any:
    """A tokenizer with its special tokens, which it matches whole, and those that it puts at the ends of a text."""
    from tokenizers import AddedToken, processors

    names = ("tokens", "token_type")
    kinds = list(zip(*(own.values[f"tokenizer.ggml.{name}"] for name in names), strict=True))
    added = {token: AddedToken(token, normalized=False, special=kind != _OWN)
             for token, kind in kinds if token and kind in (_UNKNOWN, _CONTROL, _OWN)}  # fmt: skip
    encoder.add_tokens(list(added.values()))
    ends = own.values.get("tokenizer.ggml.add_eos_token", False)
    first, last = _token(own, "bos_token_id") if begins else None, _token(own, "eos_token_id") if ends else None
    pieces = [*([first] if first else []), "$A", *([last] if last else [])]
    if len(pieces) > 1:
        known = [(text, encoder.token_to_id(text)) for text in dict.fromkeys(filter(None, (first, last)))]
        encoder.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=known)
    return encoder
