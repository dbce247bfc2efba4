"""The main job as a notebook calls it: any batching gives the same samples, in dataset order."""

import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from handmade import as_model, hooked, llama

from tl_headnorm import collect, heatmap, load_model, load_questions
from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names, memory
from tl_headnorm.errors import InputError
from tl_headnorm.run.segments import RowFile

NAMES = ("head_output_norm", "head_resid_contrib_norm")


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny", dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def questions():
    return load_questions("builtin:questions", max_samples=40)


def test_ten_lines_of_a_notebook(tiny, questions):
    run = collect(tiny, questions, token_agg="all", validate_samples=5, progress=False)
    assert isinstance(run, xr.Dataset)
    assert run["head_output_norm"].dims == ("sample", "layer", "head")
    for name in NAMES:
        values = run[name].values.astype(np.float64)
        np.testing.assert_allclose(run[f"{name}_mean"], values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(run[f"{name}_std"], values.std(0, ddof=1), rtol=1e-5)
    assert run.attrs["validated_against_hf"] < 1e-4
    assert run.attrs["accuracy"] > 0.9
    figure = heatmap(run["head_output_norm_mean"])
    assert figure.data[0].z.shape == (run.sizes["layer"], run.sizes["head"])


def test_an_unknown_setting_is_refused_with_the_nearest(tiny, questions):
    with pytest.raises(InputError, match="did you mean 'token_agg'"):
        collect(tiny, questions, token_ag="all")


@pytest.mark.parametrize(
    "ways",
    [
        {"share_prefix": False, "sort": False},
        {"share_prefix": False},
        {"batch_size": 1},
        {"batch_size": 64, "max_batch_tokens": 300},
        {"padding_side": "left", "batch_size": 7},
    ],
)
@pytest.mark.parametrize("token_agg", ["last", "all"])
def test_every_way_gives_the_same_values_in_dataset_order(tiny, questions, ways, token_agg):
    from tl_headnorm.data.prepare import prepare
    from tl_headnorm.settings import Settings

    encoded = prepare(tiny.tokenizer, tiny.n_ctx, questions, Settings()).encoded
    base = measure_samples(tiny, encoded, token_agg=token_agg, score=True)
    other = measure_samples(tiny, encoded, token_agg=token_agg, score=True, **ways)
    for name in NAMES:
        np.testing.assert_allclose(other.values[name], base.values[name], rtol=2e-4)
    np.testing.assert_array_equal(other.predicted, base.predicted)
    assert not np.allclose(base.values[NAMES[0]][0], base.values[NAMES[0]][1], rtol=1e-3)


def test_letters_are_those_hugging_face_would_choose(tiny, questions):
    """Next-token logits after the prompt, plainly: one prompt at a time, all tokens unembedded."""
    run = collect(tiny, questions, progress=False)
    token = {k: v["id"] for k, v in run.attrs["answer_tokens"].items()}
    from tl_headnorm.data.templates import arc_mcq_v1

    for row, question in enumerate(questions):
        text = arc_mcq_v1(question)
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = tiny.hf(torch.tensor([[tiny.tokenizer.bos_token_id, *ids]])).logits[0, -1]
        best = max(question.letters, key=lambda letter: logits[token[letter]].item())
        assert run["predicted"].values[row] == best


def samples(n=12):
    rng = np.random.default_rng(0)
    return [Encoded(i, tuple(rng.integers(3, 17, 3 + i).tolist())) for i in range(n)]


def test_out_of_memory_halves_and_neither_loses_nor_repeats(monkeypatch):
    model = load_model(hf_model=llama())
    truth = measure_samples(model, samples())
    from tl_headnorm.measures import measurer

    original, sizes = measurer.Measurer.__call__, []

    def small_memory(self, prompts):
        skip = len(self.prefix) if self.prefix else 0
        sizes.append(len(prompts) * (max(map(len, prompts)) - skip))  # padded tokens
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, prompts)

    monkeypatch.setattr(measurer.Measurer, "__call__", small_memory)
    found = measure_samples(model, samples(), batch_size=12)
    assert max(sizes) > 20
    assert (found.moments[NAMES[0]].n == 12).all()
    np.testing.assert_allclose(found.values[NAMES[1]], truth.values[NAMES[1]], rtol=1e-4)


def test_out_of_memory_on_a_single_prompt_is_one_line(monkeypatch):
    from tl_headnorm.measures import measurer

    def none_left(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(measurer.Measurer, "__call__", none_left)
    with pytest.raises(InputError, match="expected room for one prompt"):
        measure_samples(load_model(hf_model=llama()), samples(3))


def test_other_runtime_errors_are_not_taken_for_memory():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))


def test_batch_tokens_follow_free_memory(monkeypatch):
    model = load_model(hf_model=llama())
    found = []
    for free in (10**9, 2 * 10**9, 0):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        found.append(memory.auto_batch_tokens(model))
    assert found[1] == pytest.approx(2 * found[0], rel=1e-3)
    assert found[2] == 512


@pytest.mark.parametrize("token_agg", ["last", "all"])
def test_the_norms_come_from_run_with_cache_filtered_to_z(monkeypatch, tiny, questions, token_agg):
    """Every pass, the shared prefix's too; nothing else is hooked."""
    original, kept = tiny.tl.run_with_cache, []

    def spy(ids, *, names_filter, **kwargs):
        assert all(not point.fwd_hooks for point in tiny.tl.hook_dict.values())
        kept.append({name for name in tiny.tl.hook_dict if names_filter(name)})
        return original(ids, names_filter=names_filter, **kwargs)

    monkeypatch.setattr(tiny.tl, "run_with_cache", spy)
    collect(tiny, questions, progress=False, token_agg=token_agg)
    assert len(kept) > 1
    assert all(names == {hook_names.z(layer) for layer in range(4)} for names in kept)


def test_a_layer_that_does_not_fire_is_nan_with_count_zero(monkeypatch, tiny, questions):
    original = tiny.engine.run_layers

    def without_layer_two(ids, mask, take, **kwargs):
        def most(layer, read):
            if layer != 2:
                take(layer, read)

        return original(ids, mask, most, **kwargs)

    monkeypatch.setattr(tiny.engine, "run_layers", without_layer_two)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = collect(tiny, questions, progress=False)
    assert any("layers [2]" in str(w.message) for w in caught)
    assert run.attrs["missing_layers"] == [2]
    assert np.isnan(run["head_output_norm_mean"].values[2]).all()
    assert (run["head_output_norm_n"].values[2] == 0).all()
    assert (run["head_output_norm_n"].values[[0, 1, 3]] == 40).all()


def test_values_that_are_not_finite_name_layer_head_and_sample():
    tl = hooked()
    tl.blocks[1].attn.W_O[2] = torch.inf
    with pytest.raises(InputError, match=r"layer 1, head 2 of sample seven"):
        measure_samples(as_model(tl), samples(1), names=["seven"])


def test_rows_on_disk_are_the_rows_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(9, 2, 3)).astype(np.float32)
    rows = RowFile(tmp_path, truth.shape, "<f4")
    order = rng.permutation(9)
    for part in np.array_split(order, 4):
        rows[part] = truth[part]
    np.testing.assert_array_equal(rows.array(), truth)
    with pytest.raises(IndexError):
        rows[np.array([9])] = truth[:1]
    assert not any(tmp_path.iterdir()), "the file has no name"


def test_weights_add_next_to_nothing_to_resident_memory():
    """LLaMA 3.2-1B's configuration: a copy would add the whole model again."""
    import ctypes
    import gc

    from tl_headnorm.commands.bench.side_by_side import resident_bytes
    from tl_headnorm.model.random_models import random_llama

    load_model(hf_model=llama())  # the library's own import is not the weights
    gc.collect()
    before = resident_bytes()
    hf = random_llama(torch.bfloat16)
    size = resident_bytes() - before
    weights = sum(p.numel() * 2 for p in hf.parameters())
    assert size > 0.9 * weights
    model = load_model(hf_model=hf, self_check=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    added = resident_bytes() - before - size
    assert added < 0.05 * weights
    assert model.info.n_layers == 16
    assert model.n_ctx == 131072


def test_a_disagreement_with_hugging_face_is_said(tiny, questions, monkeypatch):
    from tl_headnorm.oracle import hugging_face

    original = hugging_face.batch_norms

    def off_by_a_percent(*args, **kwargs):
        return {name: value * 1.01 for name, value in original(*args, **kwargs).items()}

    monkeypatch.setattr(hugging_face, "batch_norms", off_by_a_percent)
    with pytest.warns(UserWarning, match="Hugging Face disagrees"):
        run = collect(tiny, questions, validate_samples=3, progress=False)
    assert run.attrs["validated_against_hf"] == pytest.approx(0.0099, abs=1e-4)
