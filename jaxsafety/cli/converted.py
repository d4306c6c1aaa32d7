"""``jaxsafety import GGUF --out DIR``: a GGUF file as a Hugging Face directory."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxsafety.cli import declared
from jaxsafety.cli.declared import path

_SUFFIX = ".gguf"
_STORES = ("float32", "float16", "bfloat16")


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``import`` are about a GGUF file: their first one is such a file, or named like one."""
    if not arguments or arguments[0].startswith("-"):
        return False
    given = Path(arguments[0])
    if given.suffix == _SUFFIX or not given.is_file():
        return given.suffix == _SUFFIX
    from jaxsafety.formats import gguf_file  # a help text loads no NumPy

    return gguf_file.is_gguf(given)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options; a wrong one ends the process with exit code 2."""
    parser = declared.Parser(
        prog="jaxsafety import",
        description="Write a GGUF file, dequantised, as a Hugging Face directory with its tokenizer and chat template.",
    )
    add = parser.add_argument
    add("file", type=path, metavar="GGUF", help="file of architecture llama, qwen2 or qwen3, of any quantisation")
    add("--out", type=path, required=True, metavar="DIR", help="directory to write, which does not exist or is empty")
    add("--store", choices=_STORES, default=_STORES[0],
        help="type of the weights (default: float32, which alone loses nothing)")  # fmt: skip
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Writes the directory and prints it; returns the exit code.

    Raises:
        ImportError: an extra is missing.
        ValueError: a file that cannot be read, or a directory that holds something.
        OSError: the directory cannot be written.
    """
    from jaxsafety.formats import gguf

    gguf.write(options.file, options.out, dtype=options.store)
    print(options.out)
    return 0
