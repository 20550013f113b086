"""Reads golden cases: outputs of the authors' code on tensors that are rebuilt from their own names.

A case is ``<slug>/<case>.json`` (config, recipe of every tensor, tolerance) and ``<slug>/<case>.npz`` (the outputs).
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE = 4096  # outputs stored as a "sample" keep this many of their values


@dataclass(frozen=True)
class Case:
    """One golden case."""

    slug: str
    name: str
    config: dict
    state: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    described: dict[str, dict]
    expected: dict[str, np.ndarray]
    rtol: float
    atol: float

    def mismatches(self, outputs: dict) -> list[str]:
        """One line for each output that is missing, misshapen or outside the tolerance."""
        lines = []
        for name, description in self.described.items():
            if name not in outputs:
                lines.append(f"{name}: missing; the adapter gave {sorted(outputs)}")
                continue
            got = np.asarray(outputs[name])
            if list(got.shape) != description["shape"]:
                lines.append(f"{name}: shape {list(got.shape)}, expected {description['shape']}")
                continue
            if description["stored"] == "sample":
                got = got.reshape(-1)[_sample_index(got.size)]
            want = self.expected[name]
            if not np.allclose(got, want, rtol=self.rtol, atol=self.atol):
                worst = np.abs(got.astype(np.float64) - want).max()
                lines.append(f"{name}: worst error {worst:.3g} (rtol {self.rtol}, atol {self.atol})")
        return lines


def find_cases(folder: Path) -> list[Path]:
    """The json files of all cases under ``folder``."""
    return sorted(path for path in folder.glob("*/*.json") if path.with_suffix(".npz").exists())


def read_case(path: Path) -> Case:
    """The case whose json file is ``path``."""
    meta = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        expected = {name: arrays[name] for name in arrays.files}
    return Case(
        slug=meta["system"],
        name=meta["case"],
        config=meta["config"],
        state=_build(meta["state"]),
        inputs=_build(meta["inputs"]),
        described=meta["outputs"],
        expected=expected,
        rtol=meta["tolerance"]["rtol"],
        atol=meta["tolerance"]["atol"],
    )


def _build(recipes: dict[str, dict]) -> dict[str, np.ndarray]:
    # Rule "keep" marks buffers that the constructor computes: they are not part of the state.
    return {name: _tensor(name, **recipe) for name, recipe in recipes.items() if recipe.get("rule") != "keep"}


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _sample_index(size: int) -> np.ndarray:
    if size <= SAMPLE:
        return np.arange(size)
    return np.sort(_generator(f"sample:{size}").choice(size, SAMPLE, replace=False))


def _tensor(name: str, shape: list[int], rule: str = "normal", scale: float = 1.0, high: int = 2) -> np.ndarray:
    generator = _generator(name)
    if rule == "int":
        return generator.integers(0, high, size=shape, dtype=np.int64)
    if rule in ("zeros", "ones"):
        return np.full(shape, float(rule == "ones"), np.float32)
    if rule == "uniform":
        return (scale * generator.random(shape)).astype(np.float32)
    noise = generator.standard_normal(shape)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else int(np.prod(shape))
    values = {
        "normal": scale * noise,
        "weight": scale * noise / np.sqrt(max(fan_in, 1)),
        "norm_weight": 1.0 + 0.1 * scale * noise,
        "bias": 0.1 * scale * noise,
        "running_mean": 0.1 * scale * noise,
        "running_var": 1.0 + 0.1 * scale * np.abs(noise),
    }
    if rule not in values:
        raise ValueError(f"unknown rule {rule!r} for tensor {name!r}")
    return values[rule].astype(np.float32)
