"""Two real processes of two devices each: every one reads the rows of its own devices and no others."""

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsafety.formats import hf

_LOAD = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType
from jaxsafety.engine import hosts
from jaxsafety.formats import hf
from jaxsafety.formats import safetensors_file
from jaxsafety.engine.sharding import fsdp

read, original = [], safetensors_file.blocks

def blocks(tensor, *, start=0, stop=None):
    read.append((tensor.name, start, stop))
    return original(tensor, start=start, stop=stop)

safetensors_file.blocks = blocks
directory = Path(sys.argv[1])
rule = fsdp(jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,)), axis="x")
config, params = hf.load(directory, dtype="float32", shardings=rule)
rows = sorted((start, stop) for name, start, stop in read if name == "model.layers.1.mlp.up_proj.weight")
up = hosts.fetch(params["blocks"]["mlp"]["up"])
assert np.array_equal(up[1], hf.open_checkpoint(directory).matrix(1, "mlp/up"))
try:
    hf.save(directory.parent / "out", params, config, dtype="float32")
except ValueError as error:
    print((rows, str(error)), flush=True)
"""


@pytest.mark.slow
def test_each_process_reads_its_part_and_none_saves_what_it_does_not_hold(saved):
    directory, _ = saved()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = str(Path(hf.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _LOAD, str(directory), address]
    started = [
        subprocess.Popen(
            [*command, str(process)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    # gloo writes lines of its own before ours.
    told = [ast.literal_eval(out.strip().splitlines()[-1]) for out, _ in said]
    assert [rows for rows, _ in told] == [[(0, 6), (6, 12)], [(12, 18), (18, 24)]]
    message = "embed lies in part on other processes: expected params gathered by hosts.fetch"
    assert {error for _, error in told} == {message}
    assert not (directory.parent / "out").exists()
