"""What names a model, to its directory: a directory, a GGUF file, a name on the Hub, these with an adapter."""

import shutil

import pytest

from jaxsafety.formats import hf, sources
from jaxsafety.formats.hub import Hub
from jaxsafety.formats.sources import Places, Source
from tests.formats import gguf_files, hub_cache, peft_files

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


@pytest.fixture
def adapter(tmp_path, config):
    """Writes an adapter's directory."""

    def make(name="adapter", seed=0, **fields):
        held = peft_files.tensors(config, modules=("q_proj",), seed=seed)
        return peft_files.write(tmp_path / name, held, **fields)

    return make


def test_a_model_with_an_adapter_is_merged_once_for_their_content(places, saved, adapter, tmp_path, capsys):
    base, own = saved(dtype="bfloat16")[0], adapter()
    first = sources.find(f"{base}+{own}", places)
    assert first.directory.parent == places.converted
    assert hf.open_checkpoint(first.directory).tensors["embed", None].dtype.name == "bfloat16"
    assert capsys.readouterr().err.count(f"{base}+{own} is merged, once, into") == 1
    shutil.copytree(base, tmp_path / "copy")
    assert sources.find(f"{tmp_path / 'copy'}+{own}", places) == first
    assert capsys.readouterr().err == ""
    # Another type, other factors, another base.
    others = [sources.find(f"{base}+{own}", places, store="float32"), sources.find(f"{base}+{adapter(seed=1)}", places)]
    (base / "generation_config.json").write_text("{}")
    others.append(sources.find(f"{base}+{own}", places))
    assert len({one.version for one in (first, *others)}) == 4
    assert hf.open_checkpoint(others[0].directory).tensors["embed", None].dtype.name == "float32"


def test_an_adapter_alone_is_of_the_model_that_it_names(places, saved, adapter, tmp_path):
    base = saved()[0]
    assert sources.find(str(adapter(base_model_name_or_path=str(base))), places) == sources.find(
        f"{base}+{adapter(base_model_name_or_path=str(base))}", places
    )
    hub_cache.put(places.hub.cache, "org/base", COMMIT, base, refs=["old"])
    hub_cache.put(places.hub.cache, "org/adapter", COMMIT, adapter(base_model_name_or_path="org/base", revision="old"))
    found = sources.find("org/adapter", places)
    assert found == sources.find("org/base@old+org/adapter", places)
    assert hf.open_checkpoint(found.directory).config == hf.read_config(base)


@pytest.mark.parametrize(
    ("base", "error", "said"),
    [
        (None, ValueError, "adapter_config.json names no base_model_name_or_path: name its model, as BASE[+].*adapter"),
        ("/none/there", FileNotFoundError, "is an adapter of /none/there, which is not here: name its model, as BASE"),
        ("org/none", FileNotFoundError, "org/none is neither .*: download it with `hf download org/none`, or name its"),
    ],
)
def test_an_adapter_whose_model_is_not_found_tells_how_to_name_it(places, adapter, base, error, said):
    with pytest.raises(error, match=said):
        sources.find(str(adapter(base_model_name_or_path=base)), places)


def test_an_adapter_of_an_adapter_is_told(places, saved, adapter):
    first = adapter("first", base_model_name_or_path=str(saved()[0]))
    second = adapter("second", base_model_name_or_path=str(first))
    with pytest.raises(ValueError, match="which is an adapter, too: name its model, as BASE"):
        sources.find(str(second), places)
    assert sources.find(f"{first}+{second}", places).directory.is_dir()


def test_sides_that_are_none_are_told(places, saved, adapter, tmp_path):
    base, own = saved()[0], adapter()
    with pytest.raises(FileNotFoundError, match=r"model holds no adapter_config.json: expected an adapter of PEFT"):
        sources.find(f"{base}+{base}", places)
    with pytest.raises(FileNotFoundError, match=r"none is not a directory: expected an adapter of PEFT"):
        sources.find(f"{base}+{tmp_path / 'none'}", places)
    with pytest.raises(FileNotFoundError, match=r"none is not a directory: expected a Hugging Face checkpoint"):
        sources.find(f"{tmp_path / 'none'}+{own}", places)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a.gguf is a GGUF file: expected an adapter of PEFT's, a directory"):
        sources.find(f"{base}+{tmp_path / 'a.gguf'}", places)
    assert not places.converted.exists()


def test_an_adapter_brings_its_tokenizer(places, saved, adapter, tell, tmp_path):
    base, own = saved()[0], adapter()
    tell(files={"chat_template.jinja": "mine"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tmp_path / name, own)
    (base / "chat_template.jinja").write_text("theirs")
    found = sources.find(f"{base}+{own}", places).directory
    assert (found / "chat_template.jinja").read_text() == "mine"
