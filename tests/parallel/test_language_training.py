"""Training a language model with its sequence sharded: the same losses, resumed or not, and errors that name a rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from manyheads.cli.main import app
from manyheads.data.text import python_documentation
from manyheads.parallel.training import _order, train_language

RUN = dict(length=32, steps=4, save_steps=2, lr=1e-2, device="cpu", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a byte tokenizer, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("language")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0]).save_pretrained(place / "model")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=256)
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(place / "model")
    (place / "text.txt").write_text(python_documentation()[:20_000])
    return place


def _train(folder: Path, name: str, port: int, options: dict[str, Any]) -> dict[str, Any]:
    """As under torchrun, on ranks that run already."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, PartialState

    rank, world = dist.get_rank(), dist.get_world_size()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    try:
        result = train_language(str(folder / "model"), str(folder / "text.txt"), output=folder / name, **options)
    finally:
        for key in place:
            del os.environ[key]
        AcceleratorState._reset_state()
        PartialState._reset_state()
    return result.to_dict()


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_replicas_of_sharded_sequences_learn_as_one_process(four_ranks, folder):
    alone = train_language(
        str(folder / "model"), str(folder / "text.txt"), output=folder / "alone", batch_size=2, **RUN
    )
    found = four_ranks.run(_train, folder, "sharded", _port(), {**RUN, "ranks": 2})
    assert [result["is_main_process"] for result in found] == [True, False, False, False]
    for result in found:
        assert [step for step, _ in result["losses"]] == [1, 2, 3, 4]
        assert [loss for _, loss in result["losses"]] == pytest.approx([loss for _, loss in alone.losses], rel=1e-5)
        assert result["test_loss"] == pytest.approx(alone.test_loss, rel=1e-5)
    assert alone.losses[-1][1] < alone.losses[0][1]
    written = json.loads((folder / "sharded/training.json").read_text())
    assert written["losses"] == [list(entry) for entry in found[0]["losses"]]
    from transformers import AutoModelForCausalLM

    weights = [AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("alone", "sharded")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)


def test_a_stopped_run_goes_on_with_the_same_losses(folder):
    def train(**options):
        return train_language(str(folder / "model"), str(folder / "text.txt"), **{**RUN, **options})

    whole = train(output=folder / "alone", batch_size=2)  # resumed at its end: nothing to do
    assert whole.steps == 4
    stopped = folder / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(output=stopped, batch_size=2, callbacks=[_stop_at(3)])
    resumed = train(output=stopped, batch_size=2)
    assert resumed.resumed_from == str(stopped / "checkpoint-2")
    assert resumed.losses == whole.losses
    assert resumed.test_loss == whole.test_loss
    with pytest.raises(ValueError, match=r"lr: 0\.01 then, 0\.02 now"):
        train(output=stopped, batch_size=2, lr=2e-2)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(output=stopped, batch_size=2, resume=False)


def _stop_at(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_every_epoch_has_its_order():
    order = _order(10, 3, None, 4, seed=7)
    assert len(order) == 24
    assert all(len(set(order[start : start + 8])) == 8 for start in (0, 8, 16))
    assert order[:8] != order[8:16]
    assert _order(10, 1, 5, 4, seed=7) == order[:20]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 2}, "2 ranks cannot share a sequence among 1 process.es.: start them with torchrun"),
        ({"length": 33}, "length=33 must be a multiple of 2"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"method": "rings"}, "method='rings' is not one of"),
        ({"length": 40_000}, "has 0 sequences of 40000 tokens"),
        ({"data": "nothing.txt"}, "must be 'documentation' or a text file"),
    ],
)
def test_bad_input_is_named(folder, options, words):
    data = options.pop("data", str(folder / "text.txt"))
    with pytest.raises(ValueError, match=words):
        train_language(str(folder / "model"), data, output=folder / "bad", **{**RUN, **options})


def test_command_keeps_the_kinds_of_models_apart(folder):
    for arguments, words in [
        (["davit_tiny", "--context-parallel", "2"], "--context-parallel cannot be used with a vision model"),
        ([str(folder / "model"), "--image-size", "8"], "--image-size cannot be used with a language model"),
    ]:
        problem = CliRunner().invoke(app, ["train", *arguments]).exception
        assert isinstance(problem, ValueError)
        assert words in str(problem)


def _torchrun(folder: Path, output: str, steps: int, log: Path, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
               str(_port()), "-m", "manyheads", "train", str(folder / "model"), "--data", str(folder / "text.txt"),
               "--context-parallel", str(processes), "--length", "32", "--steps", str(steps), "--save-steps", "5",
               "--output", str(folder / output), "--device", "cpu", "--timeout", "30", "--json"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def _workers(parent: int) -> dict[int, int]:
    """Process ids of torchrun's workers, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                place = dict(line.partition("=")[::2] for line in (entry / "environ").read_text().split("\0"))
                found[int(place["RANK"])] = int(entry.name)
        except (OSError, KeyError, IndexError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers of torchrun in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_names_the_dead_and_goes_on(folder, how, tmp_path):
    name, log = f"torchrun{int(how)}", tmp_path / "log"
    run = _torchrun(folder, name, 60, log)
    try:
        deadline = time.monotonic() + 400
        while not (folder / name / "checkpoint-10/trainer_state.json").exists():
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        victim = _workers(run.pid)[1]
        os.kill(victim, how)
        started = time.monotonic()
        if how == signal.SIGSTOP:
            while "RankError" not in log.read_text():
                assert time.monotonic() - started < 90
                time.sleep(0.5)
            os.kill(victim, signal.SIGKILL)
        assert run.wait(120) != 0
    finally:
        for worker in _workers(run.pid).values():
            os.kill(worker, signal.SIGKILL)  # a stopped one would outlive torchrun
        run.kill()
    said = log.read_text()
    assert "RankError" in said
    assert "rank 1" in said.split("RankError", 1)[1]
    again = _torchrun(folder, name, 60, tmp_path / "again")
    assert again.wait(400) == 0, (tmp_path / "again").read_text()
    resumed = json.loads((folder / name / "training.json").read_text())
    assert resumed["resumed_from"]
    whole = train_language(str(folder / "model"), str(folder / "text.txt"), output=tmp_path / "whole",
                           **{**RUN, "steps": 60, "lr": None, "save_steps": None})  # fmt: skip
    for (step, loss), (expected_step, expected) in zip(resumed["losses"], whole.losses):
        assert step == expected_step
        assert loss == pytest.approx(expected, rel=1e-4)
