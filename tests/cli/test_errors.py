"""What an error of a command is told as, and which exit code it has."""

import jax
import pytest

from jaxsafety.cli import errors
from jaxsafety.config.told import told_of
from jaxsafety.engine import cluster
from jaxsafety.rundir import signals

OURS = """
def on_purpose():
    raise ValueError("steps must be at least 1,\\n    got 0")
def chained():
    try:
        int("x")
    except ValueError as error:
        raise ValueError("seed: got 'x', expected an integer") from error
def no_extra():
    raise ImportError("the report needs an extra")
def by_an_operation():
    return int("x")
def by_an_unpacking():
    one, other = [1]
def in_a_library():
    import json
    return json.loads("{")
def no_module():
    import a_module_that_nobody_has
def no_key():
    return {}["a"]
def no_file():
    open("/nowhere/at/all")
def no_memory():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
def no_room():
    raise MemoryError
def of_jax():
    raise RuntimeError("something else")
def finished():
    return 3
"""


@pytest.fixture
def ended(capsys):
    def run(work, **options):
        code, lost = errors.guarded(work, **({"again": "", "shown": False} | options))
        return code, lost, capsys.readouterr().err

    return run


def ours(name, module="jaxsafety.somewhere"):
    space = {"__name__": module}
    exec(OURS, space)
    return space[name]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("on_purpose", "steps must be at least 1, got 0"),
        ("chained", "seed: got 'x', expected an integer"),
        ("no_extra", "the report needs an extra"),
        ("no_file", "[Errno 2] No such file or directory: '/nowhere/at/all'"),
        ("no_room", "memory ran out"),
        (
            "no_memory",
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate: fewer seeds or smaller batches at once need "
            "less, and other processes may hold some",
        ),
    ],
)
def test_what_a_user_or_the_machine_caused_is_one_sentence(ended, name, sentence):
    assert ended(ours(name)) == (2, False, f"jaxsafety: {sentence}\n")
    code, _, said = ended(ours(name), shown=True)
    assert code == 2 and said.startswith("Traceback") and said.endswith(f"jaxsafety: {sentence}\n")


@pytest.mark.parametrize(
    "name", ["by_an_operation", "by_an_unpacking", "in_a_library", "no_module", "no_key", "of_jax"]
)
def test_a_bug_shows_where_it_is_and_says_that_it_is_one(ended, name):
    code, _, said = ended(ours(name))
    assert code == 1 and said.startswith("Traceback") and f"in {name}" in said
    assert said.splitlines()[-1].startswith("jaxsafety: this is a bug, of jaxsafety unless")


def test_a_sentence_of_somebody_elses_code_is_no_sentence_of_ours(ended):
    code, _, said = ended(ours("on_purpose", module="theirs"))
    assert code == 1 and said.startswith("Traceback")


@pytest.mark.parametrize(
    ("variable", "error", "sentence"),
    [
        ("JAX_PLATFORMS", AssertionError(), "for JAX_PLATFORMS=cuda (it is not there): expected one that is here, cpu"),
        (
            "JAX_PLATFORM_NAME",
            RuntimeError("no cuda"),
            "for JAX_PLATFORM_NAME=cuda (no cuda): expected one that is here, cpu",
        ),
        (
            "OTHER",
            RuntimeError("Unable to initialize backend 'tpu'"),
            "(Unable to initialize backend 'tpu'): expected one",
        ),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(ended, monkeypatch, variable, error, sentence):
    def devices():
        raise error

    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    code, _, said = ended(jax.devices)
    assert code == 2 and said.count("\n") == 1 and sentence in said
    how = "unset the variable" if variable.startswith("JAX") else "set JAX_PLATFORMS to one"
    assert said.startswith("jaxsafety: jax finds no device ") and f"{how}, or install" in said
    # What a user caused on the way is told all the same.
    assert ended(ours("on_purpose"))[2] == "jaxsafety: steps must be at least 1, got 0\n"


def test_the_other_ends(ended):
    def raises(error):
        def work():
            raise error

        return work

    assert ended(ours("finished")) == (3, False, "")
    assert ended(raises(FloatingPointError("diverged"))) == (1, False, "jaxsafety: diverged\n")
    assert ended(raises(cluster.LostError("lost"))) == (1, True, "jaxsafety: lost\n")
    stopped = ended(raises(signals.Stopped(15, "after step 2")))
    assert stopped == (143, False, "jaxsafety: stopped by SIGTERM after step 2: the same command continues\n")
    assert ended(raises(KeyboardInterrupt()), again="; go on") == (130, False, "jaxsafety: interrupted; go on\n")


def test_with_traceback_a_command_shows_where_its_sentence_comes_from(main, capsys):
    assert main("status", "/nowhere") == 2
    plain = capsys.readouterr().err
    assert main("status", "/nowhere", "--traceback") == 2
    assert capsys.readouterr().err.endswith(plain) and plain.startswith("jaxsafety: no run in /nowhere")


def named(name, *, module="jaxsafety.somewhere", of=""):
    def work():
        with told_of("models.s", module=of):
            ours(name, module)()

    return work


def test_a_sentence_says_whose_it_is_and_a_bug_goes_on_as_one(ended):
    assert ended(named("on_purpose"))[2] == "jaxsafety: models.s: steps must be at least 1, got 0\n"
    assert ended(named("on_purpose", module="theirs.losses", of="theirs.methods"))[0] == 2
    for bug in (named("by_an_operation"), named("on_purpose", module="theirs"), named("in_a_library", of="theirs")):
        code, _, said = ended(bug)
        assert code == 1 and said.startswith("Traceback") and "models.s" not in said
