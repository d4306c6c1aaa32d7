"""Models in the Hub's cache: found by name and revision, and told how to get where they are not there."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxsafety.config.names import is_hub_name, model_named
from jaxsafety.formats import hub
from jaxsafety.formats.hub import Hub
from tests.formats import hub_cache

OLD, NEW = "0123456789abcdef0123456789abcdef01234567", "0123ffff89abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A cache with two commits of a model of one file of weights, an old one that is tagged and the branch's."""
    model = tmp_path / "made"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    hub_cache.put(tmp_path / "hub", "org/name", OLD, model, refs=["v1.0", "refs/pr/1"])
    hub_cache.put(tmp_path / "hub", "org/name", NEW, model)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"HF_HOME": "~/b"}, "HOME/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HUB_CACHE": ""}, "HOME/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_their_tools_have_it(monkeypatch, environment, place):
    monkeypatch.setenv("HOME", "/home/me")
    assert hub.from_environment(environment) == Hub(hub.Path(place.replace("HOME", "/home/me")), offline=False)


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("ON", True), ("true", True), ("0", False), ("", False)])
def test_a_variable_keeps_from_downloading(value, offline):
    assert hub.from_environment({"HF_HUB_OFFLINE": value}).offline is offline
    assert hub.from_environment({"TRANSFORMERS_OFFLINE": value}).offline is offline


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        ("", NEW),
        ("@main", NEW),
        ("@v1.0", OLD),
        ("@refs/pr/1", OLD),
        (f"@{OLD}", OLD),
        ("@01234", OLD),
        ("@0123f", NEW),
    ],
)
def test_a_revision_is_a_branch_a_tag_a_commit_or_its_beginning(cache, revision, commit):
    found = hub.find(Hub(cache), f"org/name{revision}")
    assert found.commit == commit
    assert (found.directory / "config.json").read_text() == "config.json"  # through a link


def test_a_beginning_of_several_commits_is_refused(cache):
    with pytest.raises(ValueError, match=f"org/name@0123 is one of {OLD}, {NEW} .* expected more of the commit"):
        hub.find(Hub(cache), "org/name@0123")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("some/other", "some/other is neither a path here nor in {}: download it with `hf download some/other`"),
        (
            "org/name@v2",
            "org/name@v2 is neither a path here nor in {} (where there is org/name@v1.0, org/name@main): download it "
            "with `hf download org/name --revision v2`",
        ),
        ("org/name@012", "`hf download org/name --revision 012`"),  # too little of a commit
    ],
)
def test_what_is_not_there_is_told_with_how_to_get_it(cache, named, told):
    with pytest.raises(FileNotFoundError) as error:
        hub.find(Hub(cache), named)
    assert told.format(cache) in str(error.value)


def test_a_download_that_has_not_ended_is_told(cache, tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "made" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "made" / "model-1.safetensors").touch()
    for lost, without in (
        ("model-2.safetensors", ()),
        ("weights", ("model.safetensors.index.json", "model-1.safetensors", "model.safetensors")),
        ("config.json", ("config.json",)),
    ):
        hub_cache.put(cache, f"org/{lost}", OLD, tmp_path / "made", without=without)
        with pytest.raises(FileNotFoundError, match=f"is in {cache} without its {lost}: download it with `hf download"):
            hub.find(Hub(cache), f"org/{lost}")
    (cache / "models--org--name" / "snapshots" / NEW / "model.safetensors").resolve().unlink()  # a blob
    with pytest.raises(FileNotFoundError, match="without its weights"):
        hub.find(Hub(cache), "org/name")


@pytest.fixture
def package(monkeypatch):
    """Puts something in the place of ``huggingface_hub``'s download."""

    def put(download):
        module = None if download is None else SimpleNamespace(snapshot_download=download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    return put


def test_what_is_not_there_is_downloaded_where_that_can_be(cache, tmp_path, package, capsys):
    asked = []

    def download(name, *, revision, cache_dir, allow_patterns, ignore_patterns):
        asked.append((name, revision, cache_dir))
        return str(hub_cache.put(cache_dir, name, NEW, tmp_path / "made", refs=[revision or "main"]))

    package(download)
    online = Hub(cache, offline=False)
    assert hub.find(online, "org/name").commit == NEW
    assert asked == []
    found = hub.find(online, "org/new@v3")
    assert (found.commit, found.directory) == (NEW, cache / "models--org--new" / "snapshots" / NEW)
    assert asked == [("org/new", "v3", cache)]
    assert "org/new@v3 is neither a path here" in capsys.readouterr().err
    assert hub.find(Hub(cache), "org/new@v3") == found


def test_a_download_that_fails_is_one_sentence(cache, package):
    def fail(*_, **__):
        raise RuntimeError("401 Client Error.\n\nRepository Not Found for url ...")

    package(fail)
    with pytest.raises(FileNotFoundError) as error:
        hub.find(Hub(cache, offline=False), "org/new")
    assert str(error.value) == (
        f"org/new is neither a path here nor in {cache}, and downloading it failed (401 Client Error.): try `hf "
        "download org/new`"
    )
    package(None)  # not installed
    with pytest.raises(FileNotFoundError, match="download it with `hf download org/new`"):
        hub.find(Hub(cache, offline=False), "org/new")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("org/name", True), ("Org-1/name.v2_x@main", True), ("org/name@refs/pr/1", True), ("org/n@seed{seed}", True),
        ("name", False), ("./org/name", False), ("../name", False), ("a/b/c", False), ("/org/name", False),
        ("~/name", False), ("org/na me", False), ("org/name@", False), ("org/name@../x", False),
    ],
)  # fmt: skip
def test_a_name_on_the_hub_looks_like_one(text, named):
    assert is_hub_name(text) is named


def test_a_path_that_is_there_comes_before_the_hub(tmp_path):
    (tmp_path / "org" / "seed_3").mkdir(parents=True)
    assert model_named("org/name", beside=tmp_path) == "org/name"
    assert model_named("org/seed_3", beside=tmp_path) == str(tmp_path / "org" / "seed_3")
    assert model_named("org/seed_{seed}", beside=tmp_path) == str(tmp_path / "org" / "seed_{seed}")
    assert model_named("name", beside=tmp_path) == str(tmp_path / "name")
    assert model_named("/x/y", beside=tmp_path) == "/x/y"
