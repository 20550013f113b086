"""Compile Triton kernels ahead of time, without a GPU, and print what each uses, one JSON object a line.

    python aot.py manyheads.engines.triton.select [more modules] [--arch 90] [--one-each]

A module lists its kernels in ``AOT_CASES``, dicts with ``fn`` (the kernel), ``signature`` (argument -> Triton type),
``constexprs``, ``num_warps``, ``num_stages`` and, optionally, ``divisible`` (integer arguments that are multiples of 16
in practice). Pointers count as aligned to 16 bytes, as torch's are: otherwise loads are not pipelined, and the result
says nothing about a real launch. This must run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path


def compile_case(case: dict, arch: int) -> dict:
    """Compile one case; its name and resources: registers, spilled bytes, shared memory, tensor-core instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constexprs = case["fn"], dict(case["constexprs"])
    given = case["signature"]
    signature = {name: "constexpr" if name in constexprs else given[name] for name in kernel.arg_names}
    aligned = set(case.get("divisible", ())) | {n for n, kind in signature.items() if kind.startswith("*")}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {name: case[name] for name in ("num_warps", "num_stages") if name in case}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    sizes = {n: v for n, v in constexprs.items() if not isinstance(v, bool) or v}
    return {
        "kernel": kernel.__name__,
        "types": ",".join(kind for kind in dict.fromkeys(signature.values()) if kind.startswith("*")),
        "sizes": {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in sizes.items()},
        "shared": compiled.metadata.shared,
        "tensor_cores": bool(re.search(r"\b(wgmma|mma)\.", ptx)),
        "async_copies": ptx.count("cp.async"),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tools / "cuobjdump", "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{text}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled": max(stack, local)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--one-each", action="store_true", help="only the first case of each kernel")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    for module in arguments.modules:
        cases = list(importlib.import_module(module).AOT_CASES)
        seen = set()
        for number, case in enumerate(cases):
            if arguments.one_each and case["fn"] in seen:
                continue
            seen.add(case["fn"])
            result = {"module": module, "case": number, **compile_case(case, arguments.arch)}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
