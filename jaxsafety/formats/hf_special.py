"""The special tokens of a Hugging Face tokenizer: their roles, and those that are told beside ``tokenizer.json`` alone.

transformers reads them from four files, each of which counts only where another one leaves something out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsafety.formats.hf_attributes import read_object

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
# The further ones have had two names.
_FURTHER = ("additional_special_tokens", "extra_special_tokens")


def read_told(directory: Path) -> dict[str, Any]:
    """Returns what ``tokenizer_config.json`` says, and the old file of special tokens where transformers reads that.

    Raises:
        ValueError: one of them is not a JSON object.
    """
    config, old = (_object(directory / name) for name in (CONFIG_FILE, _MAP_FILE))
    # Who knows the tokens by id does not read the old file; else what it says is the last word.
    return config if "added_tokens_decoder" in config else config | old


def special_tokens(directory: Path, told: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens by role, such as ``bos_token``, those that there are, and a checkpoint's own roles.

    Raises:
        ValueError: one is not the text of a token.
    """
    found = {}
    for role in _ROLES:
        # A token is stored as its text or as an object.
        given = told.get(role)
        text = given.get("content") if isinstance(given, dict) else given
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{directory}: {role} is a {type(text).__name__}, expected the text of a token")
        if text is not None:
            found[role] = text
    others = {role: text for role, text in told.items() if role.endswith("_token") and isinstance(text, str)}
    return others | found


def add_tokens(encoder: Any, directory: Path, told: Mapping[str, Any]) -> None:
    """Adds what is told of tokens beside ``tokenizer.json`` to the ``tokenizers.Tokenizer`` read from that file.

    A token that it has is matched as ``added_tokens_decoder`` says; one that it lacks gets the next id, whichever it is
    told with, as in transformers.

    Raises:
        ValueError: what is told is not of tokens.
    """
    try:
        by_id = told.get("added_tokens_decoder") or {}
        encoder.add_tokens([_token(by_id[number]) for number in sorted(by_id, key=int)])
        named = [_token(fields, special=True) for fields in _named(told)]
        old = {} if "added_tokens_decoder" in told else _object(directory / _ADDED_FILE)
        special = {one.content for one in named}
        further = [_token(text, special=text in special) for text in sorted(old, key=old.__getitem__)]
        known = {one.content for one in encoder.get_added_tokens_decoder().values()}
        encoder.add_tokens([one for one in further + named if one.content not in known])
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} tells of added tokens that are none: {error}") from error


def _token(fields: Any, **default: bool) -> Any:
    import tokenizers

    fields = {"content": fields} if isinstance(fields, str) else fields
    return tokenizers.AddedToken(**{name: own for name, own in fields.items() if name != "__type"} | default)


def _named(told: Mapping[str, Any]) -> Iterator[Any]:
    """The tokens of roles, and the further special ones."""
    yield from (told[role] for role in _ROLES if told.get(role) is not None)
    further = next((told[name] for name in reversed(_FURTHER) if told.get(name)), [])
    yield from further.values() if isinstance(further, dict) else further


def _object(file: Path) -> dict[str, Any]:
    return read_object(file, what="a file") if file.is_file() else {}
