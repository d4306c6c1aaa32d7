"""The layers: what each folder may import, where effects may live, and that importing has none.

A new folder must be placed in the table, which asks where it belongs.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsafety

PACKAGE = Path(jaxsafety.__file__).parent

# From the lowest layer to the highest: a module may import what stands before its line, and its own folder.
ORDER = (
    ("", "types", "tree", "keys", "config", "entry"),
    ("losses",),
    ("linalg",),
    ("world",),
    ("pools",),
    ("models",),
    ("parametrisations",),
    ("training",),
    ("methods",),
    ("edits",),
    ("attacks",),
    ("analysis",),
    ("claims",),
    ("subjects",),
    ("recipe",),
    ("rundir",),
    ("engine",),
    ("formats",),
    ("study",),
    ("report",),
    ("cli",),
)
LAYER_OF = {folder: layer for layer, folders in enumerate(ORDER) for folder in folders}
PURE_FOLDERS = [folder for folder, layer in LAYER_OF.items() if layer <= LAYER_OF["recipe"]]
KERNELS = ("losses", "linalg", "world", "models")
# A folder of theirs holds one file a method, an edit, an attack or an analysis: what they share lies in a layer below.
# Beside the subjects lies the judge of answers that are tokens, which the study asks, too, under attacks and edits.
ONE_EACH = ("pools", "parametrisations", "methods", "edits", "attacks", "analysis", "subjects")
# Lifted out by people who have a model, a world and a trainer of their own.
# An attack may bring a condition of the world's own kind.
LIFTED = {
    "losses": (), "linalg": (), "edits": ("linalg",), "analysis": ("linalg", "losses"),
    "attacks": ("linalg", "losses", "world"),
}  # fmt: skip

# Package outside this one: the modules that may import it (a prefix names a whole folder).
CONFINED = {
    "orbax": ("rundir.checkpoint",),
    "polars": ("rundir.results", "report", "study", "formats.rows_file"),
    "scipy": ("claims.hypotheses", "claims.intervals", "claims.prediction"),
    "matplotlib": ("report",),
    "torch": ("formats.official_file",),
    "gguf": ("formats.gguf_file",),
    "huggingface_hub": ("formats.hub",),
    "jinja2": ("report", "formats.hf_template", "formats.hf_tokenizer"),
    "tokenizers": ("formats.gguf_tokenizer", "formats.hf_special", "formats.hf_spelling", "formats.hf_tokenizer"),
    "rich": ("rundir.progress", "report"),
    "jsonargparse": ("recipe.yaml_file",),
    "yaml": ("config.yaml12", "formats.prompts", "recipe.yaml_file", "rundir"),
    "optax": ("training", "study"),
    "argparse": ("cli",),
    "subprocess": ("rundir.machine", "engine.cluster"),
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
            yield path if path in FILES else path.rpartition(".")[0]


def calls(tree):
    """Dotted names of everything called or read as an attribute, such as ``jax.jit`` or ``print``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def top(module):
    return module.partition(".")[0]


def test_every_folder_has_its_layer_and_few_files_lie_beside_them():
    assert {top(module) for module in FILES} == set(LAYER_OF)
    assert len([module for module in FILES if "." not in module and FILES[module].name != "__init__.py"]) <= 4


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_downward(module):
    for other in own_imports(module):
        below = LAYER_OF[top(other)] < LAYER_OF[top(module)] or top(other) == top(module)
        assert below or LAYER_OF[top(module)] == 0, f"{module} imports {other} from a layer above"


@pytest.mark.parametrize("folder", KERNELS)
def test_kernels_never_import_each_other(folder):
    """Models, world, losses and linear algebra are siblings; an outsider can lift each out."""
    for module in (name for name in FILES if top(name) == folder):
        assert not {top(other) for other in own_imports(module)} & set(KERNELS) - {folder}


@pytest.mark.parametrize("folder", ONE_EACH)
def test_what_has_a_file_of_its_own_imports_none_of_the_others(folder):
    for module in (name for name in FILES if top(name) == folder):
        assert not {top(other) for other in own_imports(module)} & set(ONE_EACH) - {folder}


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


def test_training_knows_no_model_method_or_world():
    for module in (name for name in FILES if top(name) == "training"):
        assert {top(other) for other in own_imports(module)} <= {"losses", "training", *ORDER[0]}


@pytest.mark.parametrize("folder", sorted(LIFTED))
def test_the_analyses_can_be_lifted_out(folder):
    """They run on anybody's weights and activations: no world, no model, no trainer."""
    for module in (name for name in FILES if top(name) == folder):
        assert {top(other) for other in own_imports(module)} <= {folder, *LIFTED[folder], *ORDER[0]}


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_a_dependency_is_imported_where_it_belongs(package):
    users = {module for module, tree in TREES.items() if package in {top(name) for name in imported(tree)}}
    assert users, f"{package} is used nowhere: drop it from the table"
    assert all(any(user == home or user.startswith(f"{home}.") for home in CONFINED[package]) for user in users), users


def test_only_the_engine_jits():
    """But for public functions that are called eagerly, and the check of a model, which compiles what it compares."""
    users = {module for module, tree in TREES.items() if {"jax.jit", "jax.pmap"} & set(calls(tree))}
    named = {module for module, tree in TREES.items() if {"jax.jit", "jax.pmap"} & set(imported(tree))}
    assert users | named == {"engine.programs", "entry.programs", "models.checks"}


@pytest.mark.parametrize("module", sorted(module for module in FILES if top(module) != "cli"))
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


@pytest.mark.parametrize("module", sorted(module for module in FILES if top(module) in PURE_FOLDERS))
def test_pure_modules_touch_no_disk_and_no_clock(module):
    """Worlds are read by world.loading alone, YAML by config.yaml12, modules for a help text by config.tables."""
    names = set(imported(TREES[module])) | set(calls(TREES[module]))
    effects = {"open", "time", "shutil", "socket", "tempfile", "random", "datetime"}
    assert not {top(name) for name in names} & effects
    assert module in ("world.loading", "config.yaml12", "config.tables") or not any(
        name.endswith((".read_text", ".write_text")) for name in names
    )


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_importing_starts_no_backend():
    modules = ", ".join(f"jaxsafety.{module}".rstrip(".") for module in FILES)
    # There is no public question for this; asking for the devices would start them.
    script = f"import {modules}\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends"
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "jaxsafety",
        "jaxsafety.config.names",
        "jaxsafety.cli.main",
        "jaxsafety.rundir.opening",
        "jaxsafety.rundir.status",
    ],
)
def test_these_do_not_even_import_jax(module):
    done = run(f"import sys, {module}\nassert 'jax' not in sys.modules")
    assert done.returncode == 0, done.stderr
