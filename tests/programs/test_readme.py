"""What the README and the pages of docs/ show runs as printed, and the files they point at exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.cli import launch
from jaxsafety.recipe import yaml_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
YAML = [block for page in PAGES.values() for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]


@pytest.mark.slow
def test_python_blocks_run_in_order(monkeypatch):
    names: dict = {}
    # The command line's tests run it.
    studies = []
    monkeypatch.setattr(launch, "run", lambda *given: studies.append(given))
    for block in re.findall(r"```python\n(.*?)```", PAGES["library"], flags=re.DOTALL):
        exec(compile(block, "library.md", "exec"), names)
    assert names["trial"].unsafe.all()
    assert names["metrics"]["rewards/margins"].shape == (8,)
    assert np.all(np.asarray(names["states"].step) == 3)
    assert names["excess"].shape == (2,) and names["tau"].shape == names["gain"].shape == (2, 100)
    assert names["halfway"]["mlp"]["w"].shape == (2, 16, 64)
    ((recipe, _, stages),) = studies
    assert recipe.seeds == (0, 1) and {lane.steps for lane in recipe.lanes} == {2} and stages == ["pretrain"]


def test_the_world_is_one(tmp_path):
    (text,) = (block for block in YAML if block.startswith("like:"))
    (tmp_path / "my_world.yaml").write_text(text)
    built = world.load(tmp_path / "my_world.yaml")
    assert built.spec.max_text == 10 and built.bijections.shape == (2, 8, 12)


def test_the_run_that_is_reused_has_the_subject_of_the_demo(tmp_path):
    (text,) = (block for block in YAML if "run: runs/quick" in block)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe, demo = yaml_file.read(tmp_path / "recipe.yaml"), yaml_file.read(ROOT / "experiments" / "quick.yaml")
    assert recipe.subject == demo.subject and recipe.lanes[0].how.model == demo.lanes[0].name


def test_the_recipe_over_a_checkpoint_is_one(tmp_path):
    (text,) = (block for block in YAML if "subject: {checkpoint:" in block)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = yaml_file.read(tmp_path / "recipe.yaml")
    assert {lane.name for lane in recipe.lanes_of("sft")} == {"sft.eta_M", "sft.eta_S"}
    assert [lane.reference.name for lane in recipe.lanes_of("dpo")] == ["pretrained"] * 2
    assert set(recipe.analyses) == {"weights", "activations"} and recipe.evaluate.answers == 64


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_links_lead_somewhere(page):
    text, place = (README, ROOT) if page == "README" else (PAGES[page], ROOT / "docs")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    # Made when the site is.
    made = ("reference/", "papers/")
    assert not [one for one in targets if not (place / one).exists() and not one.startswith(made)]


def test_the_readme_is_short():
    """What it is, a picture, two commands, one table, where to go on."""
    assert len(README.splitlines()) < 110
