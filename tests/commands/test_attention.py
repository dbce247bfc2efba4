"""Patterns, scores and keywords: Hugging Face's own attention, closed forms, known heads."""

import math
import weakref

import numpy as np
import pytest
import torch
from handmade import as_model, hooked
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.builtin import model_dir
from tl_headnorm.commands.attention import scores
from tl_headnorm.commands.attention.keywords import (
    find_keyword,
    focus_table,
    nearest_words,
    query_positions,
    ranked,
    uniform_weight,
)
from tl_headnorm.commands.attention.patterns import Wanted, look, patterns_of, thumbnails
from tl_headnorm.commands.attention.viewers import to_bertview, to_circuitsvis
from tl_headnorm.data.spans import encode_text, find_spans
from tl_headnorm.engine import short_blocks
from tl_headnorm.errors import InputError
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.patterns import read_patterns
from tl_headnorm.model.loading import load_model

STORY = "Once upon a time there was a little dog. The dog liked the park. He saw a 🙂 cat and"


@pytest.fixture(scope="module")
def sources(shared_data):
    return {"stories": str(shared_data / "stories260K"), "tiny": str(model_dir())}


@pytest.fixture(scope="module")
def stories(sources):
    return load_model(sources["stories"], dtype="fp32", device_map="cpu")


def eager(source, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    return model.eval()


def padded(tokenizer, side):
    texts = (STORY, "The", "One day, Tim went to the park.")
    rows = [encode_text(tokenizer, text).ids for text in texts]
    width = max(map(len, rows))
    ids, mask = torch.full((3, width), 7), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), None)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def every_pattern(model, ids, mask):
    found = {}
    read_patterns(model.engine, ids, mask, range(model.info.n_layers), found.__setitem__)
    return torch.stack([found[layer] for layer in range(model.info.n_layers)], 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("engine", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["stories", "tiny"])
def test_patterns_are_hugging_faces(sources, name, engine, side):
    model = load_model(sources[name], dtype="fp32", device_map="cpu", engine=engine)
    ids, mask = padded(model.tokenizer, side)
    ours = every_pattern(model, ids, mask)
    oracle = eager(sources[name])
    for row in range(len(ids)):  # each by itself, so that the oracle knows no padding
        at = mask[row].nonzero().flatten()
        theirs = oracle(ids[row, at][None], output_attentions=True).attentions
        theirs = torch.stack([layer[0] for layer in theirs])
        assert (ours[row][:, :, at][..., at] - theirs).abs().max() < 1e-5
    real = mask.bool()
    assert (ours.sum(-1).movedim(-1, 1)[real] - 1).abs().max() < 1e-5
    assert (ours.movedim(3, 1)[~real] == 0).all()  # rows of padding
    assert (ours.movedim(4, 1)[~real] == 0).all()  # nobody looks at padding
    assert (ours.triu(1) == 0).all()


def test_patterns_in_bfloat16(sources):
    """Weights of 8 bits: the worst difference between two bf16 computations is a few steps."""
    model = load_model(sources["stories"], dtype="bf16", device_map="cpu")
    ids = torch.tensor([encode_text(model.tokenizer, STORY).ids])
    ours = every_pattern(model, ids, torch.ones_like(ids))[0].float()
    theirs = eager(sources["stories"], torch.bfloat16)(ids, output_attentions=True).attentions
    theirs = torch.stack([layer[0] for layer in theirs]).float()
    assert (ours - theirs).abs().max() < 4e-2
    assert (ours - theirs).abs().mean() < 1e-3


def test_the_short_block_gives_way_and_the_pass_ends_early(stories):
    assert short_blocks.installed(stories.tl)
    ids = torch.tensor([encode_text(stories.tokenizer, STORY).ids])
    ones, seen, ran = torch.ones_like(ids), {}, []
    for layer, block in enumerate(stories.tl.blocks):
        block.hook_resid_post.add_hook(lambda x, hook, layer=layer: ran.append(layer))
    try:
        read_patterns(stories.engine, ids, ones, [1, 2], seen.__setitem__)
    finally:
        stories.tl.reset_hooks()
    assert sorted(seen) == [1, 2]
    assert ran == [0, 1, 2]  # of five layers
    full = every_pattern(stories, ids, ones)
    for layer in (1, 2):
        torch.testing.assert_close(seen[layer], full[:, layer])
    read_patterns(stories.engine, ids, ones, [], seen.__setitem__)
    assert sorted(seen) == [1, 2]


@pytest.mark.parametrize("engine", ["hooked", "bridge"])
def test_one_layers_pattern_at_a_time(sources, engine):
    """What is handed over is dropped again; a rival that caches every layer keeps them all."""
    model = load_model(sources["stories"], dtype="fp32", device_map="cpu", engine=engine)
    ids = torch.tensor([encode_text(model.tokenizer, STORY).ids])
    refs, alive, kept = [], [], []

    def take(layer, pattern):
        refs.append(weakref.ref(pattern))
        alive.append(sum(ref() is not None for ref in refs))

    def cached(layer, pattern):
        kept.append(pattern)
        take(layer, pattern)

    read_patterns(model.engine, ids, torch.ones_like(ids), range(5), take)
    assert alive == [1] * 5
    refs.clear(), alive.clear()
    read_patterns(model.engine, ids, torch.ones_like(ids), range(5), cached)
    assert alive == [1, 2, 3, 4, 5]


# Heads whose pattern is known, on tokens and positions as one-hot vectors.
TOKENS, PLACES = 30, 42


class Vocabulary:
    """As much of a tokenizer as random tokens need."""

    bos_token_id, all_special_ids = 0, [0]

    def __len__(self):
        return TOKENS


@pytest.fixture(scope="module")
def known():
    """Layer 0: previous token, first token, uniform. Layer 1: induction, same token, uniform."""
    wide = TOKENS + PLACES
    tl = hooked(
        n_layers=2, n_heads=3, d_head=wide, d_model=wide + TOKENS, d_vocab=TOKENS, n_ctx=PLACES,
        positional_embedding_type="standard", rotary_dim=None,
    )  # fmt: skip
    for parameter in tl.parameters():
        parameter.zero_()
    tok, pos = range(TOKENS), range(PLACES)
    eye = torch.eye(wide + TOKENS, dtype=torch.float64)
    tl.embed.W_E.copy_(eye[:TOKENS])
    tl.pos_embed.W_pos.copy_(eye[TOKENS:wide])
    first, second = tl.blocks[0].attn, tl.blocks[1].attn
    big = 100 * math.sqrt(wide)  # scores are divided by the root of d_head
    for p in pos:
        first.W_Q[0, TOKENS + p, p] = big
        if p + 1 < PLACES:
            first.W_K[0, TOKENS + p, p + 1] = 1
    first.b_Q[1, 0], first.W_K[1, TOKENS, 0] = big, 1
    for t in tok:
        first.W_V[0, t, t], first.W_O[0, t, wide + t] = 1, 1  # the token before, after the rest
        second.W_Q[0, t, t], second.W_K[0, wide + t, t] = big, 1
        second.W_Q[1, t, t], second.W_K[1, t, t] = big, 1
    for p in pos:  # the same token, but not the query itself
        second.W_Q[1, TOKENS + p, TOKENS + p] = big
        second.W_K[1, TOKENS + p, TOKENS + p] = -1
    return as_model(tl, Vocabulary())


def test_known_heads_score_as_they_must(known):
    grids, uniform = scores.measure_repeated(known, [0, 1], length=20, seed=5)
    assert grids["induction"][1, 0] > 0.999
    assert grids["duplicate_token"][1, 1] > 0.999
    for name, home in (("induction", (1, 0)), ("duplicate_token", (1, 1))):
        grid = grids[name].clone()
        torch.testing.assert_close(grid[0, 2].item(), uniform[name])
        grid[home] = 0
        assert grid.max() < 0.06
    expected = np.mean([1 / (q + 1) for q in range(21, 41)])
    np.testing.assert_allclose(uniform["induction"], expected, rtol=1e-12)
    ids, start = scores.repeated_tokens(known, 20, 4, 5, True)
    assert start == 1
    pattern = every_pattern(known, ids, torch.ones_like(ids))
    assert scores.prompt_scores(pattern[0, 0], 4)["previous_token"][0] > 0.999
    assert scores.prompt_scores(pattern[0, 0], 4)["first_token"][1] > 0.999
    # TransformerLens' stripe, without its entry of the first copy; a stripe beside it fails.
    stripe = pattern[:, 1, 0, 1:, 1:].diagonal(1 - 20, 1, 2)[:, 1:]
    torch.testing.assert_close(stripe.mean(), grids["induction"][1, 0])
    assert pattern[:, 1, 0, 1:, 1:].diagonal(-20, 1, 2).mean() < 0.06


def test_random_tokens_repeat_and_are_ordinary(known):
    ids, start = scores.repeated_tokens(known, 20, 3, 5, True)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1:21] == ids[:, 21:]).all()
    assert (ids[:, 1:] != 0).all()
    assert all(len(set(row[1:21].tolist())) == 20 for row in ids)
    assert not (ids[0] == ids[1]).all()
    again, _ = scores.repeated_tokens(known, 20, 3, 5, True)
    assert (again == ids).all()
    without, start = scores.repeated_tokens(known, 20, 3, 5, False)
    assert start == 0
    assert without.shape == (3, 40)


@pytest.mark.parametrize("n", [2, 3, 9, 1024])
def test_uniform_baselines_in_closed_form(n):
    found = scores.prompt_scores(scores.uniform_pattern(n), 8)
    harmonic = sum(1 / k for k in range(1, n + 1))
    exact = (harmonic - 1) / (n - 1)
    np.testing.assert_allclose(float(found["first_token"][0]), exact, rtol=1e-12)
    np.testing.assert_allclose(float(found["previous_token"][0]), exact, rtol=1e-12)
    entropy = sum(math.log(q + 1) for q in range(1, n)) / (n - 1)
    np.testing.assert_allclose(float(found["entropy"][0]), entropy, rtol=1e-12)
    near = [8 / (q + 1) for q in range(8, n)]
    np.testing.assert_allclose(float(found["local"][0]), np.mean(near) if near else np.nan)
    # The rival lets the first query count, which sees nothing else: H_T / T, 0.0073 at 1024.
    rival = float(scores.uniform_pattern(n)[0, :, 0].mean())
    np.testing.assert_allclose(rival, harmonic / n)
    assert rival > exact * 1.1


def test_a_head_that_never_looks_at_the_first_token_is_no_sink():
    pattern = torch.eye(6, dtype=torch.float64)[None]
    assert scores.prompt_scores(pattern, 2)["first_token"][0] == 0
    assert pattern[0, :, 0].mean() > 0  # the rival's score, from the first query alone


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99))
def test_laws_of_scores(n, seed):
    draw = torch.Generator().manual_seed(seed)
    pattern = torch.rand(2, n, n, dtype=torch.float64, generator=draw).tril()
    pattern = pattern / pattern.sum(2, keepdim=True)
    profile = scores.distance_profile(pattern)
    assert profile.shape == (2, n)
    counts = torch.arange(n, 0, -1, dtype=torch.float64)
    torch.testing.assert_close((profile * counts).sum(1), torch.full((2,), float(n)).double())
    found = scores.prompt_scores(pattern, 3)
    if n > 1:
        torch.testing.assert_close(found["previous_token"], profile[:, 1])
        ceiling = scores.prompt_scores(scores.uniform_pattern(n), 3)["entropy"]
        assert (found["entropy"] <= ceiling + 1e-12).all()
    if n > 3:
        by_hand = [pattern[:, q, q - 2 : q + 1].sum(1) for q in range(3, n)]
        torch.testing.assert_close(found["local"], torch.stack(by_hand).mean(0))
    assert all((v.isnan() | (v >= 0)).all() for v in found.values())
    assert n > 1 or all(v.isnan().all() for v in found.values())


def test_thumbnails_keep_the_largest_weight():
    pattern = torch.rand(2, 23, 23).tril()
    small = thumbnails(pattern, 8)  # blocks of 3, the last one of 2
    assert small.shape == (2, 8, 8)
    block = pattern[1, 9:12, 3:6].max()
    assert small[1, 3, 1] == round(float(block.sqrt() * 255))
    assert small[0, 7, 0] == round(float(pattern[0, 21:, :3].max().sqrt() * 255))
    assert (small[:, 0, 1:] == 0).all()
    assert thumbnails(pattern, 40).shape == (2, 23, 23)


def oracle_of(sources, tokens):
    found = eager(sources["stories"])(torch.tensor([tokens.ids]), output_attentions=True)
    return torch.stack([layer[0] for layer in found.attentions]).detach().double().numpy()


def test_a_look_against_hugging_face(stories, sources):
    tokens = encode_text(stories.tokenizer, STORY)
    words = [find_keyword(stories, tokens, text) for text in ("dog", "🙂")]
    queries = query_positions(tokens, "liked")
    found = look(stories, tokens, Wanted((0, 2, 4)), words, queries)
    oracle = oracle_of(sources, tokens)[[0, 2, 4]]
    assert found.left_out == 0
    assert list(found.run["layer"].values) == [0, 2, 4]
    for (layer, head), pattern in found.kept.items():
        assert pattern.dtype == np.float16
        np.testing.assert_allclose(pattern, oracle[layer // 2, head], atol=1e-3)
    np.testing.assert_allclose(found.means["layer 2"], oracle[1].mean(0), atol=1e-3)
    np.testing.assert_allclose(found.means["head 5"], oracle[:, 5].mean(0), atol=1e-3)
    np.testing.assert_allclose(found.means["all heads"], oracle.mean((0, 1)), atol=1e-3)
    np.testing.assert_allclose(found.run["first_token"], oracle[:, :, 1:, 0].mean(2), atol=1e-5)
    at = [i for span in find_spans(tokens, "dog") for i in span.positions]
    for j, q in enumerate(queries):
        got = found.run["focus"].sel(keyword="dog", query=q)
        np.testing.assert_allclose(got, oracle[:, :, q][..., at].sum(2), atol=1e-5)
        seen = sum(i <= q for i in at) / (q + 1)
        assert float(found.run["focus"].coords["uniform"][0, j]) == pytest.approx(seen)
    assert (found.run["focus"].sel(keyword="🙂") == 0).all()  # it comes later
    # The rival knows tokens by their ids alone: its dog is the one at a text's beginning.
    ids = stories.tokenizer("dog", add_special_tokens=False)["input_ids"]
    single = [i for i, token in enumerate(tokens.ids) if token == ids[0]]
    assert set(single) != set(at)


def test_contribution_beside_the_sink_score(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    found = look(stories, tokens, Wanted(tuple(range(5))))
    ids = torch.tensor([tokens.ids])
    sinks = edits.read_sinks(stories.engine, ids, torch.ones_like(ids))
    np.testing.assert_allclose(found.run["contribution"], sinks.contribution[0], rtol=1e-4)
    np.testing.assert_allclose(found.run["first_token"], sinks.weight[0], rtol=1e-4)
    assert found.run.attrs["uniform"]["first_token"] == pytest.approx(float(sinks.uniform[0]))


def test_memory_is_bounded_by_what_is_asked(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    one = len(tokens) ** 2 * 2 / 2**20
    layers = tuple(range(5))
    whole = look(stories, tokens, Wanted(layers))
    word = [find_keyword(stories, tokens, "dog")]
    few = look(stories, tokens, Wanted(layers, keep_mb=7.5 * one), word, [len(tokens) - 1])
    assert len(few.kept) == 7
    assert few.left_out == 33
    assert list(few.means) == ["all heads"]
    best = ranked(few.run["focus"], "dog")[:7]
    assert sorted(few.kept) == sorted((layer, head) for layer, head, _ in best)
    for pair, pattern in few.kept.items():
        np.testing.assert_allclose(pattern, whole.kept[pair], atol=1e-3, rtol=2e-3)
    np.testing.assert_allclose(few.means["all heads"], whole.means["all heads"], atol=1e-3)
    np.testing.assert_array_equal(few.thumbnails, whole.thumbnails)
    without = look(stories, tokens, Wanted(layers, keep_mb=2.5 * one))
    most = [whole.run[name].to_series().idxmax() for name in ("first_token", "previous_token")]
    assert sorted(without.kept) == sorted(most)
    induction = {"induction": torch.zeros(5, 8)}
    induction["induction"][3, 6] = 1
    named = look(stories, tokens, Wanted(layers, keep_mb=5.5 * one), scores=induction)
    assert (3, 6) in named.kept
    assert not look(stories, tokens, Wanted(layers, keep_mb=0.0)).kept
    chosen = look(stories, tokens, Wanted(layers, heads=((1, 2), (3, 0)), keep_mb=2 * one))
    assert list(chosen.kept) == [(1, 2), (3, 0)]
    with pytest.raises(InputError, match=r"heads: expected at most 1 patterns of \d+ tokens"):
        look(stories, tokens, Wanted(layers, heads=((1, 2), (3, 0)), keep_mb=1.5 * one))


def test_too_long_for_the_model(stories):
    tokens = encode_text(stories.tokenizer, "x " * 600)
    with pytest.raises(InputError, match="at most 512 tokens, the model's context"):
        look(stories, tokens, Wanted((0,)))


def test_focus_table(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    words = [find_keyword(stories, tokens, text) for text in ("dog", "park")]
    queries = query_positions(tokens, None)
    assert queries == (len(tokens) - 1,)
    found = look(stories, tokens, Wanted((1, 3)), words, queries)
    table = focus_table(found.run["focus"])
    assert list(table) == ["layer", "head", "keyword", "query_pos", "weight", "uniform_weight"]
    assert len(table) == 2 * 8 * 2
    row = table[(table.layer == 3) & (table["head"] == 6) & (table.keyword == "park")].iloc[0]
    expected = float(found.run["focus"].sel(layer=3, head=6, keyword="park")[0])
    assert row["weight"] == expected
    assert row["uniform_weight"] == uniform_weight(words[1].positions, queries[0])
    layer, head, weight = ranked(found.run["focus"], "park")[0]
    best = table[table.keyword == "park"].sort_values("weight").iloc[-1]
    assert (best["layer"], best["head"], best["weight"]) == (layer, head, weight)


def test_semantic_match_shows_what_and_how_close(bpe):
    tl = hooked(d_vocab=len(bpe))
    model = as_model(tl, bpe)
    tokens = encode_text(bpe, "the sea is cold. Deserts are hot, the sea is wide.")
    tl.embed.W_E.zero_()
    generator = torch.Generator().manual_seed(0)
    tl.embed.W_E.copy_(torch.randn(tl.embed.W_E.shape, generator=generator, dtype=torch.float64))

    def ids(word):
        before, after = bpe(["a", f"a {word}"], add_special_tokens=False)["input_ids"]
        return after[len(before) :]

    sea = tl.embed.W_E[ids("sea")].mean(0)
    ocean = ids("ocean")
    tl.embed.W_E[ocean] += sea - tl.embed.W_E[ocean].mean(0)  # now its mean is that of "sea"
    sea = tl.embed.W_E[ids("sea")].mean(0)
    word = find_keyword(model, tokens, "ocean", "semantic")
    mean = tl.embed.W_E[ocean].mean(0)
    assert word.matched == "sea"
    assert len(word.spans) == 2
    assert word.similarity == pytest.approx(float(torch.cosine_similarity(mean, sea, dim=0)))
    assert word.similarity > 0.8
    assert len(word.rivals) == 2
    assert word.similarity >= word.rivals[0][1] >= word.rivals[1][1]
    assert dict(nearest_words(model, tokens, "ocean")).keys() == {
        *("the", "sea", "is", "cold", "Deserts", "are", "hot", "wide")
    }
    exact = find_keyword(model, tokens, "hot", "semantic")  # what is there is taken as it is
    assert exact.similarity is None
    assert exact.matched == "hot"
    with pytest.raises(InputError, match="expected a text that stands in the prompt, found 'oce"):
        find_keyword(model, tokens, "ocean")
    chinese = encode_text(bpe, "气候变化很快")
    assert find_keyword(model, chinese, "天", "semantic").matched in "气候变化很快"


def test_query_by_text(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    spans = find_spans(tokens, "the park")
    assert query_positions(tokens, "the park") == spans[0].positions
    with pytest.raises(InputError, match="query: expected a text that stands in the prompt"):
        query_positions(tokens, "a park")


def test_what_other_viewers_take(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    found = look(stories, tokens, Wanted((1, 3)))
    n = len(tokens)
    given = to_circuitsvis(found, 3)
    assert given["attention"].shape == (8, n, n)
    assert given["attention"].dtype == np.float32
    assert given["tokens"][:3] == ["<s>", " Once", " upon"]
    assert given["attention_head_names"][5] == "3.5"
    np.testing.assert_array_equal(given["attention"][5], found.kept[3, 5])
    some = to_circuitsvis(found, 1, heads=[6, 2])
    assert some["attention_head_names"] == ["1.6", "1.2"]
    np.testing.assert_array_equal(some["attention"][0], found.kept[1, 6])
    view = to_bertview(found)
    assert [tuple(a.shape) for a in view["attention"]] == [(1, 8, n, n)] * 2
    assert torch.equal(view["attention"][1][0, 4], torch.from_numpy(found.kept[3, 4]).float())
    assert len(to_bertview(found, [3])["attention"]) == 1
    few = look(stories, tokens, Wanted((1, 3), heads=((1, 0),)))
    assert to_circuitsvis(few, 1)["attention"].shape == (1, n, n)
    for call in (lambda: to_bertview(few), lambda: to_circuitsvis(few, 3)):
        with pytest.raises(InputError, match=r"whole pattern was kept \(1 are\)"):
            call()


def test_patterns_of_some_heads(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    found = patterns_of(stories, tokens, [(4, 1), (0, 7)])
    whole = look(stories, tokens, Wanted(tuple(range(5)))).kept
    assert set(found) == {(4, 1), (0, 7)}
    for pair, pattern in found.items():
        np.testing.assert_allclose(pattern, whole[pair], atol=1e-6, rtol=2e-3)  # a float16 step
