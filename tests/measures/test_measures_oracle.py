"""Every measure against its definition, sample by sample, through Hugging Face's eager forward.

The oracle pads nothing, shares no prefix, uses no batch, and forms each head's d_model vector.
"""

import math

import numpy as np
import pytest
import torch
from handmade import family_model, llama

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.measures import MEASURES, choose_measures
from tl_headnorm.model.loading import load_model
from tl_headnorm.oracle import hugging_face

EVERY = tuple(MEASURES.values())


def samples_of(vocabulary, prefix=0, n=10, seed=0):
    """Unequal lengths, four and five options, and a prompt of one token where nothing is shared."""
    rng = np.random.default_rng(seed)
    head = tuple(rng.integers(3, vocabulary, prefix).tolist())
    # The last entries are whole letters; the rare bytes before them are all but alike.
    letters = tuple(range(vocabulary - 8, vocabulary - 3))
    lengths = [1 if i == 3 else int(rng.integers(2, 30)) for i in range(n)]
    return [
        Encoded(i, head + tuple(rng.integers(3, vocabulary, k).tolist()),
                letter_ids=letters[: 4 + i % 2])
        for i, k in enumerate(lengths)
    ]  # fmt: skip


def answers_of(samples):
    return [(3 * s.index) % len(s.letter_ids) for s in samples]


class Oracle:
    """One sample through Hugging Face: what each layer had, as plain tensors."""

    def __init__(self, model, ids):
        n_layers, seen = len(model.model.layers), {}

        def keep(name):
            return lambda module, args, out=None: seen.__setitem__(name, (args, out))

        handles = [model.model.norm.register_forward_pre_hook(keep("final"))]
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            handles += [
                layer.register_forward_pre_hook(
                    lambda m, args, kwargs, i=i: seen.__setitem__(
                        f"resid{i}", args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                ),
                attention.o_proj.register_forward_pre_hook(keep(f"z{i}")),
                attention.o_proj.register_forward_hook(keep(f"out{i}")),
                attention.v_proj.register_forward_hook(keep(f"v{i}")),
            ]
        found = model(input_ids=torch.tensor([ids]), output_attentions=True)
        for handle in handles:
            handle.remove()
        config = model.config
        self.H, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.layers = []
        for i in range(n_layers):
            z = seen[f"z{i}"][0][0][0].double()
            d = z.shape[1] // self.H
            self.layers.append(
                {
                    "z": [z[:, h * d : (h + 1) * d] for h in range(self.H)],
                    "W": [w.double() for w in model.model.layers[i].self_attn.o_proj.weight
                          .split(d, dim=1)],
                    "a": found.attentions[i][0].double(),
                    "v": [w.double() for w in seen[f"v{i}"][1][0].split(d, dim=1)],
                    "out": seen[f"out{i}"][1][0].double(),
                    "resid": seen[f"resid{i}"][0].double(),
                }
            )  # fmt: skip
        self.final = seen["final"][0][0][0, -1].double()
        self.norm = model.model.norm
        self.head = model.lm_head.weight.double()

    def direction(self, letters, answer):
        others = [self.head[t] for i, t in enumerate(letters) if i != answer]
        against = self.head[letters[answer]] - sum(others) / len(others)
        scale = (self.final.pow(2).mean() + self.norm.variance_epsilon).sqrt()
        return against * self.norm.weight.double() / scale


@torch.no_grad()
def by_definition(model, sample, answer, token_agg="last", exclude_first=False):
    """{measure: [layer, head]} of one sample, each number written out from its definition."""
    oracle = Oracle(model, sample.ids)
    T, H = len(sample.ids), oracle.H
    group = H // oracle.kv
    found = {name: np.full((len(oracle.layers), H), np.nan) for name in MEASURES}
    direction = oracle.direction(sample.letter_ids, answer)
    for layer, part in enumerate(oracle.layers):
        for h in range(H):
            z, W, a, v = part["z"][h], part["W"][h], part["a"][h], part["v"][h // group]
            vectors = [W @ z[t] for t in range(T)]
            output = [z[t].norm() for t in range(T)]
            contribution = [x.norm() for x in vectors]
            relative = [contribution[t] / part["resid"][t].norm() for t in range(T)]
            cosine = [
                torch.dot(vectors[t], part["out"][t]) / contribution[t] / part["out"][t].norm()
                for t in range(T)
            ]
            entropy = [
                -sum(p * math.log(p) for p in a[q, : q + 1].tolist() if p > 0) for q in range(T)
            ]
            sizes = [float((W @ v[j]).norm()) for j in range(T)]
            moved = [sum(float(a[q, j]) * sizes[j] for j in range(q + 1)) for q in range(T)]
            pairs = {"output_norm": output, "contrib_norm": contribution}
            for name, values in pairs.items():
                found[f"{name}_last"][layer, h] = values[-1]
                found[f"{name}_all"][layer, h] = sum(values) / T
                found[f"{name}_last_to_all"][layer, h] = values[-1] / (sum(values) / T)
            for name, values in (
                ("head_output_norm", output),
                ("head_resid_contrib_norm", contribution),
            ):
                counted = values[1:] if exclude_first else values
                agg = values[-1] if token_agg == "last" else sum(counted) / max(len(counted), 1)
                found[name][layer, h] = agg
            if T > 1:
                found["attention_first"][layer, h] = sum(float(a[q, 0]) for q in range(1, T)) / (
                    T - 1
                )
            found["attention_entropy"][layer, h] = sum(entropy) / T
            found["value_norm_first"][layer, h] = v[0].norm()
            found["value_norm_all"][layer, h] = sum(v[t].norm() for t in range(T)) / T
            found["value_contribution"][layer, h] = sum(moved) / T
            found["contrib_to_resid_last"][layer, h] = relative[-1]
            found["contrib_to_resid_all"][layer, h] = sum(relative) / T
            found["cosine_last"][layer, h] = cosine[-1]
            found["cosine_all"][layer, h] = sum(cosine) / T
            found["direct_logit"][layer, h] = torch.dot(vectors[-1], direction)
    return found


def stacked(model, samples, **how):
    model.set_attn_implementation("eager")
    rows = [by_definition(model, s, a, **how)
            for s, a in zip(samples, answers_of(samples), strict=True)]  # fmt: skip
    return {name: np.stack([row[name] for row in rows]) for name in MEASURES}


def worst(found, truth, floor=0.0):
    """Largest relative difference; entropies and cosines near 0 are held against `floor`."""
    same = np.isnan(found) == np.isnan(truth)
    assert same.all(), "NaN where the other is not"
    scale = np.maximum(np.abs(truth), floor)
    return float(np.nanmax(np.abs(found - truth) / scale))


# What has both signs may come out near 0 as a sum of larger parts, and a query with one key has
# entropy exactly 0: they are held against a share of the measure's largest value.
FLOOR = {"cosine_last": 0.01, "cosine_all": 0.01, "direct_logit": 0.05, "attention_entropy": 0.01}


def disagreements(found, truth):
    """Measure -> worst relative difference."""
    return {
        name: worst(
            found[name].astype(np.float64), truth[name],
            FLOOR.get(name, 0) * np.nanmax(np.abs(truth[name])) + 1e-30,
        )
        for name in truth
    }  # fmt: skip


def models():
    yield "grouped", lambda shared: llama(tie_word_embeddings=False)
    yield "one value head for all", lambda shared: llama(seed=2, num_key_value_heads=1)
    yield (
        "stories260K",
        lambda shared: load_model(shared / "stories260K", dtype="fp32", device_map="cpu").hf,
    )


@pytest.fixture(scope="module", params=[m for _, m in models()], ids=[n for n, _ in models()])
def pair(request, shared_data):
    """A model, and the oracle's values with and without a shared beginning, made once."""
    hf_model = request.param(shared_data)
    with torch.no_grad():  # norms that are all 1 would hide a missing weight
        for layer in [*hf_model.model.layers]:
            layer.input_layernorm.weight.mul_(torch.linspace(0.5, 1.5, hf_model.config.hidden_size))
        hf_model.model.norm.weight.mul_(torch.linspace(1.5, 0.5, hf_model.config.hidden_size))
    vocabulary = hf_model.config.vocab_size
    given = {p: samples_of(vocabulary, p) for p in (0, 24)}
    truth = {p: stacked(hf_model, s) for p, s in given.items()}
    return load_model(hf_model=hf_model), given, truth


@pytest.mark.parametrize("prefix", [0, 24])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_measure_equals_its_definition(pair, prefix, share, side):
    model, given, truth = pair
    samples = given[prefix]
    found = measure_samples(
        model, samples, measures=EVERY, answers=answers_of(samples), score=True,
        padding_side=side, share_prefix=share, batch_size=4,
    )  # fmt: skip
    far = disagreements(found.values, truth[prefix])
    assert max(far.values()) < 1e-4, far
    alone = measure_samples(
        model, samples, measures=EVERY, answers=answers_of(samples), batch_size=1
    ).values
    for name in MEASURES:
        np.testing.assert_allclose(alone[name], found.values[name], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("exclude_first", [False, True])
def test_the_two_norms_follow_token_agg_and_the_others_do_not(exclude_first):
    hf_model = llama()
    samples = [s for s in samples_of(97, 12) if len(s) > 1]
    truth = stacked(hf_model, samples, token_agg="all", exclude_first=exclude_first)
    found = measure_samples(
        load_model(hf_model=hf_model), samples, measures=EVERY, answers=answers_of(samples),
        token_agg="all", exclude_first_token=exclude_first, batch_size=3,
    ).values  # fmt: skip
    far = disagreements(found, truth)
    assert max(far.values()) < 1e-4, far
    ours = hugging_face.measure_samples(
        hf_model, samples, token_agg="all", exclude_first_token=exclude_first
    )["head_output_norm"]
    np.testing.assert_allclose(found["head_output_norm"], ours, rtol=1e-4)


def test_measures_of_a_subset_are_those_of_the_whole(pair):
    """Each measure by itself: what it reads is all it needs, and the last block may be short."""
    model, given, truth = pair
    samples = given[24]
    for name in MEASURES:
        found = measure_samples(
            model, samples, measures=choose_measures(name), answers=answers_of(samples)
        ).values
        assert list(found) == [name]
        assert disagreements(found, {name: truth[24][name]})[name] < 1e-4


def test_bfloat16_stays_near():
    hf_model = llama()
    samples = samples_of(97, 12)
    truth = stacked(hf_model, samples)
    narrow = load_model(hf_model=llama(dtype=torch.bfloat16))
    found = measure_samples(narrow, samples, measures=EVERY, answers=answers_of(samples)).values
    for name, exact in truth.items():
        mean, expected = np.nanmean(found[name], 0), np.nanmean(exact, 0)
        assert np.corrcoef(mean.ravel(), expected.ravel())[0, 1] > 0.99, name


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_other_families_agree_with_one_sample_at_a_time_and_a_law(name):
    """LayerNorm, fused projections, biases, partial rotation, learned positions."""
    model = load_model(hf_model=family_model(name), engine="hooked")
    samples = samples_of(97, 9)
    keys = answers_of(samples)
    found = measure_samples(model, samples, measures=EVERY, answers=keys, batch_size=4).values
    alone = measure_samples(
        model, samples, measures=EVERY, answers=keys, batch_size=1, share_prefix=False
    ).values
    for measure in MEASURES:
        np.testing.assert_allclose(found[measure], alone[measure], rtol=1e-3, atol=1e-4)
    # sum_j a_qj ||v_j W_O|| >= ||sum_j a_qj v_j W_O|| = ||z W_O||.
    assert (found["value_contribution"] >= found["contrib_norm_all"] * (1 - 1e-5)).all()


def test_direct_logits_of_a_model_of_attention_alone_add_up():
    """sum over layers and heads + what the embedding and b_O add = the difference of logits."""
    from handmade import as_model, hooked

    tl = hooked(normalization_type="LN")
    torch.nn.init.normal_(tl.ln_final.w, mean=1, std=0.3)
    samples = [
        Encoded(i, (1, 5, 3, 11, 7)[: 2 + i], letter_ids=(2, 4, 6, 8)[: 3 + i % 2])
        for i in range(4)
    ]
    keys = [i % 3 for i in range(4)]
    values = measure_samples(
        as_model(tl), samples, measures=choose_measures("direct_logit"), answers=keys
    ).values["direct_logit"]
    for sample, answer, found in zip(samples, keys, values, strict=True):
        ids = torch.tensor([sample.ids])
        logits, cache = tl.run_with_cache(ids)
        letters = list(sample.letter_ids)
        weight = torch.full((len(letters),), -1 / (len(letters) - 1), dtype=torch.float64)
        weight[answer] = 1
        whole = (logits[0, -1, letters] * weight).sum() - (tl.unembed.b_U[letters] * weight).sum()
        u = (tl.unembed.W_U[:, letters] * weight).sum(1)
        whole = whole - (tl.ln_final.b * u).sum()
        rest = cache["embed"][0, -1] + sum(block.attn.b_O for block in tl.blocks)
        scale = cache["ln_final.hook_scale"][0, -1]
        centred = tl.ln_final.w * u
        centred = centred - centred.mean()
        np.testing.assert_allclose(
            found.sum() + (rest * centred).sum() / scale, whole, rtol=1e-5, atol=1e-6
        )


class TestNaiveRivals:
    """Each is a mistake that is easily made, and none passes."""

    def setup_method(self):
        self.model = llama()
        self.model.set_attn_implementation("eager")
        self.samples = samples_of(97, n=4)[:3]
        self.answers = answers_of(self.samples)
        self.truth = stacked(self.model, self.samples)
        width = max(map(len, self.samples))
        self.ids = torch.zeros(3, width, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for i, s in enumerate(self.samples):
            self.ids[i, width - len(s) :] = torch.tensor(s.ids)
            self.mask[i, width - len(s) :] = 1
        with torch.no_grad():
            out = self.model(
                input_ids=self.ids, attention_mask=self.mask, output_attentions=True,
                position_ids=(self.mask.cumsum(1) - 1).clamp_min(0),
            )  # fmt: skip
        self.patterns = out.attentions

    def test_zero_times_log_zero_is_not_a_number(self):
        naive = -(self.patterns[0] * self.patterns[0].log()).sum(-1)
        assert torch.isnan(naive).any()
        found = measure_samples(
            load_model(hf_model=self.model), self.samples, padding_side="left",
            measures=choose_measures("attention_entropy"),
        ).values["attention_entropy"]  # fmt: skip
        assert np.isfinite(found).all()

    def test_counting_the_pad_queries(self):
        naive = torch.special.entr(self.patterns[0]).sum(-1).mean(-1)  # over all rows
        exact = self.truth["attention_entropy"][:, 0]
        assert np.abs(naive.numpy() - exact).max() > 1e-2
        real = self.mask.bool()
        right = torch.stack(
            [torch.special.entr(self.patterns[0][i])[:, real[i]].sum(-1).mean(-1) for i in range(3)]
        )
        np.testing.assert_allclose(right.numpy(), exact, rtol=1e-4)

    def test_the_first_column_is_not_the_first_token(self):
        naive = self.patterns[0][:, :, 1:, 0].mean(-1)
        assert np.abs(naive.numpy() - self.truth["attention_first"][:, 0]).max() > 1e-2

    def test_the_head_s_index_is_not_its_value_head_s(self):
        with torch.no_grad():
            oracle = Oracle(self.model, self.samples[0].ids)
        norms = [float(v[0].norm()) for v in oracle.layers[0]["v"]]
        naive = [norms[h % oracle.kv] for h in range(oracle.H)]  # and norms[h] does not exist
        right = [norms[h // (oracle.H // oracle.kv)] for h in range(oracle.H)]
        exact = self.truth["value_norm_first"][0, 0]
        np.testing.assert_allclose(right, exact, rtol=1e-6)
        assert np.abs(np.array(naive) - exact).max() > 1e-2

    def test_mask_sum_minus_one_is_not_the_last_token(self):
        assert ((self.mask.sum(1) - 1) != self.mask.shape[1] - 1).any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [True, False])
def test_a_bridge_measures_the_same(share, side):
    hf_model, samples = llama(), samples_of(97, 6)
    found = measure_samples(
        load_model(hf_model=hf_model, engine="bridge"), samples, measures=EVERY,
        answers=answers_of(samples), padding_side=side, share_prefix=share, batch_size=4,
    ).values  # fmt: skip
    far = disagreements(found, stacked(hf_model, samples))
    assert set(far) == set(MEASURES)
    assert max(far.values()) < 1e-4, far
