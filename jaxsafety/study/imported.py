"""Models that the paper's authors trained, as a run directory whose pretraining and tuning are finished.

Every file is read and checked before anything is written, and the directory gets its name once it is whole: a kill at
any moment leaves nothing there, and the same command makes it.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from jaxsafety import tree
from jaxsafety.config.names import SEED, check_name, nearest
from jaxsafety.formats import official
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import atomic, layout, locks, machine, manifest_file, opening
from jaxsafety.study import pipeline, train
from jaxsafety.subjects.synthetic import Config
from jaxsafety.types import Params
from jaxsafety.world import World
from jaxsafety.world import load as load_world

_FORM = "MODEL:POINT=FILE, such as sft:eta_M=sft.pkl"
# Fields of GPTConfig that a file and the recipe's model must have in common.
_SHARED = ("block", "positions", "layers", "width", "mlp_width")


def write(recipe: Recipe, directory: Path, *, pretrained: str, tuned: Sequence[str]) -> None:
    """Makes the run directory of a recipe from checkpoints of the authors', one for each of its models and seeds.

    Where that has been done with files of the same content, nothing happens; else the directory must be absent or
    empty. Each stage of the recipe, which has no grid, is one chunk, and tuning keeps no snapshots. ``{seed}`` in a
    path stands for each of its seeds; ``tuned`` are ``MODEL:POINT=FILE`` for every other model, by its names there.

    Raises:
        ValueError: the recipe is not such a one; a model is missing, named twice or not in the recipe; a file is not
            the authors' model in the recipe's sizes; or the directory holds something else.
        OSError: a file is missing, or the directory cannot be written.
        ImportError: torch is not installed.
    """
    _check_recipe(recipe)
    own = recipe.subject.options
    files = _files(recipe, pretrained, tuned)
    world = load_world(own.world, grammars=own.grammars)
    own.model.build(world)
    digests = {_place(name, seed): _digest(file) for (name, seed), file in files.items()}
    _check_distinct(digests)
    if _is_done(recipe, directory, digests):
        return
    params = _same_tokens({key: _params(file, own, world) for key, file in files.items()}, world)
    with _made_whole(directory) as staging:
        ready = pipeline.prepare(recipe, staging)
        opening.record_config(staging / "config.yaml", as_dict(recipe))
        opening.keep_files(staging / layout.FILES, pipeline.own_files(recipe))
        about = {"sha256": digests, "files": {_place(*key): str(file) for key, file in files.items()}}
        manifest_file.write_manifest(
            staging, {"imported": about | machine.environment(), "models": pipeline.steps(recipe)}
        )
        for label in recipe.models:
            lanes = recipe.lanes_of(label)
            rows = [[params[lane.name, seed] for seed in recipe.seeds] for lane in lanes]
            train.adopt(ready, lanes, tree.stack([tree.stack(row) for row in rows]))


def _check_recipe(recipe: Recipe) -> None:
    if recipe.subject.kind != "world":
        raise ValueError(f"import makes a run over a world, and the recipe is about {recipe.subject.kind}")
    if recipe.subject.options.worlds != "one":
        raise ValueError("import: got worlds: per_seed, expected the one world that the files were trained in")
    if recipe.grid:
        raise ValueError("import makes one run, and the recipe has a `grid:`: expected a recipe without one")
    for lane in recipe.lanes:
        how, where = lane.training, f"models.{lane.label}"
        if how is None:
            raise ValueError(f"{where}: an imported model is one that was trained, expected a `method`")
        if how.chunk_steps < how.steps:
            raise ValueError(
                f"{where}.chunk_steps: got {how.chunk_steps}, expected its steps ({how.steps}), as nothing is known of "
                "an imported model before its last step"
            )
        if how.snapshots:
            raise ValueError(
                f"{where}.snapshots: got {how.snapshots}, expected 0, since an imported model has no earlier steps"
            )
    if len(begun := [lane.name for lane in recipe.lanes if lane.parent is None]) != 1:
        raise ValueError(f"import takes one pretrained model, and the recipe has {', '.join(begun)}")


def _files(recipe: Recipe, pretrained: str, tuned: Sequence[str]) -> dict[tuple[str, int], Path]:
    """The file of every lane and seed of the recipe."""
    root, named = recipe.lanes[0].root, {_spelt(lane): lane for lane in recipe.tuned}
    patterns = {root.name: pretrained}
    for text in tuned:
        # A point may hold a `=` itself.
        known = [name for name in named if text.startswith(f"{name}=")]
        model = max(known, key=len, default=text.partition("=")[0])
        pattern = text.removeprefix(f"{model}=") if "=" in text else ""
        if not (model and pattern):
            raise ValueError(f"--tuned: got {text!r}, expected {_FORM}")
        check_name("model in --tuned", model, named)
        if named[model].name in patterns:
            raise ValueError(f"--tuned names {model} twice: expected one file for it")
        patterns[named[model].name] = pattern
    if missing := [name for name, lane in named.items() if lane.name not in patterns]:
        raise ValueError(
            f"no file for {', '.join(missing)}: expected --tuned for every tuned model of the recipe "
            f"({', '.join(named)}), or a recipe without what there is no model of"
        )
    seeds = recipe.seeds
    if one := next((pattern for pattern in patterns.values() if SEED not in pattern and len(seeds) > 1), None):
        raise ValueError(f"{one} is one file for the seeds {list(seeds)}: expected {SEED} in its path, or one seed")
    return {
        (name, seed): Path(pattern.replace(SEED, str(seed))) for name, pattern in patterns.items() for seed in seeds
    }


def _spelt(lane: Lane) -> str:
    """What the command line calls a tuned model: a point holds `=` where values have no names."""
    return ":".join(filter(None, (lane.label, lane.point)))


def _place(name: str, seed: int) -> str:
    return f"{name} of seed {seed}"


def _digest(file: Path) -> str:
    if not file.is_file():
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise FileNotFoundError(f"no file at {file}: expected a checkpoint of the authors'{nearest(file.name, beside)}")
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_distinct(digests: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for place, digest in digests.items():
        if digest in seen:
            raise ValueError(f"{seen[digest]} and {place} are files of the same content: expected one for each model")
        seen[digest] = place


def _is_done(recipe: Recipe, directory: Path, digests: Mapping[str, str]) -> bool:
    """Whether the directory holds these very models; raises ValueError where it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory} is no run and not empty: expected a new or an empty directory (--out)")
    opening.record_config(directory / "config.yaml", as_dict(recipe))
    recorded = manifest_file.read_manifest(directory).get("imported")
    if not recorded:
        raise ValueError(f"{directory} holds a run that was not imported: choose another output directory (--out)")
    for place, digest in digests.items():
        if recorded["sha256"].get(place) != digest:
            raise ValueError(
                f"{directory} holds {place} imported from a file of other content: choose another directory (--out)"
            )
    return True


def _same_tokens(params: Mapping[tuple[str, int], Params], world: World) -> dict[tuple[str, int], Params]:
    """Gives all models the world's vocabulary, of which each keeps what all of them have."""
    known, begins = min(one["embed"].shape[0] for one in params.values()), world.special["bos"]
    return {
        key: official.fill_vocabulary(one, known=known, size=world.vocab_size, like=begins)
        for key, one in params.items()
    }


def _params(file: Path, own: Config, world: World) -> Params:
    """Loads a model and checks that it is the recipe's, but for tokens that no prompt holds."""
    config = own.model.build(world)
    # Parameters do not depend on the number of heads.
    params, found = official.load(file, heads=1)
    theirs, ours = asdict(found), asdict(config) | {"mlp_width": config.mlp_width or 4 * config.width}
    for name in _SHARED:
        if theirs[name] != ours[name]:
            raise ValueError(f"{file}: {name} is {theirs[name]}, expected {ours[name]} by the recipe's model")
    if (heads := official.HEADS.get(config.width, config.heads)) != config.heads:
        raise ValueError(
            f"subject.model.heads: got {config.heads}, expected the {heads} of the authors' width {config.width}"
        )
    if found.max_tokens < config.max_tokens:
        raise ValueError(
            f"{file}: its window is {found.max_tokens} tokens, expected at least the {config.max_tokens} of the world "
            f"{own.world}"
        )
    least = config.vocab_size - len(world.spec.late_duplicates)
    if not least <= found.vocab_size <= config.vocab_size:
        without = f", or {least} without its last ones" if least < config.vocab_size else ""
        raise ValueError(
            f"{file}: it has {found.vocab_size} tokens, expected the {config.vocab_size} of the world {own.world}"
            f"{without}"
        )
    return params


@contextmanager
def _made_whole(directory: Path) -> Iterator[Path]:
    """A locked, empty directory beside ``directory``, which gets that name if all goes well, and is deleted if not."""
    final = directory.resolve()
    staging = final.with_name(f".{final.name}.importing")
    with locks.hold(staging):
        try:
            _clear(staging)  # of what a killed import left
            yield staging
            try:
                staging.rename(final)
            except OSError as error:
                raise OSError(f"cannot make {directory} ({error.strerror}): choose another (--out)") from error
            atomic.sync(final.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
