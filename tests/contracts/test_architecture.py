"""The layers: what each module may import, where effects may live, and that importing has none.

A new file must be placed in the table, which asks where it belongs.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsafety

PACKAGE = Path(jaxsafety.__file__).parent

LAYERS = {
    0: {"", "types", "tree", "keys", "suggest", "intervals"},
    1: {
        "models",
        *(f"models.{name}" for name in ("adapter", "checks", "generation", "gpt", "inputs", "layers", "llama", "lora")),
    }
    | {f"models.{name}" for name in ("llama_block", "llama_cache", "llama_config", "rope", "sites", "widening")}
    | {"losses"}
    | {"linalg", *(f"linalg.{name}" for name in ("power", "subspace", "svd", "unbatched"))}
    | {"world", *(f"world.{name}" for name in ("batches", "conditions", "grammar", "layout", "operators"))}
    | {f"world.{name}" for name in ("pcfg_rules", "pcfg_tables", "spec", "text")},
    2: {"objectives", "totals", "optim", "train", "recipe", "lanes"}
    | {"analysis", *(f"analysis.{name}" for name in ("alignment", "clusters", "interventions", "sensitivity"))}
    | {f"analysis.{name}" for name in ("update_spaces", "evidence", "contrasts", "statements", "claims")}
    | {"attacks", "attacks.prefill", "attacks.soft_tokens"}
    | {"probes", *(f"probes.{name}" for name in ("attacked", "features", "gradients", "quantities", "slopes"))}
    | {"probes.variants", "probes.weights"},
    3: {
        "sweep",
        "loop",
        "study",
        "evaluation",
        "mechanics",
        "subjects",
        "checkpoint",
        "cluster",
        "hosts",
        "memory",
        "runlog",
        "signals",
        "progress",
        "prompts",
        "recipe_file",
        "run_files",
        "cells",
        "campaign",
        "forecast",
        "status",
        "sharding",
        "imported",
    }
    | {"interop", "interop.hf", "interop.safetensors_file"}
    | {f"interop.hf_{name}" for name in ("attributes", "checkpoint", "config", "index", "names", "rope")}
    | {"interop.hf_tokenizer", "interop.hf_write", "interop.official", "interop.official_file"}
    | {"report", *(f"report.{name}" for name in ("figures", "html", "results", "study_report", "tables"))}
    | {f"report.{name}_figures" for name in ("analysis", "attack", "intervention", "training")}
    | {f"report.{name}" for name in ("analysis_frame", "analysis_panels", "plotting", "claims_table", "seed_tables")}
    | {f"report.{name}" for name in ("dead_lanes", "section_list", "sections", "pair_figures", "pair_report")}
    | {"pairs", *(f"pairs.{name}" for name in ("activations", "answers", "batches", "features", "merge"))}
    | {f"pairs.{name}" for name in ("opened", "rows", "stream", "weights")}
    | {"tuning", *(f"tuning.{name}" for name in ("examples", "export", "options", "places", "program"))}
    | {"tuning.references", "tuning.run"},
    4: {"cli", "launch", "pair_cli", "tune_cli"},
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
PURE = sorted(module for module, layer in LAYER_OF.items() if layer <= 2)

# Package outside this one: the modules that may import it (a prefix names a whole folder).
CONFINED = {
    "orbax": ("checkpoint",),
    "polars": ("report", "mechanics", "subjects", "pairs"),
    "scipy": ("intervals",),
    "matplotlib": ("report",),
    "torch": ("interop.official_file",),
    "jinja2": ("report", "interop.hf_tokenizer"),
    "tokenizers": ("interop.hf_tokenizer",),
    "rich": ("progress", "report"),
    "jsonargparse": ("recipe_file",),
    "yaml": ("tune_cli", "prompts", "recipe_file", "runlog", "status", "pairs.opened", "report.pair_report"),
    "nltk": ("world.pcfg_rules",),
    "optax": ("optim", "train", "tuning.program", "lanes"),
    "argparse": ("cli", "pair_cli", "tune_cli"),
    "subprocess": ("runlog", "cluster"),
}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def imported(tree):
    """Every dotted name that a module imports anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module):
    """The modules of this package that a module imports."""
    for name in imported(TREES[module]):
        if name == "jaxsafety" or name.startswith("jaxsafety."):
            path = name.removeprefix("jaxsafety").lstrip(".")
            yield path if path in LAYER_OF else path.rpartition(".")[0]


def calls(tree):
    """Dotted names of everything called or read as an attribute, such as ``jax.jit`` or ``print``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def top(module):
    return module.partition(".")[0]


def test_every_file_has_its_layer():
    assert set(FILES) == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_imports_go_downward(module):
    for other in own_imports(module):
        assert LAYER_OF[other] <= LAYER_OF[module], f"{module} imports {other} from a layer above"


@pytest.mark.parametrize("module", sorted(module for module, layer in LAYER_OF.items() if layer == 1))
def test_kernels_never_import_each_other(module):
    """Models, world and losses are siblings; an outsider can lift each out."""
    assert {top(other) for other in own_imports(module) if LAYER_OF[other] == 1} <= {top(module)}


def test_modules_import_each_other_in_one_direction():
    """No cycles, or nothing could be understood alone."""
    seen = set()

    def visit(module, path):
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in seen:
            for other in set(own_imports(module)) - {module}:
                # A package's __init__ names its members; they may name the package's siblings, not the package.
                visit(other, [*path, module])
            seen.add(module)

    for module in FILES:
        visit(module, [])


def test_training_knows_no_model_objective_or_world():
    assert {top(other) for other in own_imports("train")} <= {"losses", "types", "tree", "keys"}


def test_losses_know_nothing_of_this_package():
    assert not list(own_imports("losses"))


@pytest.mark.parametrize("folder", ["linalg", "analysis", "attacks"])
def test_the_analyses_can_be_lifted_out(folder):
    """They run on anybody's weights and activations: no world, no model, no trainer."""
    vocabulary = {module for module, layer in LAYER_OF.items() if layer == 0}
    may = {"linalg": {"linalg"}, "analysis": {"linalg", "analysis"}, "attacks": {"losses", "attacks"}}[folder]
    for module in (name for name in FILES if top(name) == folder):
        assert {top(other) for other in own_imports(module) if other not in vocabulary} <= may


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_a_dependency_is_imported_where_it_belongs(package):
    users = {module for module, tree in TREES.items() if package in {top(name) for name in imported(tree)}}
    assert users, f"{package} is used nowhere: drop it from the table"
    assert all(any(user == home or user.startswith(f"{home}.") for home in CONFINED[package]) for user in users), users


def test_only_the_loop_jits():
    """But for the check of a model, which is nobody's run and compiles what it compares."""
    users = {module for module, tree in TREES.items() if {"jax.jit", "jax.pmap"} & set(calls(tree))}
    named = {module for module, tree in TREES.items() if {"jax.jit", "jax.pmap"} & set(imported(tree))}
    assert users | named == {"loop", "models.checks"}


@pytest.mark.parametrize("module", sorted(set(FILES) - {"cli", "launch", "pair_cli", "tune_cli"}))
def test_the_library_reads_no_environment_and_prints_nothing(module):
    found = set(calls(TREES[module])) & {
        "print",
        "os.environ",
        "os.getenv",
        "input",
        "sys.stdout",
        "sys.exit",
        "breakpoint",
    }
    assert not found


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_no_disk_and_no_clock(module):
    """Package data and grammars of the user's are read by world.spec alone."""
    names = set(imported(TREES[module])) | set(calls(TREES[module]))
    effects = {"open", "time", "shutil", "socket", "tempfile", "random", "datetime"}
    assert not {top(name) for name in names} & effects
    assert module == "world.spec" or not any(name.endswith((".read_text", ".write_text")) for name in names)


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_importing_starts_no_backend():
    modules = ", ".join(f"jaxsafety.{module}".rstrip(".") for module in FILES)
    # There is no public question for this; asking for the devices would start them.
    script = f"import {modules}\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends"
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["jaxsafety", "jaxsafety.suggest", "jaxsafety.cli", "jaxsafety.runlog", "jaxsafety.status"]
)
def test_these_do_not_even_import_jax(module):
    done = run(f"import sys, {module}\nassert 'jax' not in sys.modules")
    assert done.returncode == 0, done.stderr
