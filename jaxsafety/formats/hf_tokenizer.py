"""The tokenizer of a Hugging Face checkpoint and its chat template: conversations to token ids and back.

A template is the checkpoint's own program: it runs in a sandbox, which sees the messages and the special tokens and
nothing else. What it writes is encoded as it stands, so it alone decides on the beginning-of-sequence token; text
without a template gets the special tokens that the tokenizer adds by itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxsafety.formats.hf_attributes import read_object
from jaxsafety.formats.prompts import Message

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_GENERATION_FILE = "generation_config.json"
_SPECIAL_FILE = "special_tokens_map.json"
# What a template's own program may raise beside jinja2's errors and those of values.
_OTHERS = (AttributeError, RecursionError, MemoryError)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, opened.

    Attributes:
        directory: the checkpoint that it belongs to.
        encoder: the ``tokenizers.Tokenizer``.
        special: the special tokens by role, such as ``bos_token``; those that there are.
        template: source of the chat template, None for raw text: a prompt of one turn, as it is.
        stop: ids that end an answer.
    """

    directory: Path
    encoder: Any
    special: Mapping[str, str]
    template: str | None
    stop: tuple[int, ...]

    @property
    def size(self) -> int:
        """One more than the largest id it gives."""
        return max(self.encoder.get_vocab(with_added_tokens=True).values()) + 1

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a conversation, which ends with the user's turn, up to where the answer begins.

        Raises:
            ValueError: the template refuses the conversation or fails; several turns without a template.
        """
        if self.template is None:
            return self.encoder.encode(_only_turn(messages, self.directory)).ids
        return self._ids(self._rendered(messages, answering=True))

    def exchange(self, messages: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt, and those of the assistant's answer with what ends it.

        The answer is what the conversation with it adds to the one without. It is cut from the ids of both together
        where these begin with the prompt's; a tokenizer that merges across the border has it encoded by itself.

        Raises:
            ValueError: as :meth:`prompt`, or a template that writes the prompt otherwise once it is answered.
        """
        prompt = self.prompt(messages)
        if self.template is None:
            asked = _only_turn(messages, self.directory)
            whole, text = self.encoder.encode(asked + answer).ids, answer
            # What the tokenizer adds at the end by itself would stand between the two.
            prompt = prompt[: _shared(prompt, whole)] if prompt[-1:] == whole[-1:] else prompt
            ending = self.special.get("eos_token")
            end = [] if ending is None else [self.encoder.token_to_id(ending)]
        else:
            before = self._rendered(messages, answering=True)
            after = self._rendered([*messages, Message("assistant", answer)], answering=False)
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template of {self.directory} writes a prompt otherwise once it is answered: expected "
                    "the same text before the answer"
                )
            whole, text, end = self._ids(after), after[len(before) :], []
        cut = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._ids(text)
        return prompt, cut if not end or cut[-1:] == end else cut + end

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self.encoder.decode(list(ids), skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        return self.encoder.encode(text, add_special_tokens=False).ids

    def _rendered(self, messages: Sequence[Message], *, answering: bool) -> str:
        import jinja2

        turns = [asdict(turn) for turn in messages]
        try:
            return self._program.render(messages=turns, add_generation_prompt=answering, **self.special)
        except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, *_OTHERS) as error:
            # Running out of memory has no words.
            told = str(error) or type(error).__name__
            raise ValueError(f"the chat template of {self.directory} fails on a conversation: {told}") from error

    @cached_property
    def _program(self) -> Any:
        import jinja2

        try:
            return _environment().from_string(self.template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.directory} is not one: {error}") from error


def shortened(ids: Sequence[int], most: int) -> list[int]:
    """Returns at most ``most`` >= 1 ids of a prompt: of a longer one the first, where attention rests, and the end."""
    return list(ids) if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]


def open_tokenizer(directory: Path, *, raw: bool = False) -> Tokenizer:
    """Opens the tokenizer of a Hugging Face checkpoint.

    ``raw`` leaves its chat template out, as a checkpoint without one has it: prompts are text as it is.

    Raises:
        ImportError: the extra ``llama`` is not installed.
        FileNotFoundError: no ``tokenizer.json`` there.
        ValueError: a file of it cannot be read.

    Fidelity:
        transformers' ``apply_chat_template``, but for the date, which its templates can ask for and these cannot: the
        templates of Llama 3.1 then fall back on a fixed one, and the same prompt has the same ids on every day.
    """
    encoder = _encoder(directory)
    config = _object(directory / _CONFIG_FILE)
    special = _special(directory, config)
    template = None if raw else _template(directory, config)
    return Tokenizer(directory, encoder, special, template, _stop(directory, encoder, special))


def _encoder(directory: Path) -> Any:
    try:
        import jinja2  # noqa: F401  (said before any work, not after it)
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers and chat templates need tokenizers and jinja2: pip install '.[llama]' in a checkout"
        ) from error
    file = directory / _TOKENIZER_FILE
    if not file.is_file():
        hint = " (its tokenizer.model becomes one by transformers' AutoTokenizer and save_pretrained)"
        raise FileNotFoundError(
            f"no tokenizer in {directory}: expected a {_TOKENIZER_FILE}"
            f"{hint if (directory / 'tokenizer.model').exists() else ''}"
        )
    try:
        encoder = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more particular
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    # Training leaves them in the file; prompts are padded and cut here, where it is counted.
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / _TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8: expected a chat template") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{directory / _CONFIG_FILE}: chat_template is a {type(found).__name__}, expected text")
    return found


def _stop(directory: Path, encoder: Any, special: Mapping[str, str]) -> tuple[int, ...]:
    given = _object(directory / _GENERATION_FILE).get("eos_token_id")
    given = given if isinstance(given, list) else [given]
    own = encoder.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return tuple(dict.fromkeys(number for number in [*given, own] if isinstance(number, int)))


def _object(file: Path) -> dict[str, Any]:
    return read_object(file, what="a file") if file.is_file() else {}


def _special(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role; old checkpoints have them in a file of their own."""
    others, found = _object(directory / _SPECIAL_FILE), {}
    for role in _SPECIAL:
        # A role that the configuration names as null is not there.
        told = config[role] if role in config else others.get(role)
        # A token is stored as its text or as an object.
        text = told.get("content") if isinstance(told, dict) else told
        if text is not None and not isinstance(text, str):
            file = directory / (_CONFIG_FILE if role in config else _SPECIAL_FILE)
            raise ValueError(f"{file}: {role} is a {type(text).__name__}, expected the text of a token")
        if text is not None:
            found[role] = text
    return found


def _only_turn(messages: Sequence[Message], directory: Path) -> str:
    if len(messages) != 1:
        raise ValueError(
            f"a conversation of {len(messages)} turns needs a chat template, which is not there or left out for "
            f"{directory}: expected prompts of one turn, or a checkpoint with a template"
        )
    return messages[0].content


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _environment() -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """``{% generation %}``, by which transformers marks answers; it writes what it encloses."""

        tags = {"generation"}  # noqa: RUF012  (the name and form that jinja2 reads)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value: Any, indent: int | None = None) -> str:
        # jinja2's own escapes for HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment
