"""The real model: SmolLM2-135M-Instruct of the fetched GGUF file."""

import numpy as np
import pytest
import torch

from tl_headnorm import load_model, load_questions
from tl_headnorm.commands.collect.collect import collect, measure_samples
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.tokens import Encoded, token_ids
from tl_headnorm.oracle import hugging_face
from tl_headnorm.settings import Settings

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "The three primary colours are",
    "Water boils at 100 degrees Celsius, which is",
    "To make a cup of tea, first",
)


@pytest.fixture(scope="module")
def real(smollm2):
    return load_model(smollm2, dtype="fp32", device_map="cpu")


def continued(hf_model, tokenizer, prompt, n=12):
    """The greedy continuation's ids, after one BOS."""
    ids = torch.tensor([[tokenizer.bos_token_id, *token_ids(tokenizer, [prompt])[0]]])
    out = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_the_conversion_is_hugging_faces_own(real, smollm2):
    """Weights bit for bit, and greedy continuations of five prompts."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    ours = real.hf.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
    for prompt in PROMPTS:
        expected = continued(theirs, real.tokenizer, prompt)
        assert continued(real.hf, real.tokenizer, prompt) == expected
    assert real.tokenizer.decode(continued(real.hf, real.tokenizer, PROMPTS[0], 1)) == " Paris"


def test_it_is_the_model_it_says(real):
    i = real.info
    assert (i.n_layers, i.n_heads, i.n_key_value_heads, i.d_head, i.d_model) == (30, 9, 3, 64, 576)
    assert i.gguf["quantization"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert real.hf.lm_head.weight is real.hf.model.embed_tokens.weight
    assert real.hf.config.rope_parameters["rope_theta"] == 1e5


def test_its_tokenizer(real):
    """No BOS by itself, exactly one in prompts; digits alone, and spaces before them together."""
    tokenizer = real.tokenizer
    assert tokenizer("The")["input_ids"] == token_ids(tokenizer, ["The"])[0]
    assert tokenizer.convert_ids_to_tokens(token_ids(tokenizer, ["a  2\n\n10"])[0]) == [
        "a", "ĠĠ", "2", "ĊĊ", "1", "0",
    ]  # fmt: skip
    assert "<|im_start|>" in tokenizer.chat_template
    questions = load_questions("builtin:questions", max_samples=3)
    for sample in prepare(tokenizer, real.n_ctx, questions, Settings()).encoded:
        assert sample.ids[0] == tokenizer.bos_token_id == 1
        assert 1 not in sample.ids[1:]


@pytest.mark.parametrize("engine", ["auto", "bridge"])
def test_its_norms_are_hugging_faces(engine, real):
    """Questions and running text, at the last token and over all."""
    model = load_model(hf_model=real.hf, tokenizer=real.tokenizer, engine=engine)
    rng = np.random.default_rng(0)
    shared = tuple(token_ids(real.tokenizer, [PROMPTS[1]])[0])
    samples = [
        Encoded(i, (1, *shared, *rng.integers(3, 49152, 3 + 4 * i).tolist())) for i in range(6)
    ]
    for token_agg in ("last", "all"):
        ours = measure_samples(model, samples, token_agg=token_agg).values
        theirs = hugging_face.measure_samples(real.hf, samples, token_agg=token_agg)
        for name in hugging_face.NAMES:
            found = hugging_face.compare(ours[name].astype(np.float64), theirs[name])
            assert found["worst_relative"] < 1e-4


def test_arc_questions(real, shared_data):
    questions = load_questions("arc_challenge", shared_data / "arc_challenge", max_samples=8)
    run = collect(real, questions, Settings(dtype="fp32", validate_samples=8))
    assert run.attrs["validated_against_hf"] < 1e-4
