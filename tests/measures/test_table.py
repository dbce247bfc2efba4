"""Each measure against its definition, written out."""

import json
import math

import numpy as np
import pytest
import torch
from handmade import as_model, hooked
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.measures import (
    FOLLOW_TOKEN_AGG,
    MEASURES,
    NORMS,
    LayerActivations,
    Weights,
    choose_measures,
    contribution_factor,
    last_real_position,
    layer_normalised,
    output_norm,
    resid_contrib_norm,
    sum_over_tokens,
    take_position,
    uniform_first_attention,
)
from tl_headnorm.settings import Settings


@pytest.mark.parametrize(("d_head", "d_model"), [(4, 10), (10, 4), (8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_factor_gives_the_norm_of_the_d_model_vector(d_head, d_model, dtype, tolerance):
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, d_head, dtype=dtype)
    W_O = torch.randn(3, d_head, d_model, dtype=dtype)
    explicit = torch.einsum("bphd,hdm->bphm", z.double(), W_O.double()).norm(dim=-1)
    found = resid_contrib_norm(z, contribution_factor(W_O))
    np.testing.assert_allclose(found, explicit, rtol=tolerance)


def test_factor_of_a_null_and_of_a_rank_deficient_head():
    torch.manual_seed(0)
    W_O = torch.randn(2, 4, 10, dtype=torch.float64)
    W_O[0] = 0
    W_O[1, 1] = W_O[1, 0]  # z along (1, -1, 0, 0) adds nothing
    z = torch.tensor([[[[1.0, 2, 3, 4], [1, -1, 0, 0]]]], dtype=torch.float64)
    factor = contribution_factor(W_O)
    contribution = resid_contrib_norm(z, factor)
    output = output_norm(z, factor)
    assert contribution[0, 0, 0] == 0
    assert contribution[0, 0, 1] < 1e-14
    assert (output > 1).all()


def test_norms_of_bfloat16_are_taken_in_float32():
    z = torch.full((1, 1, 1, 64), 3.0, dtype=torch.bfloat16)
    factor = contribution_factor(torch.eye(64, dtype=torch.bfloat16)[None])
    assert output_norm(z, factor).item() == 24
    assert resid_contrib_norm(z, factor).item() == 24
    # The rival: bfloat16 all the way stops growing once a square is below the rounding.
    naive = sum((x * x for x in z.flatten()), start=torch.zeros((), dtype=torch.bfloat16)).sqrt()
    assert naive.item() != 24


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_last_real_position_on_either_side(lengths, left):
    width = max(lengths) + 1
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1 if left else 0
        mask[row, : 0 if left else n] = 1
    truth = [width - 1 if left else n - 1 for n in lengths]
    assert last_real_position(mask).tolist() == truth


def test_the_usual_shortcut_is_wrong_under_left_padding():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert (mask.sum(1) - 1).item() != last_real_position(mask).item() == 3


def test_sum_over_tokens_sees_real_tokens_only():
    values = torch.tensor([[[1.0], [3.0], [torch.nan]], [[torch.inf], [10.0], [20.0]]])
    counted = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    total, count = sum_over_tokens(values, counted)
    assert total.flatten().tolist() == [4, 30]
    assert count.flatten().tolist() == [2, 2]


def test_take_position_keeps_the_axis():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert take_position(x, torch.tensor([2, 0])).tolist() == [[[8, 9, 10, 11]], [[12, 13, 14, 15]]]


LETTERS = (2, 4, 6, 8)


def prompts(lengths=(5, 3, 1, 4)):
    rows = [(1, 5, 3, 11, 7)[:n] for n in lengths]
    return [Encoded(i, row, letter_ids=LETTERS) for i, row in enumerate(rows)]


def measured(tl, **how):
    """Every measure of every prompt."""
    return measure_samples(
        as_model(tl), prompts(), measures=tuple(MEASURES.values()), answers=[0, 1, 2, 3], **how
    ).values


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_head_that_attends_alike_to_all(side):
    tl = hooked(n_layers=1)
    tl.ln_final = torch.nn.Identity()
    tl.ln_final.w, tl.ln_final.eps = torch.ones(10, dtype=torch.float64), 0.0
    tl.blocks[0].attn.W_Q.zero_()
    tl.blocks[0].attn.b_Q.zero_()
    found = measured(tl, padding_side=side, batch_size=2)
    for row, n in enumerate((5, 3, 1, 4)):
        uniform = uniform_first_attention(n)
        np.testing.assert_allclose(found["attention_first"][row], uniform, rtol=1e-6)
        entropy = sum(math.log(q + 1) for q in range(n)) / n
        np.testing.assert_allclose(found["attention_entropy"][row], entropy, atol=1e-7)
    assert np.isnan(found["attention_first"][2]).all()  # one token attends to nothing else
    harmonic = sum(1 / k for k in range(1, 6))
    assert uniform_first_attention(5) == pytest.approx((harmonic - 1) / 4)


def test_a_head_whose_values_are_all_the_same_moves_one_vector():
    tl = hooked(n_layers=1)
    tl.ln_final = torch.nn.Identity()
    tl.ln_final.w, tl.ln_final.eps = torch.ones(10, dtype=torch.float64), 0.0
    tl.blocks[0].attn.W_V.zero_()
    found = measured(tl)
    attn = tl.blocks[0].attn
    sizes = torch.einsum("hd,hdm->hm", attn.b_V, attn.W_O).norm(dim=-1).numpy()
    for name in ("value_contribution", "contrib_norm_all", "contrib_norm_last"):
        np.testing.assert_allclose(found[name], np.broadcast_to(sizes, (4, 1, 3)), rtol=1e-6)
    for name in ("contrib_norm_last_to_all", "output_norm_last_to_all"):
        np.testing.assert_allclose(found[name], 1, rtol=1e-6)
    norms = attn.b_V.norm(dim=-1).numpy()
    np.testing.assert_allclose(found["value_norm_first"][:, 0], np.tile(norms, (4, 1)), rtol=1e-6)


def test_a_null_head_and_a_head_alone():
    tl = hooked(n_layers=1)
    tl.ln_final = torch.nn.Identity()
    tl.ln_final.w, tl.ln_final.eps = torch.ones(10, dtype=torch.float64), 0.0
    tl.blocks[0].attn.W_O[1:] = 0
    tl.blocks[0].attn.b_O.zero_()
    found = measured(tl)
    null = [n for n in MEASURES if n.startswith(("contrib", "cosine"))]
    for name in [*null, "value_contribution", "direct_logit", "head_resid_contrib_norm"]:
        assert (found[name][:, 0, 1:] == 0).all(), name
    assert (found["output_norm_last"] > 0).all()
    # The only head that writes is the whole attention output.
    np.testing.assert_allclose(found["cosine_all"][:, 0, 0], 1, rtol=1e-6)
    # Direct logits: what it adds, against the letters (scale: root mean square of the residual).
    ids = torch.tensor([prompts()[0].ids])
    resid = tl(ids, stop_at_layer=1)[0, -1]
    added = resid - tl.embed(ids)[0, -1] - tl.blocks[0].hook_resid_pre(0)
    u = tl.unembed.W_U[:, 2] - tl.unembed.W_U[:, [4, 6, 8]].mean(1)
    exact = added @ u / resid.pow(2).mean().sqrt()
    np.testing.assert_allclose(found["direct_logit"][0, 0, 0], exact, rtol=1e-6)


def test_a_sink_whose_value_is_nothing():
    torch.manual_seed(0)
    n, W_O = 4, torch.randn(2, 3, 5, dtype=torch.float64)
    weights = Weights(W_O, torch.zeros(5, dtype=torch.float64), contribution_factor(W_O))
    v = torch.randn(1, n, 1, 3, dtype=torch.float64)  # both heads share a value
    v[:, 0] = 0
    pattern = torch.zeros(1, 2, n, n, dtype=torch.float64)
    pattern[0, 0, :, 0] = 1  # the sink
    pattern[0, 1] = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    z = torch.einsum("bhqk,bkd->bqhd", pattern, v[:, :, 0])
    real = torch.ones(1, n, dtype=torch.bool)
    read = {"v": v, "pattern": pattern, "resid_pre": torch.ones(1, n, 5, dtype=torch.float64)}
    activations = LayerActivations(z, real, real.cumsum(1) - 1, real, weights, read)

    def of(name):
        return MEASURES[name].compute(activations)[0]

    assert (of("attention_first")[:, 0] == 1).all()
    for name in ("attention_entropy", "value_contribution", "contrib_norm_all", "cosine_all"):
        assert (of(name)[:, 0] == 0).all(), name
        assert (of(name)[1:, 1] != 0).all(), name
    assert (of("value_norm_first")[0] == 0).all()
    with pytest.raises(InputError, match="expected 'answer' among what it reads"):
        of("direct_logit")


def test_divided_by_the_layer_s_mean_head():
    values = np.array([[[1.0, 3.0], [2.0, 2.0]], [[0.0, 0.0], [-1.0, 3.0]]])
    found = layer_normalised(values)
    # A null layer stays 0; what has both signs is divided by the mean size.
    np.testing.assert_allclose(found, [[[0.5, 1.5], [1, 1]], [[0, 0], [-0.5, 1.5]]])
    np.testing.assert_allclose(layer_normalised(7 * values), found)


def test_every_measure_is_known_by_its_name():
    assert all(name == measure.name for name, measure in MEASURES.items())
    assert tuple(m.name for m in NORMS) == Settings().measures == FOLLOW_TOKEN_AGG
    # <name>_mean and the like are the statistics of a run.
    assert not [n for n in MEASURES if n.endswith(("_mean", "_std", "_n", "_M2"))]


def test_choosing():
    assert choose_measures("all") == tuple(MEASURES.values())
    assert "direct_logit" not in [m.name for m in choose_measures("all", scored=False)]
    assert [m.name for m in choose_measures("cosine_all, value_norm_all")] == [
        "cosine_all", "value_norm_all",
    ]  # fmt: skip
    assert choose_measures(("cosine_all", "cosine_all")) == (MEASURES["cosine_all"],)
    for text, message in (
        ("cosine_al", "unknown measure 'cosine_al'; did you mean 'cosine_all'?"),
        ((), "expected at least one, found none"),
    ):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            choose_measures(text)
    with pytest.raises(InputError, match="expected score_answers true for direct_logit"):
        choose_measures("direct_logit", scored=False)


OWN = """
from tl_headnorm.measures import Measure

def largest(activations):
    return activations.z.abs().amax(-1)

MEASURES = {"largest": Measure("largest", "max |z|", "activation units", largest, "all")}
"""


def test_a_measure_of_one_s_own(tmp_path, run_cli, small):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    tl = hooked()
    found = measure_samples(
        as_model(tl), prompts(), measures=choose_measures("largest", path)
    ).values["largest"]
    _, cache = tl.run_with_cache(torch.tensor([prompts()[0].ids]))
    exact = cache["z", 1][0].abs().amax(-1).mean(0)
    np.testing.assert_allclose(found[0, 1], exact, rtol=1e-6)
    assert [m.name for m in choose_measures("all", path)] == [*MEASURES, "largest"]
    # A run holds it, and is read without the file.
    from tl_headnorm import load_run

    flags = ["--measures", "largest,attention_entropy", "--measures_file", path]
    run_dir = run_cli("collect", *small, *flags, "--output_dir", tmp_path).run_dir
    path.unlink()
    run = load_run(run_dir)
    assert {"largest", "attention_entropy"} <= set(run)
    assert "head_output_norm" not in run
    assert run["largest_mean"].attrs["formula"] == "max |z|"
    assert (run_dir / "largest_heatmap.png").exists()
    assert set(np.load(run_dir / "per_sample.npz")) == {"largest", "attention_entropy"}
    refused = run_cli("collect", *small, *flags, "--output_dir", tmp_path)
    assert "expected Python that defines MEASURES" in refused.error_line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found .* has no attribute 'MEASURES'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("MEASURES = [1]", "to be a dict of names to Measure, found list"),
        (OWN.replace('{"largest"', '{"other"'), "its own name as the key"),
        (OWN.replace("largest", "cosine_all"), "expected a new name"),
        (OWN.replace("largest", "largest_mean"), "ends in no _mean"),
        (OWN.replace('"all"', '"some"'), "tokens among agg, last"),
        (OWN.replace('"all"', '"all", ("scores",)'), "reads with z, among z, pattern"),
        (OWN.replace('"all"', '"all", ("z", "answer")'), "tokens 'last', where the answer"),
    ],
)
def test_a_faulty_measures_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        choose_measures("all", path)
    with pytest.raises(InputError, match="expected Python that defines MEASURES, found"):
        choose_measures("all", tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("activations.nothing", "measure largest failed .AttributeError"),
        ("activations.z", "to give a tensor .batch, pos, head. of"),
        ("activations.pattern", "expected 'pattern' among what it reads"),
        ("activations.z[..., 0] / 0", "expected finite values"),
    ],
)
def test_a_faulty_measure_is_one_line(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace("activations.z.abs().amax(-1)", body))
    with pytest.raises(InputError, match=message):
        measure_samples(as_model(hooked()), prompts(), measures=choose_measures("largest", path))


def test_an_answer_is_needed_for_its_direction():
    with pytest.raises(InputError, match="expected prompts with an answer's letter"):
        measure_samples(as_model(hooked()), prompts(), measures=choose_measures("direct_logit"))


def test_patterns_are_counted_when_batches_are_planned(monkeypatch):
    from tl_headnorm.measures import measurer

    monkeypatch.setattr(measurer, "free_bytes", lambda device: 10**6)
    model = as_model(hooked())
    plain = measurer.most_tokens(model, measurer.MeasureOptions(), 100)
    how = measurer.MeasureOptions(measures=choose_measures("attention_entropy"))
    found = [measurer.most_tokens(model, how, n) for n in (100, 200)]
    assert found[0] < plain
    assert found[0] == 10**6 // 2 // (measurer.PATTERN_BYTES * 3 * 100)
    assert found[1] == found[0] // 2
    assert measurer.most_tokens(model, measurer.MeasureOptions(max_batch_tokens=77), 100) == 77


def test_what_follows_from_a_run_is_derived_not_stored(run_cli, small, tmp_path):
    from tl_headnorm import load_run
    from tl_headnorm.run import results
    from tl_headnorm.run.reading import derive

    flags = ["--measures", "attention_first,cosine_all", "--output_dir", tmp_path]
    path = run_cli("collect", *small, *flags).run_dir
    assert not [f.name for f in path.iterdir() if "over_layer" in f.name]
    run = derive(load_run(path))
    values = run["cosine_all"].values
    shares = run["cosine_all_over_layer"].values
    for sample, layer in ((0, 0), (6, 2)):
        size = np.mean([abs(v) for v in values[sample, layer]])
        np.testing.assert_allclose(shares[sample, layer], values[sample, layer] / size, rtol=1e-6)
    np.testing.assert_allclose(run["cosine_all_over_layer_mean"], shares.mean(0), rtol=1e-6)
    uniform = run["attention_first_uniform"].values
    assert uniform[2] == pytest.approx(uniform_first_attention(int(run["n_tokens"][2])))
    assert results.measures_of(run) == ["attention_first", "cosine_all"]
    bare = load_run(path).drop_vars("cosine_all")
    with pytest.raises(InputError, match="expected per-sample values of cosine_all, found none"):
        derive(bare)


def test_hugging_face_is_asked_for_the_norms_alone(run_cli, small, tmp_path):
    flags = [*small, "--validate_samples", 3, "--output_dir", tmp_path]
    refused = run_cli("collect", *flags, "--measures", "cosine_all")
    assert "expected head_output_norm or head_resid_contrib_norm to be" in refused.error_line
    assert not list(tmp_path.iterdir())
    both = run_cli("collect", *flags, "--measures", "cosine_all,head_output_norm")
    assert json.loads((both.run_dir / "meta.json").read_text())["validated_against_hf"] < 1e-4
