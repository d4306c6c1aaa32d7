"""Text that spells the control tokens of a tokenizer, told from those that a chat template writes.

What somebody says has a placeholder for each that it spells before a template sees it, so that no template takes it for
a mark of its own. In the rendered text every control token is then the template's, and goes under a name that no text
spells; the placeholders become letters again.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Code points that are no characters, for which Unicode promises that no text has them: around the number of a token,
# itself a code point for private use, in the place of one that is text, and in that of a template's own.
_TEXT, _OWN, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_FIRST, _NUMBER = 0xF0000, "[\U000f0000-\U000ffffd]"


@dataclass(frozen=True)
class Spelling:
    """The control tokens of a tokenizer, and how text that spells them is encoded as text.

    Attributes:
        directory: of the tokenizer, for messages.
        encoder: the ``tokenizers.Tokenizer``.
        template: source of the chat template, None without one.
    """

    directory: Path
    encoder: Any
    template: str | None

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The control tokens, the longest first: special ones, and others that the template's source has in it."""
        if self.encoder.encode_special_tokens:  # the tokenizer itself takes them for text
            return ()
        added, source = self.encoder.get_added_tokens_decoder().values(), self.template or ""
        found = {one.content for one in added if one.special or (one.content.strip() and one.content in source)}
        return tuple(sorted(found, key=lambda token: (-len(token), token)))

    def is_in(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._pattern.search(text) is not None

    def hidden(self, text: str) -> str:
        """Returns what somebody says with a placeholder for every control token that it spells."""
        plain = re.sub(f"[{_TEXT}{_OWN}{_END}]", "", text)
        return self._pattern.sub(lambda found: self._name(_TEXT, found[0]), plain)

    def ids(self, text: str, *, added: bool) -> list[int]:
        """Returns the ids of a text with placeholders, which are letters; a control token in it is the template's own.

        Without placeholders they are those of the tokenizer. With them all else has the same ids as ever, and letters
        those that the tokenizer would give without control tokens: the text is not cut into pieces. ``added`` says
        whether the tokenizer adds its own tokens at the ends.

        Raises:
            ValueError: the tokenizer makes a control token even of letters.
        """
        if not {_TEXT, _END} & set(text):
            return self.encoder.encode(text, add_special_tokens=added).ids
        twin, original = self._twin
        found = twin.encode(self._rendering.sub(self._named, text), add_special_tokens=added)
        pairs = list(zip(found.ids, found.special_tokens_mask, strict=True))
        inside = {number for number, at_end in pairs if not at_end}
        # What no piece stands for is unknown, also where it spells that.
        unknown = getattr(self.encoder.model, "unk_token", None)
        spelt = [one for one in self.tokens if self._name(_TEXT, one) in text and one != unknown]
        if made := next((token for token in spelt if twin.token_to_id(token) in inside), None):
            raise ValueError(
                f"the tokenizer of {self.directory} makes the control token {made!r} of its letters, too: expected "
                "special_tokens control, or prompts that do not spell it"
            )
        return [number if at_end else original.get(number, number) for number, at_end in pairs]

    @cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")

    @cached_property
    def _rendering(self) -> re.Pattern:
        # Of a placeholder that a template has cut nothing is left.
        whole, cut = f"{_TEXT}(?P<text>{_NUMBER}){_END}", f"{_TEXT}{_NUMBER}?|{_NUMBER}?{_END}"
        return re.compile(f"{whole}|{cut}|(?P<own>{self._pattern.pattern})")

    def _named(self, found: re.Match) -> str:
        if found["own"]:
            return self._name(_OWN, found["own"])
        return self.tokens[ord(found["text"]) - _FIRST] if found["text"] else ""

    def _name(self, kind: str, token: str) -> str:
        return f"{kind}{chr(_FIRST + self.tokens.index(token))}{_END}"

    @cached_property
    def _twin(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with its control tokens under names, and from its ids of added tokens to the original's."""
        import tokenizers

        content, ids = json.loads(self.encoder.to_str()), {}
        for token in content["added_tokens"]:
            if token["content"] in self.tokens:
                # A normaliser may keep a tokenizer from finding its tokens, but is not to see these names.
                token |= {"content": self._name(_OWN, token["content"]), "normalized": False}
            ids[token["content"]] = token["id"]
        twin = tokenizers.Tokenizer.from_str(json.dumps(content))
        return twin, {twin.token_to_id(name): number for name, number in ids.items()}
