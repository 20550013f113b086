"""Retrieval heads: the arithmetic, the fast pass against whole attention matrices, masking, files, one real model."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.data.language_models import load_language_model
from manyheads.data.needles import Needle, needle_prompt
from manyheads.interpret import retrieval_heads as module
from manyheads.interpret.attach import attention_function
from manyheads.interpret.retrieval_heads import (
    RetrievalHeads,
    aggregate,
    answer_needles,
    attended_positions,
    find_needle,
    mask_heads,
    retrieval_heads,
    score_heads,
)
from manyheads.interpret.retrieval_result import read_scores
from manyheads.interpret.retrieval_scores import answer_span, rouge_recall
from tests.interpret.conftest import FAMILIES, tiny

NEEDLE = Needle("The magic word is plum. ", "What is the magic word?", "plum")
GRID = dict(lengths=[120], depths=[0, 100], needles=[NEEDLE], buffer=20, max_new_tokens=4, progress=False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_scores_are_the_definition(data) -> None:
    steps, prompt_len, topk = (data.draw(st.integers(low, high)) for low, high in ((0, 5), (1, 9), (1, 4)))
    start = data.draw(st.integers(0, prompt_len - 1))
    end = data.draw(st.integers(start + 1, prompt_len))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    rows = torch.randn(steps, 2, 3, prompt_len + steps, generator=generator)
    prompt = torch.randint(0, 3, (prompt_len,), generator=generator).tolist()
    generated = torch.randint(0, 3, (steps,), generator=generator).tolist()
    scores, hits = score_heads(rows, prompt, generated, start, end, topk=topk)
    different, _ = score_heads(rows, prompt, generated, start, end, topk=topk, unique=True)
    for layer in range(2):
        for head in range(3):
            copied = []
            for s in range(steps):
                row = rows[s, layer, head, : prompt_len + s].tolist()
                best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:topk]
                hit = any(start <= i < end and prompt[i] == generated[s] for i in best)
                assert hits[s, layer, head] == hit
                copied += [generated[s]] * hit
            assert scores[layer, head] == pytest.approx(len(copied) / (end - start))
            assert different[layer, head] == pytest.approx(len(set(copied)) / len(set(prompt[start:end])))


def test_a_needle_that_is_not_found_scores_zero() -> None:
    scores, hits = score_heads(torch.ones(2, 1, 1, 9), [0] * 7, [0, 0], -1, -1)
    assert not scores.any()
    assert not hits.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk=0"),
        ({"start": 5, "end": 4}, r"span \[5, 4\)"),
        ({"start": 9, "end": 10}, "does not start in a prompt of 7"),
        ({"generated_ids": [0]}, "rows of 2 steps but 1"),
        ({"attention": torch.ones(2, 1, 1, 7)}, "have 7 keys"),
        ({"prompt_ids": torch.ones(7)}, "list of token ids"),
    ],
)
def test_bad_scores_are_refused(change, message) -> None:
    right = dict(attention=torch.ones(2, 1, 1, 8), prompt_ids=[0] * 7, generated_ids=[0, 0], start=1, end=4)
    with pytest.raises(ValueError, match=message):
        score_heads(**(right | change))


def test_acceptance_is_strict_and_equal_heads_keep_their_order() -> None:
    raw = torch.tensor([[[1.0, 0.0], [1.0, 0.5]], [[9.0, 9.0], [9.0, 9.0]]])
    mean, used, ranking = aggregate(raw, [50.1, 50.0])
    assert used == 1
    assert torch.equal(mean, raw[0])
    assert ranking == [(0, 0), (1, 0), (1, 1), (0, 1)]
    none = aggregate(raw, [0.0, 0.0])
    assert none[1] == 0
    assert not none[0].any()
    with pytest.raises(ValueError, match="as many recalls"):
        aggregate(raw, [60.0])


def test_needles_are_found_as_sets() -> None:
    assert find_needle([9, 1, 2, 3, 9], [3, 1, 2]) == (1, 4)
    assert find_needle([9, 1, 2, 9, 9], [3, 1, 2]) == (-1, -1)
    # Nine of ten tokens are not *more* than 0.9 of them.
    assert find_needle([*range(9), 77], list(range(10))) == (-1, -1)
    # A repetition lets the set be complete before the needle starts: early by one.
    assert find_needle([5, 1, 2, 1, 9], [1, 2, 1]) == (0, 3)
    with pytest.raises(ValueError, match="empty"):
        find_needle([1], [])
    with pytest.raises(ValueError, match="overlap"):
        find_needle([1], [1], overlap=1.0)


def test_a_word_is_found_with_its_leading_space() -> None:
    def words(text, **_):
        return {"input_ids": [hash(word) for word in text.replace(" ", " \u2581").split(" ") if word]}

    prompt = words("the word is plum.")["input_ids"][:-1] + words(" plum")["input_ids"]
    assert answer_span(words, prompt, "plum") == (3, 4)
    assert answer_span(words, prompt, "pear") == (-1, -1)


def test_recall_is_of_the_answer() -> None:
    assert rouge_recall("a b c d", "x a b y") == 50.0
    assert rouge_recall("running", "") == 0.0
    assert rouge_recall("ride a tram", "ride a tram and more") == 100.0
    assert rouge_recall("ride a tram", "I would ride the trams") == pytest.approx(200 / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_pass_is_the_whole_attention(family) -> None:
    model = tiny(family)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 250, (n,), generator=draw).tolist() for n in (14, 5, 9)]
    generated = [torch.randint(3, 250, (n,), generator=draw).tolist() for n in (3, 6, 1)]
    batched = attended_positions(model, prompts, generated, topk=2)
    model.set_attn_implementation("eager")
    for prompt, more, together in zip(prompts, generated, batched):
        alone = attended_positions(model, [prompt], [more], topk=2)[0]
        ids = torch.tensor([prompt + more])
        with torch.no_grad():
            weights = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0]
        rows = weights[:, :, len(prompt) - 1 : len(prompt) - 1 + len(more)].permute(2, 0, 1, 3)
        want = rows.topk(2, dim=-1).indices
        clear = (rows.topk(3, dim=-1).values.diff(dim=-1) < -1e-5).all(-1)
        assert clear.float().mean() > 0.8
        assert torch.equal(alone[clear], want[clear])
        assert torch.equal(together[clear], want[clear])


def test_short_rows_have_no_second_key() -> None:
    (top,) = attended_positions(tiny("llama"), [[5]], [[6, 7]], topk=3)
    assert top.shape == (2, 2, 4, 3)
    assert (top[0, ..., 0] == 0).all()
    assert (top[0, ..., 1:] == -1).all()
    assert (top[1, ..., 2] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_is_left_alone(family, tokenizer) -> None:
    model = tiny(family)
    ids = torch.randint(3, 250, (1, 9))
    before = model(ids).logits
    found = retrieval_heads(model, tokenizer, batch_size=2, **GRID)
    assert found.mean.shape == (2, 4)
    assert len(found.tests) == 2
    assert all(test.found for test in found.tests)
    assert torch.equal(before, model(ids).logits)


def test_batches_and_singles_agree(tokenizer) -> None:
    model = tiny("llama")
    grid = GRID | {"lengths": [90, 150], "depths": [0, 60, 100]}
    one = retrieval_heads(model, tokenizer, **grid)
    many = retrieval_heads(model, tokenizer, batch_size=4, **grid)
    assert [test.answer for test in one.tests] == [test.answer for test in many.tests]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(one.tests, many.tests))


def test_an_interrupted_run_continues(tokenizer, tmp_path, monkeypatch) -> None:
    model, ran = tiny("llama"), []
    whole = retrieval_heads(model, tokenizer, **GRID)
    run = module._run

    def stop_at_second(*args):
        ran.append(1)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(module, "_run", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        retrieval_heads(model, tokenizer, resume=tmp_path, **GRID)
    resumed = retrieval_heads(model, tokenizer, resume=tmp_path, **GRID)
    assert len(ran) == 3
    assert torch.equal(resumed.mean, whole.mean)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="tests of another run"):
        retrieval_heads(model, tokenizer, resume=tmp_path, **(GRID | {"topk": 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"topk": 0}, "topk=0"),
        ({"lengths": [2000]}, "this model takes 1024"),
        ({"lengths": [30]}, "too short"),
        ({"depths": [120]}, "depth=120"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_grids_are_refused(change, message, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_heads(tiny("llama"), tokenizer, **(GRID | change))


def result(tokenizer) -> RetrievalHeads:
    found = retrieval_heads(tiny("llama"), tokenizer, **GRID)
    for i, test in enumerate(found.tests):
        test.scores.copy_(torch.arange(8.0).view(2, 4) / 10 * (i + 1))
    found.recall_threshold = -1.0
    return found


def test_files_come_back(tokenizer, tmp_path) -> None:
    found = result(tokenizer)
    found.save(tmp_path / "found.json")
    again = RetrievalHeads.load(tmp_path / "found.json")
    assert torch.equal(again.mean, found.mean)
    assert again.ranking[:2] == [(1, 3), (1, 2)]
    assert again.summary() == found.summary()
    found.write_scores(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["1-3"] == pytest.approx([0.7, 1.4])
    assert torch.allclose(read_scores(tmp_path / "scores.json", found.geometry).mean(0), found.mean)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"0-0": [1], "1-1": [1]}', '{"0-0": [1], "0-1": []}', "{}"])
def test_other_files_are_refused(text, tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_scores(path)
    with pytest.raises(ValueError, match="not a file of retrieval heads"):
        RetrievalHeads.load(path)


def test_scores_of_another_model_are_refused(tokenizer, tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"0-0": [0.5]}')
    with pytest.raises(ValueError, match="1 layers x 1 heads, the model 2 x 4"):
        read_scores(path, result(tokenizer).geometry)


def test_the_result_is_shown(tokenizer) -> None:
    from rich.console import Console

    found = result(tokenizer)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table(3))
    text = console.export_text()
    assert "1.050" in text
    assert max(map(len, text.splitlines())) <= 80
    assert found.plot().data[0].z[1][3] == pytest.approx(1.05)
    assert found.mask().sum() == 7
    assert found.mask(top=2).nonzero().tolist() == [[1, 2], [1, 3]]
    assert torch.allclose(found.kv_scores(), torch.tensor([[0.15, 0.45], [0.75, 1.05]]))
    with pytest.raises(ValueError, match="top=9"):
        found.mask(top=9)


def spy(model, ids, heads, **options):
    """Output of every attention layer of one pass with masked heads, and its values."""
    seen = {}
    layers = [block.self_attn if hasattr(block, "self_attn") else block.attn for block in module.decoder(model)[1]]

    def note(attention, args, output):
        seen[attention.layer_idx] = output[1]

    handles = [attention.register_forward_hook(note) for attention in layers]
    with torch.no_grad(), mask_heads(model, heads, **options):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_heads_attend_uniformly(family) -> None:
    model = tiny(family, attn_implementation="eager")
    # Shorter than Gemma 2's window.
    ids = torch.randint(3, 250, (2, 7))
    uniform = torch.ones(7, 7).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    plain = spy(model, ids, [])
    last = spy(model, ids, [(0, 1)])
    assert torch.allclose(last[0][:, 1, -1], uniform[-1].expand(2, 7))
    assert torch.equal(last[0][:, 1, :-1], plain[0][:, 1, :-1])
    assert torch.equal(last[0][:, [0, 2, 3]], plain[0][:, [0, 2, 3]])
    every = spy(model, ids, [(0, 1)], prefill=True)
    assert torch.allclose(every[0][:, 1], uniform.expand(2, 7, 7))
    some = spy(model, ids, [(0, 1)], start=4)
    assert torch.allclose(some[0][:, 1, 4:], uniform[4:].expand(2, 3, 7))
    assert torch.equal(some[0][:, 1, :4], plain[0][:, 1, :4])
    silent = spy(model, ids, [(0, 1)], prefill=True, mode="zero")
    assert not silent[0][:, 1].any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["uniform", "zero"])
def test_decoding_with_a_cache_equals_teacher_forcing(implementation, mode) -> None:
    model = tiny("llama", attn_implementation=implementation)
    prompt = torch.randint(3, 250, (1, 9))
    heads = [(0, 0), (0, 3), (1, 2)]
    with mask_heads(model, heads, mode=mode):
        out = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=256)
    with torch.no_grad(), mask_heads(model, heads, mode=mode, start=8):
        forced = model(out[:, :-1]).logits[:, 8:].argmax(-1)
    assert torch.equal(out[:, 9:], forced)


def test_padding_is_not_averaged() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 250, (1, 6))
    padded = torch.cat([torch.full((1, 4), 256), ids], 1)
    mask = (padded != 256).long()
    with torch.no_grad(), mask_heads(model, [(0, 1), (1, 0)], prefill=True):
        alone, together = model(ids).logits, model(padded, attention_mask=mask).logits[:, 4:]
    assert torch.allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    model = tiny("llama").to(dtype)
    ids = torch.randint(3, 250, (1, 6))
    with torch.no_grad(), mask_heads(model, [(1, 1)], prefill=True):
        assert model(ids).logits.isfinite().all()
    assert attended_positions(model, [[4, 5]], [[6]])[0].shape == (1, 2, 4, 1)


def test_bad_masks_are_refused() -> None:
    model = tiny("llama")
    for heads, options, message in (
        ([(0, 4)], {}, "query heads 0 to 3"),
        ([(0, 0)], {"mode": "off"}, "mode='off'"),
        ([(0, 0)], {"start": -1}, "start=-1"),
        ([(0, 0)], {"start": 1, "prefill": True}, "cannot be combined"),
    ):
        with pytest.raises(ValueError, match=message), mask_heads(model, heads, **options):
            pass
    with pytest.raises(RuntimeError, match="attached"), attention_function(model, lambda *_: 0), mask_heads(model, []):
        pass


@pytest.mark.slow
def test_heads_of_a_real_model_copy_and_are_needed() -> None:
    model, tokenizer = load_language_model("smollm2")
    found = retrieval_heads(
        model, tokenizer, lengths=[230], buffer=0, depths=[50, 90], max_new_tokens=24, batch_size=6, progress=False
    )
    assert found.accepted >= 4
    assert (18, 6) in found.top(5)
    assert found.mean[18, 6] > 0.5
    assert (found.mean == 0).float().mean() > 0.5
    prompt = needle_prompt(tokenizer, module.NEEDLES[0], length=230, buffer=0, depth=50)
    (free,) = answer_needles(model, tokenizer, [prompt], max_new_tokens=24)
    with mask_heads(model, found.top(10)):
        (masked,) = answer_needles(model, tokenizer, [prompt], max_new_tokens=24)
    assert free[1] > 90
    assert masked[1] < 60
