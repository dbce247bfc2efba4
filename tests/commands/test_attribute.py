"""Head scores on hand-built models whose answer is known, in float64, for every method."""

import numpy as np
import pytest
import torch
from handmade import as_model, hooked
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tl_headnorm.commands.attribute.attribute import Job, mean_z, run_methods
from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.greedy import greedy_order, rounds_of
from tl_headnorm.commands.attribute.leave_one_out import without_each
from tl_headnorm.commands.attribute.losses import TokenLoss
from tl_headnorm.commands.attribute.methods import quadrature
from tl_headnorm.commands.attribute.settings import METHODS, AttributeSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.metrics import Letters, Loss

HEAD_METHODS = tuple(m for m in METHODS if m != "rollout")
TOWARDS_ZERO = ("grad_x_act", "ig_joint", "ig_path", "ig_layer", "loo", "shapley")
TOKENS = [1, 5, 3, 11, 8, 2, 13, 4, 9]


class LogitLoss(Loss):
    """A weighted sum of the letters' logits: linear in what the model writes."""

    def __init__(self, *weights):
        self.weights = torch.tensor(weights or (1.0,), dtype=torch.float64)

    def loss(self, rows, resid):
        tl = rows.model.tl
        letters = torch.tensor([s.letter_ids[: len(self.weights)] for s in rows.samples])
        return (tl.unembed(tl.ln_final(resid))[:, 0].gather(1, letters) * self.weights).sum(1)


LETTERS = Letters([0, 1, 2, 3])


def items(*lengths):
    return [Encoded(i, tuple(TOKENS[:n]), letter_ids=(2, 5, 7, 11)) for i, n in enumerate(lengths)]


def job(tl, chosen=None, loss=None, **fields):
    fields = {"tolerance": 1e-9, "max_steps": 512, "batch_size": 3, "loss": "text", **fields}
    settings = AttributeSettings(**fields)
    if not hasattr(tl, "ln_final"):  # a model without norms has none at all
        tl.ln_final = torch.nn.Identity()
    gated = GatedLoss(as_model(tl), loss or LogitLoss(), settings)
    return Job(gated, list(chosen or items(9, 6)), [], settings)


def scores(tl, chosen=None, loss=None, methods=HEAD_METHODS, **fields):
    kept = run_methods(job(tl, chosen, loss, **fields), methods)
    return {name: found.values for name, found in kept.items()}, kept


def test_linear_model_all_methods_agree_and_the_null_head_gets_nothing():
    tl = hooked(n_layers=1)
    tl.blocks[0].attn.W_O[2] = 0
    found, kept = scores(tl)
    truth = found["loo"]
    assert np.abs(truth[:, 0, :2]).min() > 1e-3
    for method in TOWARDS_ZERO:
        np.testing.assert_allclose(found[method], truth, atol=1e-12)
    np.testing.assert_allclose(found["atp_zero"], -truth, atol=1e-12)
    np.testing.assert_allclose(found["michel"], np.abs(truth), atol=1e-12)
    for method in HEAD_METHODS:
        assert np.abs(found[method][:, 0, 2]).max() < 1e-12
    # In a linear model the estimates towards other baselines are exact as well.
    for method in ("atp_mean", "atp_corrupted", "grad_x_act", "loo"):
        assert kept[method].error.max() < 1e-12
    assert np.abs(found["atp_mean"] - found["atp_zero"]).max() > 1e-3
    assert np.abs(found["atp_corrupted"]).max() > 1e-3
    towards_mean, _ = scores(tl, methods=("loo", "ig_joint", "shapley"), baseline="mean")
    for value in towards_mean.values():
        np.testing.assert_allclose(value, -found["atp_mean"], atol=1e-12)


def gate_model(kind, n_layers=1):
    """Two heads write 1 each; the last MLP's relu makes OR or AND of them; the logit is f."""
    tl = hooked(n_layers=n_layers, attn_only=False, d_mlp=5, act_fn="relu")
    for parameter in tl.parameters():
        parameter.zero_()
    tl.embed.W_E[:, 0] = 1
    a, b, last = tl.blocks[0].attn, tl.blocks[-1].attn, tl.blocks[-1].mlp
    second = 0 if n_layers > 1 else 1
    for attention, head, to in ((a, 0, 1), (b, second, 2)):
        attention.W_V[head, 0, 0] = 1
        attention.W_O[head, 0, to] = 1
    last.W_in[1:3, 0], last.b_in[0], last.W_out[0, 3] = 1, -1, 1
    tl.unembed.W_U[3, 2] = 1 if kind == "and" else -1
    if kind == "or":
        tl.unembed.W_U[1:3, 2] = 1
    return tl


@pytest.mark.parametrize(
    ("kind", "gradient", "left_out", "shared"), [("or", 0, 0, 0.5), ("and", 1, 1, 0.5)]
)
def test_or_and_of_two_heads(kind, gradient, left_out, shared):
    found, _ = scores(gate_model(kind))
    expected = {
        **dict.fromkeys(("grad_x_act", "michel"), gradient),
        "atp_zero": -gradient,
        "loo": left_out,
        **dict.fromkeys(("shapley", "ig_joint", "ig_path", "ig_layer"), shared),
    }
    for method, value in expected.items():
        np.testing.assert_allclose(found[method][:, 0], [[value, value, 0]] * 2, atol=1e-12)
    # Every prompt has the same z, so the mean is z and there is nothing to patch.
    for method in ("atp_mean", "atp_corrupted"):
        assert np.abs(found[method]).max() < 1e-12


def test_sequential_leave_one_out_sees_heads_that_stand_in_for_each_other():
    """Either of heads 0 and 1 is enough, head 2 adds a little on its own."""
    tl = gate_model("or")
    tl.blocks[0].attn.W_V[2, 0, 0] = 1
    tl.blocks[0].attn.W_O[2, 0, 3] = -0.3
    work = job(tl, loss=LogitLoss(-1.0))

    def order(rounds, most):
        return greedy_order(work.gated, work.items, rounds, most=most).tolist()

    assert order(3, most=False) == [0, 2, 1]  # the last of the pair goes last
    assert order(3, most=True) == [2, 0, 1]
    # The rival, single leave-one-out (one round), throws both of the pair away first.
    assert order(1, most=False) == [0, 1, 2]
    assert order(2, most=False) == [0, 1, 2]
    assert rounds_of(None, 32) == 8
    assert rounds_of(None, 512) == 0
    assert rounds_of(99, 32) == 32


@pytest.mark.parametrize(
    "loss", [LETTERS, TokenLoss(mean=False, starts={0: 8, 1: 5})], ids=["letter", "text"]
)
def test_one_more_head_off_is_a_whole_forward_with_those_heads_off(loss):
    """Starting behind a layer's attention changes nothing, whichever heads are off already."""
    tl, chosen = nonlinear(), items(9, 6)
    work = job(tl, chosen, loss)
    on = np.array([[True, False, True], [True, True, False]])
    found = without_each(work.gated, chosen, on, None)
    assert np.isnan(found[:, ~on]).all()
    for row, item in enumerate(chosen):
        for layer, head in np.argwhere(on):
            off = [(0, 1), (1, 2), (int(layer), int(head))]
            with work.gated.model.engine.zero_heads(off):
                logits = tl(torch.tensor([item.ids]))[0]
            if isinstance(loss, Letters):
                truth = -logits[-1, list(item.letter_ids)].log_softmax(0)[item.index]
            else:
                truth = -logits.log_softmax(-1)[-2, item.ids[-1]]
            assert found[row, layer, head] == pytest.approx(float(truth), abs=1e-12)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_all_heads_off_needs_one_position(baseline):
    work = job(nonlinear(), items(9, 6, 3), LETTERS)
    gated, clean = work.gated, work.gated.clean(work.items)
    base = mean_z(gated, work.items) if baseline == "mean" else None
    whole = gated.losses(clean, np.arange(3), gated.ones(3) * 0, range(2), base=base)
    widths = []
    point = [("blocks.0.hook_resid_pre", lambda resid, hook: widths.append(resid.shape[1]))]
    with gated.model.tl.hooks(fwd_hooks=point):
        found = gated.off_losses(clean, base)
    np.testing.assert_allclose(found, whole, atol=1e-12)
    assert widths == [1]
    by_position = {layer: z.expand(3, 9, -1, -1) for layer, z in base.items()} if base else None
    if by_position:  # not the same everywhere, for all it knows: all positions are run
        np.testing.assert_allclose(gated.off_losses(clean, by_position), whole, atol=1e-12)


def test_and_across_layers_is_counted_twice_by_the_per_layer_integral():
    found, kept = scores(gate_model("and", n_layers=2))
    for method in ("grad_x_act", "michel", "loo", "ig_layer"):
        np.testing.assert_allclose(found[method][:, :, 0], 1, atol=1e-12)
    np.testing.assert_allclose(found["atp_zero"][:, :, 0], -1, atol=1e-12)
    assert found["ig_layer"].sum() == pytest.approx(2 * 2)
    assert kept["ig_layer"].error.max() < 1e-12  # complete layer by layer all the same
    for method in ("shapley", "ig_joint"):
        np.testing.assert_allclose(found[method][:, :, 0], 0.5, atol=1e-12)
    np.testing.assert_allclose(found["ig_path"].sum((1, 2)), 1, atol=5e-3)


def induction_model(sharpness=40.0):
    """Layer 0 head 0 copies the previous token's name, layer 1 head 0 looks it up and copies."""
    vocab, n_pos = 6, 7
    place, previous, out = vocab, vocab + n_pos, 2 * vocab + n_pos
    tl = hooked(
        n_layers=2, n_heads=2, d_head=8, d_model=3 * vocab + n_pos, d_vocab=vocab, n_ctx=n_pos,
        positional_embedding_type="standard", rotary_dim=None,
    )  # fmt: skip
    for parameter in tl.parameters():
        parameter.zero_()
    eye = torch.eye(8, dtype=torch.float64)
    tl.embed.W_E[:, :vocab] = eye[:vocab, :vocab]
    tl.pos_embed.W_pos[:, place : place + n_pos] = eye[:n_pos, :n_pos]
    first, second = tl.blocks[0].attn, tl.blocks[1].attn
    scale = sharpness * 8**0.5
    for position in range(1, n_pos):
        first.W_Q[0, place + position, position - 1] = scale
    first.W_K[0, place : place + n_pos] = eye[:n_pos]
    first.W_V[0, :vocab] = eye[:vocab]
    first.W_O[0, :vocab, previous : previous + vocab] = eye[:vocab, :vocab]
    second.W_Q[0, :vocab] = scale * eye[:vocab]
    second.W_K[0, previous : previous + vocab] = eye[:vocab]
    second.W_V[0, :vocab] = eye[:vocab]
    second.W_O[0, :vocab, out : out + vocab] = eye[:vocab, :vocab]
    tl.unembed.W_U[out : out + vocab] = 2 * eye[:vocab, :vocab]
    return tl


def test_induction_pair_gradient_misses_the_saturated_head():
    tl = induction_model()
    prompt = [Encoded(0, (0, 1, 2, 3, 4, 1), letter_ids=(1, 2, 3, 4, 5))]  # ... 1 2 ... 1 -> 2
    _, cache = tl.run_with_cache(torch.tensor([prompt[0].ids]))
    pattern = cache["blocks.0.attn.hook_pattern"][0, 0]
    assert (pattern.diagonal(-1) > 1 - 1e-12).all()
    found, kept = scores(tl, prompt, Letters([1]))
    pair = {method: value[0, :, 0] for method, value in found.items()}
    assert pair["loo"].max() < -0.5  # either one breaks the copy
    for method in ("grad_x_act", "michel", "atp_zero"):
        assert abs(pair[method][0]) < 1e-12  # saturated: the naive rival calls it useless
        assert abs(pair[method][1]) > 0.3
    for method in ("ig_joint", "ig_path", "ig_layer", "shapley"):
        assert pair[method].max() < -0.01
        assert kept[method].error.max() < 1e-6
    for method in HEAD_METHODS:
        assert np.abs(found[method][0, :, 1]).max() == 0
    np.testing.assert_allclose(pair["ig_layer"], pair["loo"], atol=1e-6)  # alone in their layers


def test_grouped_query_twins_get_opposite_scores():
    tl = hooked(n_layers=1, n_heads=4, n_key_value_heads=2)
    attention = tl.blocks[0].attn
    attention.W_Q[1], attention.b_Q[1] = attention.W_Q[0], attention.b_Q[0]
    attention.W_O[1] = -attention.W_O[0]
    found, _ = scores(tl)
    for method in HEAD_METHODS:
        sign = 1 if method == "michel" else -1
        np.testing.assert_allclose(found[method][..., 1], sign * found[method][..., 0], atol=1e-12)
        assert np.abs(found[method][..., 0]).min() > 1e-4


def nonlinear(**fields):
    """Two layers with MLPs and norms, random, far from linear."""
    return hooked(attn_only=False, d_mlp=7, normalization_type="RMS", **fields)


def test_integrals_complete_when_steps_double():
    tl = nonlinear()
    _, kept = scores(tl, items(9, 6, 3, 5), LETTERS)
    for method in ("ig_joint", "ig_path", "ig_layer", "shapley"):
        assert kept[method].error.max() < 1e-6, method
    assert kept["ig_joint"].steps.max() > 8  # eight were not enough
    _, kept = scores(tl, None, LETTERS, ("ig_joint",), max_steps=8)
    assert kept["ig_joint"].error.max() > 1e-6
    assert (kept["ig_joint"].steps == 8).all()


def test_trapezoid_with_wrong_weights_never_converges():
    """The rival: steps points of weight 1/steps at both ends included."""
    for n in (64, 4096):
        t = np.linspace(0, 1, n)
        rival = (3 * t**2)[:-1].sum() / n  # weights sum to (n - 1) / n
        nodes, weights = quadrature(8)
        assert (3 * nodes**2) @ weights == pytest.approx(1, abs=1e-14)
        assert abs(rival - 1) > 1 / n / 2
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("method", HEAD_METHODS)
def test_padding_and_batching_change_nothing(method):
    tl, lengths = nonlinear(), (9, 6, 3, 5)
    same = {"steps": 8, "max_steps": 8}
    alone, _ = scores(tl, items(*lengths), LETTERS, (method,), batch_size=1, **same)
    if method in ("shapley", "atp_mean"):  # one batch: permutations are drawn per batch
        alone, _ = scores(tl, items(*lengths), LETTERS, (method,), batch_size=4, **same)
    for side in ("left", "right"):
        size = 4 if method == "shapley" else 3
        found, _ = scores(
            tl, items(*lengths), LETTERS, (method,), padding_side=side, batch_size=size, **same
        )
        np.testing.assert_allclose(found[method], alone[method], atol=1e-12)


def test_no_pass_is_larger_than_max_batch_tokens():
    tl, fields = nonlinear(), {"steps": 8, "max_steps": 8, "shapley_pairs": 1}
    sizes = []
    point = [("blocks.1.hook_resid_pre", lambda resid, hook: sizes.append(resid[..., 0].numel()))]
    free, _ = scores(tl, items(9, 6, 3), LETTERS, **fields)
    with tl.hooks(fwd_hooks=point):
        found, _ = scores(tl, items(9, 6, 3), LETTERS, max_batch_tokens=20, **fields)
    assert max(sizes) <= 20
    for method in set(HEAD_METHODS) - {"shapley"}:  # whose permutations are drawn per batch
        np.testing.assert_allclose(found[method], free[method], atol=1e-12)
    sizes.clear()
    with tl.hooks(fwd_hooks=point):  # the rival: all steps of all items at once
        scores(tl, items(9, 6, 3), LETTERS, ("ig_joint",), **fields)
    assert max(sizes) > 100


def test_joint_integral_equals_captum():
    from captum.attr import IntegratedGradients

    tl, chosen = nonlinear(), items(9)
    work = job(tl, chosen, LETTERS)
    clean = work.gated.clean(chosen)

    def forward(gates):
        rows = np.zeros(len(gates), dtype=int)
        return work.gated._pass(clean, rows, gates, range(2), 0, None)

    start = work.gated.ones(1).requires_grad_()
    theirs = IntegratedGradients(forward).attribute(start, n_steps=16, method="gausslegendre")
    ours, _ = scores(tl, chosen, LETTERS, ("ig_joint",), steps=16, max_steps=16)
    np.testing.assert_allclose(ours["ig_joint"], theirs.detach().numpy(), atol=1e-12)


def test_no_graph_below_the_first_gate_and_frozen_weights():
    tl = nonlinear()
    tl.requires_grad_(True)
    work = job(tl)
    assert not any(p.requires_grad for p in tl.parameters())
    gated, clean = work.gated, work.gated.clean(work.items)
    seen = {}

    def watch(resid, hook):
        seen[hook.name] = resid.requires_grad

    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(2)]
    with tl.hooks(fwd_hooks=[(name, watch) for name in names]):
        gated.gradients(clean, np.arange(2), gated.ones(2), [1])
        # Layer 0's attention is the clean pass's: the pass begins behind it.
        assert seen == {names[1]: False}
        gated.gradients(clean, np.arange(2), gated.ones(2), [0])
    assert seen == {names[1]: True}


def test_token_losses_against_plain_log_softmax():
    tl = nonlinear()
    chosen, starts = items(9, 5), (4, 2)
    for mean in (False, True):
        for side in ("left", "right"):
            work = job(tl, chosen, TokenLoss(mean, dict(enumerate(starts))), padding_side=side)
            found = work.gated.clean_loss(work.gated.clean(chosen))
            for item, start, value in zip(chosen, starts, found, strict=True):
                logp = tl(torch.tensor([item.ids]))[0].log_softmax(-1)
                at = [-logp[i - 1, item.ids[i]].item() for i in range(start, len(item))]
                assert value == pytest.approx(np.mean(at) if mean else np.sum(at), rel=1e-12)


# -- Shapley's properties -----------------------------------------------------------------------

EXAMPLES = examples(max_examples=8, deadline=None)
SEEDS = st.integers(0, 10_000)


@EXAMPLES
@given(seed=SEEDS, pairs=st.integers(1, 3), players=st.sampled_from(["heads", "layers"]))
def test_shapley_efficiency_is_exact_at_any_number_of_samples(seed, pairs, players):
    tl = nonlinear(seed=seed)
    fields = {"shapley_pairs": pairs, "shapley_players": players, "seed": seed}
    _, kept = scores(tl, None, LETTERS, ("shapley",), **fields)
    assert kept["shapley"].error.max() < 1e-12


@EXAMPLES
@given(seed=SEEDS)
def test_shapley_null_head_gets_nothing(seed):
    tl = nonlinear(seed=seed)
    tl.blocks[0].attn.W_O[1] = 0
    found, _ = scores(tl, None, LETTERS, ("shapley",), shapley_pairs=1, seed=seed)
    assert np.abs(found["shapley"][:, 0, 1]).max() < 1e-14
    assert np.abs(found["shapley"][:, 1]).min() > 0


@EXAMPLES
@given(seed=SEEDS, pairs=st.integers(1, 3))
def test_shapley_symmetry(seed, pairs):
    """Heads 0 and 1 only count together, head 2 adds on its own: a permutation and its reverse
    treat the twins alike. A permutation alone, the rival, does not."""
    tl = gate_model("and")
    tl.blocks[0].attn.W_V[2, 0, 0] = 1
    tl.blocks[0].attn.W_O[2, 0, 3] = 0.3
    found, _ = scores(tl, methods=("shapley",), shapley_pairs=pairs, seed=seed)
    np.testing.assert_allclose(found["shapley"], [[[0.5, 0.5, 0.3]]] * 2, atol=1e-12)


@EXAMPLES
@given(seed=SEEDS, weight=st.floats(-3, 3))
def test_shapley_linearity(seed, weight):
    tl = nonlinear(seed=seed)

    def of(*weights):
        found, _ = scores(
            tl, None, LogitLoss(*weights), ("shapley",), shapley_pairs=1, seed=seed, batch_size=2
        )
        return found["shapley"]

    np.testing.assert_allclose(of(1.0, weight), of(1.0, 0.0) + weight * of(0.0, 1.0), atol=1e-10)


def test_shapley_standard_error_tells_the_sampling_noise():
    tl = nonlinear(seed=3)
    draws = [
        scores(tl, None, LETTERS, ("shapley",), shapley_pairs=4, seed=s)[1]["shapley"]
        for s in range(12)
    ]
    spread = np.std([d.values.mean(0) for d in draws], axis=0, ddof=1)
    told = np.sqrt(np.mean([d.noise for d in draws], axis=0)) / 2
    assert spread.max() > 1e-3
    ratio = told[spread > 1e-4] / spread[spread > 1e-4]
    assert 0.5 < np.median(ratio) < 2
    one = scores(tl, None, LETTERS, ("shapley",), shapley_pairs=1)[1]["shapley"]
    assert np.isnan(one.noise).all()
