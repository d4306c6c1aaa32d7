"""How a Hugging Face checkpoint has its answers written: what ends them, and what greedy ones here do not follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsafety.formats.hf_attributes import read_object
from jaxsafety.formats.hf_config import CONFIG_FILE

GENERATION_FILE = "generation_config.json"
# What moves the logits of greedy decoding in transformers, or ends an answer otherwise, with the values that don't.
# Sampling isn't among it: answers are greedy whatever a checkpoint says of that.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings"), ([],)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "watermarking_config"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ()),
}


@dataclass(frozen=True)
class Generation:
    """What a checkpoint says of answers.

    Attributes:
        file: that says it, ``generation_config.json`` or, where that is absent, ``config.json``.
        stop: ids that end an answer by that file.
        unfollowed: what else there changes a greedy answer in transformers, and does not here.
    """

    file: Path
    stop: tuple[int, ...]
    unfollowed: Mapping[str, Any]


def read_generation(directory: Path) -> Generation:
    """Returns what a checkpoint says of answers, by the one file that transformers reads it from.

    Raises:
        ValueError: the file is not a JSON object, or what ends answers is neither an id nor a list of ids.
    """
    places = [directory / GENERATION_FILE, directory / CONFIG_FILE]
    file = next((one for one in places if one.is_file()), places[0])
    raw = read_object(file, what="a file") if file.is_file() else {}
    given = raw.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if any(type(number) is not int for number in ids):
        raise ValueError(f"{file}: eos_token_id is {given!r}, expected the id of a token or a list of them")
    asked = {name: raw[name] for name, neutral in _NEUTRAL.items() if raw.get(name) not in (None, *neutral)}
    return Generation(file, tuple(dict.fromkeys(ids)), asked)
