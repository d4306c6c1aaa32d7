"""How far two judges of the same answers agree, beyond what chance would make of how often each says what."""

from collections import Counter
from collections.abc import Sequence


def cohen_kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Cohen's kappa ``(p_o - p_e) / (1 - p_e)`` of two judges' verdicts on the same answers.

    ``p_o`` is the share of answers that both say the same of, and ``p_e`` that of chance, by how often each says what.

    Returns:
        A number in [-1, 1], 0 for chance; None where both say one thing alone, of which chance makes the same.

    Raises:
        ValueError: no verdicts, or not as many of both.

    References:
        Cohen 1960, Educational and Psychological Measurement 20.
    """
    n = len(one)
    if n != len(other) or not n:
        raise ValueError(f"verdicts of two judges must be as many, and some, got {n} and {len(other)}")
    counts = Counter(one), Counter(other)
    observed = sum(mine == yours for mine, yours in zip(one, other, strict=True)) / n
    chance = sum(count * counts[1][name] for name, count in counts[0].items()) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)
