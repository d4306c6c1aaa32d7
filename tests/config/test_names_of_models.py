"""What names a model with an adapter on it, or one thing."""

import pytest

from jaxsafety.config.names import model_named, with_adapter


@pytest.fixture
def beside(tmp_path):
    for name in ("base", "ad", "one+thing", "seed0"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("base", ("base", None)),
        ("base+ad", ("base", "ad")),
        ("org/base@v1+org/ad", ("org/base@v1", "org/ad")),
        ("one+thing", ("one+thing", None)),
        ("one+thing+ad", ("one+thing", "ad")),
        ("base+ad+ad", ("base+ad", "ad")),
        ("base+one+thing", ("base", "one+thing")),
        ("base+none", ("base", "none")),
        ("none+ad", ("none", "ad")),
        ("no+where", ("no+where", None)),
        ("base+seed{seed}", ("base", "seed{seed}")),
        ("base+", ("base+", None)),
        ("+ad", ("+ad", None)),
    ],
)
def test_sides(beside, text, sides):
    assert with_adapter(text, beside=beside) == sides


def test_paths_become_absolute_and_names_stay(beside):
    assert model_named("base+ad", beside=beside) == f"{beside / 'base'}+{beside / 'ad'}"
    assert model_named("org/base+ad", beside=beside) == f"org/base+{beside / 'ad'}"
    assert model_named("org/base+org/ad@r", beside=beside) == "org/base+org/ad@r"
    named = model_named("one+thing+ad", beside=beside)
    assert model_named(named, beside=beside / "base") == named
