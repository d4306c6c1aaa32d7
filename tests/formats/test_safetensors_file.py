"""The format against its own library, and every way in which a file can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxsafety.formats import safetensors_file

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def arrays(dtype):
    """A matrix, a transposed view of another, a vector and one that spans several blocks."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3), "view": (7, 2), "long.weight": (301, 1000), "vector": (11,)}
    made = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return made | {"view": made["view"].T}


def write(file, tensors):
    dtype = next(iter(tensors.values())).dtype
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    safetensors_file.write(file, shapes, tensors.values(), dtype=dtype)


def read(tensor, **rows):
    return np.concatenate([block.copy() for _, block in safetensors_file.blocks(tensor, **rows)])


def bits(array):
    return array.dtype, array.shape, np.ascontiguousarray(array).tobytes()


def raw(file, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written_here(tmp_path, dtype):
    tensors = arrays(dtype)
    write(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert {name: bits(array) for name, array in found.items()} == {n: bits(array) for n, array in tensors.items()}
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read_here(tmp_path, dtype):
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays(dtype).items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = safetensors_file.read_header(tmp_path / "x.safetensors")
    assert {name: bits(read(tensor)) for name, tensor in header.items()} == {n: bits(a) for n, a in tensors.items()}


def test_rows_are_read_alone(tmp_path):
    tensors = arrays(np.float32)
    write(tmp_path / "x.safetensors", tensors)
    header = safetensors_file.read_header(tmp_path / "x.safetensors")
    for start, stop in ((0, 301), (299, 301), (10, 11), (0, 290)):
        assert bits(read(header["long.weight"], start=start, stop=stop)) == bits(tensors["long.weight"][start:stop])
    assert [first for first, _ in safetensors_file.blocks(header["long.weight"], start=3)] == [3, 265]
    assert bits(read(header["vector"], start=4)) == bits(tensors["vector"][4:])


def test_values_begin_at_a_multiple_of_eight_bytes(tmp_path):
    for width in range(1, 9):
        write(tmp_path / "x.safetensors", {"n" * width: np.zeros(3, np.float32)})
        (tensor,) = safetensors_file.read_header(tmp_path / "x.safetensors").values()
        assert tensor.start % 8 == 0


def test_a_tensor_of_another_shape_or_type_than_announced_is_not_written(tmp_path):
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float16)):
        with pytest.raises(ValueError, match=r"a: got .*, expected float32\(2, 3\)"):
            safetensors_file.write(tmp_path / "x", {"a": (2, 3)}, [wrong], dtype=np.dtype(np.float32))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "not a safetensors file: it does not begin": (b"", b"", 2**60),
    "its header alone takes 108": (b"{}", b"", 100),
    "its header is not JSON": (b"{]", b"", None),
    "its header is not a JSON object": (b"[]", b"", None),
    "cut off: got .* bytes, expected": ({"a": ENTRY}, b"1234567", None),
    "too long: got": ({"a": ENTRY}, b"123456789", None),
    "a overlaps b|b overlaps a": ({"a": ENTRY, "b": ENTRY}, b"12345678", None),
    "b does not follow a": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, b"1" * 20, None),
    "gives it 8 bytes": ({"a": ENTRY | {"shape": [3]}}, b"12345678", None),
    "entry of a is not": ({"a": {"dtype": "F32"}}, b"", None),
    "entry of b is not": ({"b": ENTRY | {"shape": [-2]}}, b"12345678", None),
    "entry of c is not": ({"c": ENTRY | {"shape": 2}}, b"12345678", None),
    "entry of d is not": ({"d": 3}, b"", None),
    "holds a twice": (b'{"a": 1, "a": 2}', b"", None),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_file_is_refused_from_its_header(tmp_path, message):
    header, data, length = DAMAGED[message]
    with pytest.raises(ValueError, match=message):
        safetensors_file.read_header(raw(tmp_path / "x.safetensors", header, data, length=length))


def test_empty_and_absent_files_and_pointers_are_told_apart(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        safetensors_file.read_header(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent is not a file"):
        safetensors_file.read_header(tmp_path / "absent")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        safetensors_file.read_header(tmp_path / "pointer")


def test_a_file_cut_off_at_any_byte_is_refused(tmp_path):
    write(tmp_path / "whole", {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)})
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut off|not a safetensors file"):
            safetensors_file.read_header(tmp_path / "cut")


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path):
    write(tmp_path / "x", {"a": np.ones((400, 1000), np.float32)})
    tensor = safetensors_file.read_header(tmp_path / "x")["a"]
    with (tmp_path / "x").open("rb+") as file:
        file.truncate(1_500_000)
    with pytest.raises(ValueError, match="cut off while a was read"):
        read(tensor)
