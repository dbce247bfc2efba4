"""Writing on: token for token what Hugging Face's greedy `generate` writes."""

import numpy as np
import pytest
import torch
from conftest import make_llama
from handmade import FAMILY_MODELS, family_model

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.generation import eos_ids, generate
from tl_headnorm.model.loading import load_model

TEXTS = ("Once upon a time", "The dog", "One day, Tim and his mom went to the park. They saw")


@pytest.fixture(scope="module")
def stories(shared_data):
    return load_model(shared_data / "stories260K", dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny", dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def random_gqa(tmp_path_factory, bpe):
    path = make_llama(tmp_path_factory.mktemp("gqa") / "m", bpe, seed=3)
    return load_model(path, dtype="fp32", device_map="cpu")


def left_padded(rows, pad=0):
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def encoded(model, texts=TEXTS):
    bos = model.tokenizer.bos_token_id
    return [[bos, *model.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]


def hf_greedy(model, row, n, eos=None):
    """Hugging Face's own, one row at a time."""
    ids = torch.tensor([row])
    out = model.hf.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["stories", "tiny", "random_gqa"])
def test_greedy_is_hugging_faces(name, request):
    model = request.getfixturevalue(name)
    rows = [*encoded(model), [model.tokenizer.bos_token_id]]  # a prompt of one token
    ends = eos_ids(model)
    found = generate(model, *left_padded(rows), max_new_tokens=24).rows()
    assert found == [hf_greedy(model, row, 24, ends) for row in rows]
    assert len({tuple(row) for row in found}) > 1
    alone = [generate(model, *left_padded([row]), max_new_tokens=24).rows()[0] for row in rows]
    assert alone == found


@pytest.mark.parametrize("engine", ["hooked", "bridge"])
@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_every_family_and_engine(family, engine):
    """Learned and rotary positions, norms of queries, grouped heads; rows of 7, 2 and 1 tokens."""
    if engine == "hooked" and not (has_hooked() and FAMILY_MODELS[family].hooked):
        with pytest.raises(InputError):
            load_model(hf_model=family_model(family), engine=engine, self_check=False)
        return
    model = load_model(hf_model=family_model(family), engine=engine, self_check=False)
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14]]
    found = generate(model, *left_padded(rows), max_new_tokens=20, eos=()).rows()
    assert found == [hf_greedy(model, row, 20) for row in rows]


def test_bridge_writes_the_same(stories, shared_data):
    bridge = load_model(
        shared_data / "stories260K", dtype="fp32", device_map="cpu", engine="bridge"
    )
    rows = [*encoded(stories), [1]]
    batch = left_padded(rows)
    seen = []

    def watch(pattern, hook):
        seen.append(tuple(pattern.shape[2:]))

    found = generate(bridge, *batch, max_new_tokens=8, hooks=[(hook_names.pattern(2), watch)])
    assert found.rows() == generate(stories, *batch, max_new_tokens=8).rows()
    width = batch[0].shape[1]
    assert seen == [(width, width), *((1, width + i) for i in range(1, 8))]


def test_without_a_cache_the_same_is_written(stories):
    """A rival that runs everything anew at each step, by Hugging Face's forward."""
    row = encoded(stories)[0]
    for _ in range(12):
        logits = stories.hf(torch.tensor([row])).logits[0, -1]
        row = [*row, int(logits.argmax())]
    found = generate(stories, *left_padded(encoded(stories)[:1]), max_new_tokens=12)
    assert found.rows()[0] == row[-12:]


def test_an_end_token_stops_its_row_alone(stories):
    rows = encoded(stories)
    free = generate(stories, *left_padded(rows), max_new_tokens=20, eos=()).rows()
    end = free[0][5]
    first = [row.index(end) + 1 if end in row else 20 for row in free]
    found = generate(stories, *left_padded(rows), max_new_tokens=20, eos=[end])
    assert found.rows() == [row[:n] for row, n in zip(free, first, strict=True)]
    assert found.rows()[0] == hf_greedy(stories, rows[0], 20, end)
    assert first[0] <= 6
    assert len(set(first)) > 1  # the others went on
    alone = generate(stories, *left_padded(rows[:1]), max_new_tokens=20, eos=[end])
    assert alone.ids.shape[1] == first[0]  # nothing is run after the last row's end


def test_sampling_depends_on_the_rows_seed_only(stories):
    rows = encoded(stories)
    how = {"max_new_tokens": 16, "temperature": 1.0}
    batch = generate(stories, *left_padded(rows), seed=[3, 4, 5], **how).rows()
    assert batch == generate(stories, *left_padded(rows), seed=[3, 4, 5], **how).rows()
    assert batch[1:] == generate(stories, *left_padded(rows[1:]), seed=[4, 5], **how).rows()
    assert batch != generate(stories, *left_padded(rows), seed=[6, 7, 8], **how).rows()
    greedy = generate(stories, *left_padded(rows), max_new_tokens=16).rows()
    one = generate(stories, *left_padded(rows), top_k=1, temperature=0.7, max_new_tokens=16)
    assert one.rows() == greedy
    assert batch != greedy


def test_sampling_follows_the_softmax(stories):
    """First tokens of 3,000 rows against softmax(logits / t) among the five likeliest."""
    row = encoded(stories)[1]
    n, t = 3000, 1.3
    ids, mask = left_padded([row] * n)
    found = generate(
        stories, ids, mask, max_new_tokens=1, temperature=t, top_k=5, seed=list(range(n))
    )
    logits = stories.hf(torch.tensor([row])).logits[0, -1].double() / t
    top = logits.topk(5)
    chances = top.values.softmax(0).numpy()
    counts = np.array([(found.ids[:, 0] == i).sum() for i in top.indices])
    assert counts.sum() == n
    error = np.sqrt(chances * (1 - chances) / n)
    assert (np.abs(counts / n - chances) < 5 * error).all()
    plain = top.values.mul(t).softmax(0).numpy()  # the rival forgets the temperature
    assert (np.abs(counts / n - plain) > 5 * error).any()


def test_hooks_act_at_every_pass_and_steps_may_choose(stories):
    rows = encoded(stories)
    batch = left_padded(rows)
    calls = []

    def watch(pattern, hook):
        calls.append(tuple(pattern.shape))

    def forbid(step):
        assert step.ids.shape[1] == batch[0].shape[1] + step.number
        logits = step.logits.clone()
        logits[:, first] = -torch.inf
        return logits

    free = generate(stories, *batch, max_new_tokens=3).rows()
    first = free[0][0]
    found = generate(
        stories, *batch, max_new_tokens=3, hooks=[(hook_names.pattern(1), watch)], on_step=forbid
    )
    width = batch[0].shape[1]
    assert calls == [(3, 8, width, width), (3, 8, 1, width + 1), (3, 8, 1, width + 2)]
    assert all(first not in row for row in found.rows())

    def drop(z, hook):
        return torch.zeros_like(z)

    dropped = generate(stories, *batch, max_new_tokens=3, hooks=[(hook_names.z(1), drop)]).rows()
    assert dropped != free
    assert generate(stories, *batch, max_new_tokens=3).rows() == free  # hooks are gone


def test_refused(stories):
    ids, mask = left_padded(encoded(stories))
    with pytest.raises(InputError, match="pad on the left"):
        generate(stories, ids, mask.flip(1), max_new_tokens=2)
    long = ids[:1, -1:].repeat(1, 511)
    assert generate(stories, long, long * 0 + 1, max_new_tokens=2, eos=()).ids.shape == (1, 2)
    with pytest.raises(InputError, match="within the context of 512 tokens, found 511 \\+ 3"):
        generate(stories, long, long * 0 + 1, max_new_tokens=3)
    with pytest.raises(InputError, match="1 or more new tokens"):
        generate(stories, ids, mask, max_new_tokens=0)
    with pytest.raises(InputError, match="seed: expected one, or 3"):
        generate(stories, ids, mask, max_new_tokens=1, temperature=1.0, seed=[1, 2])
