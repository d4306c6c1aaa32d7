"""What names a model, to its directory: a directory, a GGUF file, a name on the Hub."""

import pytest

from jaxsafety.formats import hf, sources
from jaxsafety.formats.hub import Hub
from jaxsafety.formats.sources import Places, Source
from tests.formats import gguf_files, hub_cache

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def places(tmp_path):
    """An empty cache of the Hub's, and a folder for converted files."""
    return Places(Hub(tmp_path / "hub"), tmp_path / "converted")


@pytest.fixture
def file(tmp_path, config, make_params):
    """Writes a GGUF file of a random model."""
    pytest.importorskip("gguf")

    def make(name="model.gguf", seed=0):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        held = gguf_files.tensors(config, make_params(config, seed))
        return gguf_files.write(tmp_path / name, gguf_files.metadata(config), held)

    return make


def test_a_directory_is_its_own_source(places, saved):
    directory = saved()[0]
    assert sources.find(str(directory), places) == Source(directory)


def test_what_is_neither_path_nor_name_is_left_to_its_reader(places, tmp_path):
    assert sources.find(str(tmp_path / "none"), places) == Source(tmp_path / "none")


def test_a_name_is_a_snapshot_with_its_commit(places, saved):
    directory = saved()[0]
    snapshot = hub_cache.put(places.hub.cache, "org/name", COMMIT, directory)
    assert sources.find("org/name", places) == Source(snapshot, COMMIT)
    assert hf.open_checkpoint(snapshot).config == hf.read_config(directory)


def test_a_file_is_converted_once_for_its_content(places, file, capsys):
    first = sources.find(str(file()), places)
    assert first.directory.parent == places.converted
    before = (first.directory / "model.safetensors").stat().st_mtime_ns
    assert capsys.readouterr().err.count("is converted, once") == 1
    assert sources.find(str(file("other.gguf")), places) == first  # the same content elsewhere
    assert (first.directory / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
    changed = sources.find(str(file(seed=1)), places)
    assert (changed.directory == first.directory, changed.version == first.version) == (False, False)
    assert len(list(places.converted.iterdir())) == 2


def test_a_file_that_cannot_be_converted_leaves_nothing(places, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is damaged"):
        sources.find(str(tmp_path / "bad.gguf"), places)
    with pytest.raises(FileNotFoundError, match=r"none.gguf is not there: expected a GGUF file"):
        sources.find(str(tmp_path / "none.gguf"), places)
    assert not places.converted.exists()


def test_a_file_in_a_directory_or_a_snapshot_alone_is_meant(places, file, tmp_path):
    one = file("folder/model.gguf")
    found = sources.find(str(one.parent), places)
    assert found == sources.find(str(one), places)
    hub_cache.put(places.hub.cache, "org/name-GGUF", COMMIT, one.parent)
    assert sources.find("org/name-GGUF", places) == Source(found.directory, COMMIT)
    two = file("folder/q8.gguf", seed=1)
    with pytest.raises(
        ValueError, match=r"several models \(model.gguf, q8.gguf\): name the file, such as .*model.gguf"
    ):
        sources.find(str(two.parent), places)
