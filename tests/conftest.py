"""Strict settings for every test: CPU with four virtual devices, no silent rank promotion, warnings are errors.

Array annotations of the package are checked by beartype here, and only here, so that users pay nothing.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

# Before SciPy is loaded: its OpenBLAS deadlocks when several CPU devices call it at once with threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test downloads a model, whatever it names.
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the tests' time is XLA compiling programs that run once: code that it does not optimise is there 2.5 times as
# fast, and a twelfth less is done where a program is compiled in one piece, as both cores are at work anyway.
# `make test-slow` sets XLA_FLAGS to nothing and so tests what users run; a test of single programs asks for `as_users`.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# A background shell has its children ignore Ctrl-C, which the tests of it send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests write before they delete it, several times over.
_ROOM = 4 * 2**30

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# As the command line does; and one MLIR context for all programs, where jax makes one for each, which takes a quarter
# of a small program's time. It is no part of jax's interface: where it has another name, tests take longer.
jax.config.update("jax_traceback_in_locations_limit", 0)
if "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]:
    # Shardy takes a fifth of a compilation, of one device as well; what runs on several meets it in `make test-slow`.
    jax.config.update("jax_use_shardy_partitioner", False)
with contextlib.suppress(ImportError, AttributeError):
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
_CACHE = Path(os.environ.get("JAXSAFETY_TEST_CACHE", Path(tempfile.gettempdir()) / "jaxsafety-test-cache"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
# Small programs too: the workers share them, and a command that is run again in a test compiles nothing.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _checked_where_arrays_are(jaxtyped):
    """What the import hook decorates with, but functions without an array among their annotations by beartype alone.

    There are no axes to remember between their arguments, and binding these costs 20 microseconds a call.
    """

    def choose(*context, typechecker=None):
        if context:
            return jaxtyped(*context)

        def decorate(target):
            hints = getattr(target, "__annotations__", {}).values()
            has_arrays = any(isinstance(hint, str) or "jaxtyping." in repr(hint) for hint in hints)
            if has_arrays or not inspect.isfunction(target):
                return jaxtyped(target, typechecker=typechecker)
            if not hints:
                return target
            checked = typechecker(target)

            @functools.wraps(target)
            def call(*args, **kwargs):
                return (target if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

            return call

        return decorate

    return choose


jaxtyping.jaxtyped = _checked_where_arrays_are(jaxtyping.jaxtyped)
install_import_hook("jaxsafety", "beartype.beartype")
from jaxsafety import analysis, keys  # noqa: E402
from jaxsafety import world as worlds  # noqa: E402
from jaxsafety.cli import main as command  # noqa: E402
from jaxsafety.models import gpt  # noqa: E402
from jaxsafety.recipe import yaml_file  # noqa: E402
from jaxsafety.recipe.schema import AnalyzeConfig, EvaluateConfig, Recipe  # noqa: E402
from jaxsafety.types import Opened  # noqa: E402
from tests.once import made_once  # noqa: E402


def pytest_configure(config):
    """Keeps the files of tests in memory where there is room: they wait for a disk longer than they compute.

    ``--basetemp DIR`` keeps them in a directory, to be looked at.
    """
    memory = Path("/dev/shm")
    is_worker, room = (
        hasattr(config, "workerinput"),
        shutil.disk_usage(memory).free if os.access(memory, os.W_OK) else 0,
    )
    if not is_worker and config.option.basetemp is None and room > _ROOM:
        config.option.basetemp = tempfile.mkdtemp(prefix="jaxsafety-tests-", dir=memory)
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first: at the end no worker waits for what another has just begun.

    The command line's make the run that those of the study look at, while the other worker is at something else.
    """
    items.sort(key=lambda item: ("cli" not in item.path.parts, "study" not in item.path.parts))


def pytest_collection_finish():
    """Spares the collector the modules and tests, which stay: it would look at them all again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_runtest_teardown(item, nextitem):
    """Spares it, too, what jax keeps of the programs of a file, gigabytes in the end."""
    if nextitem is None or nextitem.path != item.path:
        gc.freeze()


@pytest.fixture
def unchecked():
    """Lets a bad name reach the library's own message, as it does for a user, who runs without a type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def as_users() -> dict[str, int | bool]:
    """Compiler options of a program whose bits are compared with another's: those that users have."""
    return {
        "xla_backend_optimization_level": 3,
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_parallel_codegen_split_count": 32,
    }


@pytest.fixture
def key() -> jax.Array:
    """A typed root key."""
    return keys.root(0)


@pytest.fixture(scope="session")
def tiny_world() -> worlds.World:
    """The tiny world, built once."""
    return worlds.load("tiny")


@pytest.fixture(scope="session")
def paper_world() -> worlds.World:
    """The paper world, built once."""
    return worlds.load("paper")


@pytest.fixture(scope="session")
def tiny_config(tiny_world: worlds.World) -> gpt.GPTConfig:
    """A GPT small enough for oracle comparisons: 2 layers, 2 heads, width 16."""
    return gpt.GPTConfig(
        vocab_size=tiny_world.vocab_size, max_tokens=tiny_world.max_tokens, layers=2, heads=2, width=16
    )


@pytest.fixture(scope="session")
def tiny_gpt(tiny_config: gpt.GPTConfig) -> dict:
    """Its parameters."""
    return jax.jit(lambda key: gpt.init(tiny_config, key=key))(keys.root(1))


@pytest.fixture(scope="session")
def mini_recipe() -> Recipe:
    """A whole study at its smallest: 1 layer of width 16, 2 seeds, 2 methods, 2 conditions, 6 steps in 3 chunks."""
    stage = {"steps": 6, "chunk_steps": 2, "batch_size": 4}
    tuned = stage | {"from": "pretrained", "lr": {"eta_M": 1e-3, "eta_S": 1e-4}, "snapshots": 1}
    return Recipe(
        name="mini",
        seeds=(3, 5),
        subject={"world": "tiny", "model": {"layers": 1, "heads": 2, "width": 16}},
        models={
            "pretrained": stage | {"method": "pretrain", "data": {"pool": "text"}},
            "sft": tuned | {"method": "sft"},
            "dpo": tuned | {"method": "dpo", "weight_chosen": 1.0, "weight_rejected": 0.1},
        },
        evaluate=EvaluateConfig(prompts=8, batch_size=4, conditions=("safe", "unsafe"), probe_prompts=4),
        analyze=AnalyzeConfig(prompts=4, attack_prompts=4, edit_prompts=4),
        edits={
            "whole": {"edit": "scaled", "along": True, "alpha": [0.0, 1.0]},
            "only_null": {"edit": "space_part", "along": True},
            "rank": {"edit": "rank_part", "rank": [1]},
            "layer": {"edit": "layer_part"},
            "transfer": {"edit": "transferred", "alpha": [1.0]},
        },
        attacks={
            "prefill": {"depth": [0, 1]},
            "soft_tokens": {"conditions": ["unsafe"], "count": [0, 2], "steps": [0, 1]},
        },
        analyses={name: {} for name in analysis.DEFAULT} | {
            "sensitivity": {"prompts": 2, "jacobian_prompts": 1},
            "gradients": {"prompts": 2}, "gradient_spaces": {"prompts": 2},
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def mini_subject(mini_recipe) -> Opened:
    """What it is about, opened once."""
    return mini_recipe.subject.load().open(mini_recipe.subject.options)


def undrawn_svg(picture) -> str:
    """What stands for a figure that is not drawn: its name, and the notes below it."""
    return f'<svg class="jaxsafety"><title>{picture.name}</title>{" ".join(picture.notes)}</svg>'


@pytest.fixture
def undrawn(monkeypatch):
    """Reports hold the names of their figures alone: drawing them takes most of a report's time."""
    for name in ("plotting", "figures"):
        monkeypatch.setattr(importlib.import_module(f"jaxsafety.report.{name}"), "svg", undrawn_svg)


@pytest.fixture(scope="session")
def cache_directory() -> Path:
    """The compilation cache of the tests, for processes that they start."""
    return _CACHE


@pytest.fixture
def main(monkeypatch):
    """The command line in this process, whose jax is configured already."""
    monkeypatch.setattr(command, "_configure_jax", lambda *_, **__: None)
    return lambda *words: command.main([str(word) for word in words])


@pytest.fixture(scope="session")
def mini_yaml(mini_recipe, tmp_path_factory) -> Path:
    """The miniature study as a file."""
    path = tmp_path_factory.mktemp("recipe") / "mini.yaml"
    path.write_text(yaml_file.to_yaml(mini_recipe))
    return path


@pytest.fixture(scope="session")
def finished_run(mini_yaml, tmp_path_factory) -> Path:
    """The run directory of the miniature study after all its stages; tests that change it work on a copy."""

    def make(directory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "_configure_jax", lambda *_, **__: None)
            for name in ("plotting", "figures"):
                patch.setattr(importlib.import_module(f"jaxsafety.report.{name}"), "svg", undrawn_svg)
            assert command.main(["run", str(mini_yaml), "--out", str(directory / "mini")]) == 0

    return made_once(tmp_path_factory, "finished", make) / "mini"


@pytest.fixture
def fault(record_property):
    """Counts a fault that was injected, by its kind; the summary tells how many of them runs survived."""
    tried: dict[str, int] = {}
    record_property("faults", tried)

    def count(kind: str) -> None:
        tried[kind] = tried.get(kind, 0) + 1

    return count


def pytest_terminal_summary(terminalreporter):
    """Prints the faults tried, survived and lost: all of a test that failed count as lost."""
    counts = {"passed": Counter(), "failed": Counter()}
    for outcome, count in counts.items():
        for report in terminalreporter.stats.get(outcome, []):
            count.update(dict(report.user_properties).get("faults", {}))
    survived, lost = (sum(count.values()) for count in counts.values())
    if survived + lost:
        tried = counts["passed"] + counts["failed"]
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(tried.items()))
        terminalreporter.write_line(f"faults: {survived + lost} tried, {survived} survived, {lost} lost ({kinds})")
