"""The tokenizer of a Hugging Face checkpoint and its chat template: conversations to token ids and back.

A template is the checkpoint's own program. What it writes is encoded as it stands, so it alone decides on the
beginning-of-sequence token; text without a template gets the special tokens that the tokenizer adds by itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from jaxsafety.config.names import check_name
from jaxsafety.entry.annotations import checked
from jaxsafety.formats import hf_special, hf_template
from jaxsafety.formats.hf_attributes import flag, read_object
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.formats.hf_spelling import Spelling
from jaxsafety.formats.prompts import Message

SpecialTokens = Literal["control", "text"]
_TOKENIZER_FILE = "tokenizer.json"
# No word of any template.
_PLACEHOLDER = "Xyzzy"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, opened.

    Attributes:
        directory: the checkpoint that it belongs to.
        encoder: the ``tokenizers.Tokenizer``.
        special: the special tokens by role, such as ``bos_token``; those that there are.
        template: source of the chat template, None for raw text: a prompt of one turn, as it is.
        special_tokens: what becomes of a special token that a turn spells: ``control``, the token itself, as in
            transformers, or ``text``, its letters.
    """

    directory: Path
    encoder: Any
    special: Mapping[str, str]
    template: str | None
    special_tokens: SpecialTokens = "control"

    def __post_init__(self):
        check_name("special_tokens", self.special_tokens, get_args(SpecialTokens))

    @property
    def eos(self) -> int | None:
        """The id of its end-of-sequence token, None if it has none."""
        return self.encoder.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids of its special tokens, one of which ends an answer."""
        added = self.encoder.get_added_tokens_decoder()
        return frozenset({number for number, one in added.items() if one.special} | ({self.eos} - {None}))

    @cached_property
    def turn(self) -> str:
        """What the template writes between the user's last words and where an answer begins.

        Raises:
            ValueError: there is no template, or it fails or leaves the user's words out.
        """
        if self.template is None:
            raise ValueError(f"no chat template in {self.directory}: expected one, whose control tokens end a turn")
        whole = self._rendered((Message("user", _PLACEHOLDER),), answering=True)
        if _PLACEHOLDER not in whole:
            raise ValueError(f"the chat template of {self.directory} leaves the user's turn out: expected its text")
        return whole.rpartition(_PLACEHOLDER)[2]

    def spells(self, texts: Iterable[str]) -> bool:
        """Whether one of some texts spells a special token, or another one by which the template marks turns."""
        return any(map(self._spelling.is_in, texts))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a conversation, which ends with the user's turn, up to where the answer begins.

        Raises:
            ValueError: the template refuses the conversation or fails; several turns without a template; letters that
                are to be text and become a special token all the same.
        """
        if self.template is None:
            return self._ids(self._said(_only_turn(messages, self.directory)), added=True)
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
            whole, text = self._ids(self._said(asked + answer), added=True), self._said(answer)
            # What the tokenizer adds at the end by itself would stand between the two.
            prompt = prompt[: _shared(prompt, whole)] if prompt[-1:] == whole[-1:] else prompt
            end = [] if self.eos is None else [self.eos]
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

    def _ids(self, text: str, *, added: bool = False) -> list[int]:
        if self.special_tokens == "text":
            return self._spelling.ids(text, added=added)
        return self.encoder.encode(text, add_special_tokens=added).ids

    def _said(self, text: str) -> str:
        return self._spelling.hidden(text) if self.special_tokens == "text" else text

    def _rendered(self, messages: Sequence[Message], *, answering: bool) -> str:
        said = [replace(turn, content=self._said(turn.content)) for turn in messages]
        return hf_template.rendered(
            self._program, said, special=self.special, answering=answering, where=self.directory
        )

    @cached_property
    def _program(self) -> Any:
        return hf_template.compiled(self.template, where=self.directory)

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.directory, self.encoder, self.template)


def shortened(ids: Sequence[int], most: int) -> list[int]:
    """Returns at most ``most`` >= 1 ids of a prompt: of a longer one the first, where attention rests, and the end."""
    return list(ids) if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]


@checked
def open_tokenizer(directory: Path, *, raw: bool = False, special_tokens: SpecialTokens = "control") -> Tokenizer:
    """Opens the tokenizer of a Hugging Face checkpoint.

    ``raw`` leaves its chat template out, as a checkpoint without one has it: prompts are text as it is. For
    ``special_tokens`` see :class:`Tokenizer`.

    Raises:
        ImportError: the extra ``llama`` is not installed.
        FileNotFoundError: no ``tokenizer.json`` there.
        ValueError: a file of it cannot be read.

    Fidelity:
        transformers' ``apply_chat_template``, but for the date, which its templates can ask for and these cannot: the
        templates of Llama 3.1 then fall back on a fixed one, and the same prompt has the same ids on every day. And
        ``tokenizer.json`` is followed whatever the class that transformers builds. See :func:`differences`.
    """
    encoder, told = _encoder(directory), hf_special.read_told(directory)
    special = hf_special.special_tokens(directory, told)
    hf_special.add_tokens(encoder, directory, told)
    encoder.encode_special_tokens = flag(directory / hf_special.CONFIG_FILE, told, "split_special_tokens")
    template = None if raw else hf_template.find_template(directory, told)
    return Tokenizer(directory, encoder, special, template, special_tokens)


def differences(tokenizer: Tokenizer) -> Iterator[str]:
    """Yields why a tokenizer gives other ids here than in transformers, a sentence each; none where it does not."""
    place = tokenizer.directory
    if "strftime_now" in (tokenizer.template or ""):
        yield (
            f"the chat template of {place} asks for the date, which it is not told: prompts have the same ids on every "
            "day, and others in transformers"
        )
    told, file = hf_special.read_told(place), place / CONFIG_FILE
    config = read_object(file, what="a configuration") if file.is_file() else {}
    name = str(told.get("tokenizer_class") or config.get("tokenizer_class")).removesuffix("Fast")
    # Version 5 builds that class anew. SentencePiece and version 4 do as the file says; so did its models learn.
    built = name == "LlamaTokenizer" and config.get("model_type") != "mistral"
    if built and "Prepend(" in repr(tokenizer.encoder.normalizer):
        yield (
            f"tokenizer.json of {place} puts a space behind special tokens, and is followed; transformers 5, though "
            "not 4, builds a LlamaTokenizer that puts none there"
        )


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
