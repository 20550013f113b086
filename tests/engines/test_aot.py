"""Every Triton kernel compiles for the GPUs it is meant for, on a machine that has none."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import manyheads.engines.triton as room

SCRIPT = Path(__file__).with_name("aot.py")
MODULES = [
    f"{room.__name__}.{module.name}"
    for module in pkgutil.iter_modules(room.__path__)
    if "AOT_CASES" in Path(module.module_finder.path, f"{module.name}.py").read_text()
]


def compile_all(module: str, *options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), module, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results: list[dict]) -> None:
    assert results
    for result in results:
        # A float32 product is three tf32 products: the one kernel that holds all gradients then spills up to 1 KiB.
        allowed = 1024 if result["kernel"] == "gradient_kernel" and "*fp32" in result["types"].split(",")[0] else 0
        assert result["spilled"] <= allowed, result
        assert result["shared"] <= 227 * 1024, result
        assert result["registers"] <= 255, result


def test_modules_with_kernels_are_found():
    assert "manyheads.engines.triton.select" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_each_kernel_compiles_for_hopper(module):
    check(compile_all(module, "--one-each"))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_configuration_compiles_for_hopper(module):
    check(compile_all(module))


@pytest.mark.slow
def test_half_precision_selection_runs_on_tensor_cores_with_asynchronous_copies():
    results = compile_all("manyheads.engines.triton.select")
    for result in results:
        if "fp32" in result["types"].split(",")[0]:
            continue
        assert result["tensor_cores"], result
        if result["kernel"] == "_forward_kernel":
            assert result["async_copies"] > 0, result
