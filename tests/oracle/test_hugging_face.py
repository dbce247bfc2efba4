"""The main path against Hugging Face's own forward, on real data and on a LLaMA 3.2-1B shape."""

import numpy as np
import pytest
import torch
from handmade import llama

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.model.loading import load_model
from tl_headnorm.oracle import hugging_face

NAMES = ("head_output_norm", "head_resid_contrib_norm")


def random_samples(n, shortest, longest, vocabulary, prefix=0, seed=0):
    rng = np.random.default_rng(seed)
    head = tuple(rng.integers(3, vocabulary, prefix).tolist())
    return [
        Encoded(
            i, head + tuple(rng.integers(3, vocabulary, rng.integers(shortest, longest)).tolist())
        )
        for i in range(n)
    ]


def worst(model, samples, **settings):
    ours = measure_samples(model, samples, **settings).values
    theirs = hugging_face.measure_samples(model.hf, samples, **settings)
    return max(
        hugging_face.compare(ours[name].astype(np.float64), theirs[name])["worst_relative"]
        for name in NAMES
    )


@pytest.mark.parametrize("token_agg", ["last", "all"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("prefix", [0, 20])
def test_random_llama(token_agg, padding_side, batch_size, prefix):
    model = load_model(hf_model=llama(tie_word_embeddings=True))
    samples = random_samples(20, 2, 40, 97, prefix)
    settings = {"token_agg": token_agg, "padding_side": padding_side, "batch_size": batch_size}
    assert worst(model, samples, **settings) < 1e-4


def test_excluding_the_first_token():
    model = load_model(hf_model=llama())
    samples = random_samples(7, 2, 30, 97, prefix=9)
    kept = worst(model, samples, batch_size=3, token_agg="all", exclude_first_token=True)
    assert kept < 1e-4
    with_first = measure_samples(model, samples, token_agg="all").values[NAMES[0]]
    without = measure_samples(model, samples, token_agg="all", exclude_first_token=True)
    assert (np.abs(with_first - without.values[NAMES[0]]) > 1e-6).any()


def test_the_oracle_catches_slicing_the_output_of_W_O():
    """A published mistake: the attention output cut into slices, slice h called head h."""
    model = load_model(hf_model=llama(head_dim=None, hidden_size=48))
    samples = random_samples(5, 4, 20, 97)
    theirs = hugging_face.measure_samples(model.hf, samples)[NAMES[1]]
    rival = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        names = [hook_names.attn_out(layer) for layer in range(3)]
        outputs = model.engine.run_z(ids, torch.ones_like(ids), extra=names).extra
        rows = [outputs[name][0, -1].reshape(6, 8).norm(dim=-1).numpy() for name in names]
        rival.append(rows)
    assert hugging_face.compare(np.array(rival, np.float64), theirs)["worst_relative"] > 0.1


@pytest.mark.parametrize(("dtype", "per_sample", "of_means"), [
    (torch.float32, 1e-4, 1e-4),
    (torch.bfloat16, 2e-2, 2e-3),
])  # fmt: skip
@pytest.mark.parametrize("token_agg", ["last", "all"])
def test_llama_3_2_1b_shape(dtype, per_sample, of_means, token_agg):
    """Its exact widths and RoPE scaling; fewer layers and a shorter vocabulary for time's sake."""
    from tl_headnorm.model.random_models import random_llama

    model = load_model(hf_model=random_llama(dtype, n_layers=2, vocab_size=2048))
    samples = random_samples(24, 5, 60, 2048, prefix=30)
    ours = measure_samples(model, samples, token_agg=token_agg).values
    theirs = hugging_face.measure_samples(model.hf, samples, token_agg=token_agg)
    for name in NAMES:
        found = hugging_face.compare(ours[name].astype(np.float64), theirs[name])
        assert found["worst_relative"] < per_sample, found
        means = hugging_face.compare(ours[name].mean(0, dtype=np.float64), theirs[name].mean(0))
        assert means["worst_relative"] < of_means, means
