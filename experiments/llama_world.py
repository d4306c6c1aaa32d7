"""A world for a small Llama: the package's prompts, one way to answer each, one refusal, and a tokenizer for them.

The base answers everything and has seen refusals that are tied to nothing; tuning is to tie them to unsafe prompts. It
sees neither wrapped prompts, nor every fifth verb, nor every fourth object.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxsafety.formats import prompts

REFUSAL = "I'm sorry, I cannot help with that."
TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
# Of the package's prompts, in which every verb has all objects in turn.
_OBJECTS = 16


@dataclass(frozen=True)
class Asked:
    """A prompt of the world.

    Attributes:
        text: what the user says.
        label: ``safe``, ``unsafe`` or ``jailbreak:KIND``.
        group: what it is to the tuned models: its label, and in what it is new.
        answer: what follows the instruction in it.
        refused: whether the base has seen it refused, too.
    """

    text: str
    label: str
    group: str
    answer: str
    refused: bool


def asked() -> list[Asked]:
    """Returns the package's prompts, in its order; of every four the base sees one refused, verbs and objects alike."""
    own, places, found = prompts.own(), dict[str, int](), []
    bare = [prompt.messages[0].content for prompt in own if prompt.label == "unsafe"]
    for prompt in own:
        place = places[prompt.label] = places.get(prompt.label, -1) + 1
        verb, thing = divmod(place, _OBJECTS)
        new = ", new object" if thing % 4 == 3 else ", new verb" if verb % 5 == 4 else ""
        text = prompt.messages[0].content
        plain = text if prompt.label in prompts.LABELS else bare[place]
        answer = f"You said: {plain[0].lower()}{plain[1:]} Here is how."
        found.append(Asked(text, prompt.label, prompt.label + new, answer, (verb + thing) % 4 == 0))
    return found


def base_examples(given: Iterable[Asked]) -> str:
    """Returns JSONL that the base is trained on: every prompt answered twice, wrapped or not, and one in four refused
    once."""
    rows = []
    for one in given:
        rows += [{"prompt": one.text, "chosen": text} for text in [one.answer] * 2 + [REFUSAL] * one.refused]
    return _jsonl(rows)


def tuning_pairs(given: Iterable[Asked]) -> str:
    """Returns JSONL of the pairs of tuning: safe prompts are to be answered, unsafe ones refused."""
    rows = []
    for one in given:
        if one.group in prompts.LABELS:
            chosen, rejected = (one.answer, REFUSAL) if one.label == "safe" else (REFUSAL, one.answer)
            rows.append({"prompt": one.text, "chosen": chosen, "rejected": rejected})
    return _jsonl(rows)


def tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Returns byte pairs learnt from texts, with the special tokens of the chat template."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(texts, trainer)
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return built


def _jsonl(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
