"""Massive activations: planted ones are found, made and removed where they should be."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import as_model, hooked

from tl_headnorm.commands.massive import massive as study
from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.edits import Ablation, SetActivations
from tl_headnorm.interventions.magnitudes import largest, massive
from tl_headnorm.interventions.metrics import Profile
from tl_headnorm.interventions.runner import run
from tl_headnorm.settings import Settings

TOKENS = (0, 5, 3, 11, 8, 2, 13, 4, 9)
SAMPLES = [Encoded(i, TOKENS[:n]) for i, n in enumerate((9, 6, 4))]
DIM, SIZE = 12, 500.0


def empty(**fields):
    """A model of zeros whose tokens are vectors of signs."""
    tl = hooked(n_layers=3, d_model=14, **fields)
    tl.ln_final = torch.nn.Identity()  # which a model without norms lacks
    for parameter in tl.parameters():
        parameter.zero_()
    tl.embed.W_E.copy_(torch.randn(tl.embed.W_E.shape, dtype=torch.float64).sign())
    return tl


@pytest.fixture
def planted():
    """The MLP of layer 1 makes 500 in dimension 12 at token 0, which is the first, alone."""
    tl = empty(attn_only=False, d_mlp=5, act_fn="relu")
    signs = tl.embed.W_E[0]
    assert ((tl.embed.W_E[1:] @ signs) <= 14 - 2).all()  # no other token is the same vector
    mlp = tl.blocks[1].mlp
    mlp.W_in[:, 0], mlp.b_in[0] = signs, -(14 - 1)
    mlp.W_out[0, DIM] = SIZE - signs[DIM]
    return as_model(tl)


def curve(model, *interventions):
    """The largest activation after every block: [1 + intervention, layer]."""
    found = run(model, SAMPLES, interventions, Profile(), settings=Settings(batch_size=2))
    return found["top1"].mean(1)


ALL = tuple((layer, head) for layer in range(3) for head in range(3))


def test_planted_in_an_mlp(planted):
    heads_off, mlps_off = Ablation("heads", heads=ALL), Ablation("mlps", mlps=(0, 1, 2))
    clean, without_heads, without_mlps = curve(planted, heads_off, mlps_off)
    assert clean.tolist() == without_heads.tolist() == [1, SIZE, SIZE]
    assert without_mlps.tolist() == [1, 1, 1]
    first = curve(planted, Ablation("mlp 0", mlps=(0,)), Ablation("mlp 1", mlps=(1,)))
    assert first[1:].tolist() == [[1, SIZE, SIZE], [1, 1, 1]]


def test_where_it_is(planted):
    found = study.massive_entries(planted, SAMPLES, least=100.0, ratio=100.0)
    assert found[["layer", "dim", "position"]].values.tolist() == [[1, DIM, 0], [2, DIM, 0]]
    assert found["mean_value"].tolist() == [SIZE, SIZE]
    assert found["share"].tolist() == [1, 1]
    assert found["token_id"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("least", "ratio", "found"),
    [(499.9, 1.0, 2), (500.0, 1.0, 0), (500.1, 1.0, 0), (1.0, 500.0, 2), (1.0, 500.1, 0)],
)
def test_thresholds(planted, least, ratio, found):
    """|x| above, ratio to the median of 1 from: just below and just above."""
    assert len(study.massive_entries(planted, SAMPLES, least, ratio)) == found


def test_set_to_zero_and_to_its_mean(planted):
    means = torch.zeros(14)
    means[DIM] = SIZE
    zero = SetActivations("zero", 1, 100.0, 100.0)
    mean = SetActivations("mean", 1, 100.0, 100.0, means)
    early = SetActivations("early", 0, 100.0, 100.0)  # nothing there yet
    clean, to_zero, to_mean, nothing = curve(planted, zero, mean, early)
    assert to_zero.tolist() == [1, 1, 1]
    assert to_mean.tolist() == nothing.tolist() == clean.tolist()


def test_a_head_is_not_a_slice_of_the_attention_output():
    """Head 0 writes 500 into dimensions 4..7, which the published scripts call "head 1"."""
    tl = empty()
    attention = tl.blocks[1].attn
    attention.b_V[0, 2], attention.W_O[0, 2, 5] = 5, 100
    attention.b_V[1, 0], attention.W_O[1, 0, 0] = 1, 0.5
    model = as_model(tl)
    one, two = Ablation("0", heads=((1, 0),)), Ablation("1", heads=((1, 1),))
    clean, without_0, without_1 = curve(model, one, two)
    assert clean[1] > 499
    assert without_0[1] < 3
    assert without_1[1] > 499
    # The rival says the reverse.
    sliced = {}
    for head in (0, 1):
        place = slice(4 * head, 4 * head + 4)

        def cut(out, hook, place=place):
            out = out.clone()
            out[..., place] = 0
            return out

        ids = torch.tensor([TOKENS])
        kept = {}
        readers = edits.read_resid([1], True, kept.__setitem__)
        model.engine.run(
            Start(ids), torch.ones_like(ids), [(hook_names.attn_out(1), cut), *readers]
        )
        sliced[head] = float(largest(kept[1], torch.ones_like(ids)).top[0, 0])
    assert sliced[0] > 499
    assert sliced[1] < 3


@pytest.fixture
def sink():
    """Head 0 looks at the first token and takes nothing from it; head 1 looks at all alike."""
    tl = hooked(n_layers=1, n_heads=2, d_model=17, positional_embedding_type="standard")
    for parameter in tl.parameters():
        parameter.zero_()
    tl.embed.W_E.copy_(torch.eye(17, dtype=torch.float64))
    attention = tl.blocks[0].attn
    attention.b_Q[0, 0], attention.W_K[0, 0, 0] = 100, 1  # token 0 stands first
    attention.W_V[0, 1:] = 1
    attention.W_V[1] = 5
    attention.W_O.normal_()
    return as_model(tl)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sink_attends_and_adds_nothing(sink, batch_size):
    found = study.head_sinks(sink, SAMPLES, batch_size=batch_size)
    uniform = np.mean([np.mean([1 / (q + 1) for q in range(1, n)]) for n in (9, 6, 4)])
    np.testing.assert_allclose(found["uniform_weight"], uniform, rtol=1e-9)
    weight, size = found["first_token_weight"][0], found["head_resid_contrib_norm"][0]
    np.testing.assert_allclose(weight, [1, uniform], rtol=1e-6)
    assert size[0] < 1e-6
    assert size[1] > 1
    # Ranked by attention the sink comes first, by what is added the other one.
    ranked = study.pruned_sets(found["first_token_weight"].values, 1, 0)["top 1 heads"]
    assert ranked == ((0, 0),)
    by_size = study.pruned_sets(found["head_resid_contrib_norm"].values, 1, 0)["top 1 heads"]
    assert by_size == ((0, 1),)


def test_sinks_ignore_padding_on_either_side(sink):
    ids = torch.tensor([[0, 0, 0, 5, 3, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = edits.read_sinks(sink.engine, ids, mask)
    alone = edits.read_sinks(sink.engine, ids[:, 2:], mask[:, 2:])
    torch.testing.assert_close(padded.uniform, alone.uniform)
    torch.testing.assert_close(padded.weight, alone.weight)
    torch.testing.assert_close(padded.contribution, alone.contribution)


def test_largest_leaves_padding_out():
    x = torch.tensor([[[9.0, 9.0], [1.0, -3.0], [2.0, 0.5]]])
    found = largest(x, torch.tensor([[0, 1, 1]]))
    assert found.top.tolist() == [[3, 2, 1]]
    assert (found.pos.item(), found.dim.item(), found.median.item()) == (0, 1, 1)
    assert massive(x, torch.tensor([[0, 1, 1]]), 2.5, 2.0).nonzero().tolist() == [[0, 1, 1]]


def test_noise_is_the_step_of_the_type():
    """float16 steps by 2 at 3000; a change of 2 there is no effect."""
    np.testing.assert_allclose(study.noise_percent(np.array([3000.0]), "fp16"), 100 * 2 / 3000)
    np.testing.assert_allclose(study.noise_percent(np.array([3000.0]), "bf16"), 100 * 16 / 3000)


def test_the_study_on_the_planted_model(planted):
    settings = MassiveSettings(texts="given", least=100.0, ratio=100.0, prune=2, picture_tokens=4)
    run = study.study_massive(planted, study.Inputs(SAMPLES, SAMPLES[:2]), settings)
    assert run["top1"].values.tolist() == [1, SIZE, SIZE]
    assert run.attrs["set_layer"] == 1
    assert run.attrs["has_massive"]
    np.testing.assert_allclose(run["change_percent"].sel(set="all mlps")[1:], -99.8)
    assert (run["change_percent"].sel(set="all heads") == 0).all()
    assert run["picture_before"].shape == (4, 14)
    assert float(run["picture_before"][0, DIM]) == SIZE
    loss = run["loss"].to_series()
    assert loss["massive activations to mean"] == loss["clean"]


@pytest.fixture(scope="module")
def finished(run_cli, shared_data, tmp_path_factory):
    """The command on a real small model and text."""
    flags = ["--model_path", shared_data / "stories260K", "--dtype", "fp32", "--device_map", "cpu"]
    text = shared_data / "wikitext2_test.txt"
    short = tmp_path_factory.mktemp("text") / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    out = tmp_path_factory.mktemp("runs")
    return run_cli(
        "massive", *flags, "--texts", short, "--text_length", 64, "--max_texts", 3,
        "--prune", 4, "--output_dir", out,
    ), [*flags, "--texts", short]  # fmt: skip


def test_files_of_the_command(finished):
    path = finished[0].run_dir
    layers = pd.read_parquet(path / "layers.parquet")
    assert list(layers) == [
        *("layer", "top1", "top2", "top3", "median", "ratio", "top1_pos", "top1_dim")
    ]
    heads = pd.read_parquet(path / "heads.parquet")
    wanted = "layer head first_token_weight uniform_weight head_resid_contrib_norm"
    assert list(heads) == wanted.split()
    assert len(heads) == 40
    assert "Without the top 4 heads" in (path / "summary.md").read_text()
    assert json.loads((path / "meta.json").read_text())["num_processed"] == 3
    for stem in ("layers", "pruning", "makers", "layer_sweep", "heads", "token_by_dimension"):
        assert (path / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
        assert "https://cdn" not in (path / f"{stem}.html").read_text().split("<body>")[0]


def test_its_lists_are_what_ablate_reads(finished, run_cli, tmp_path):
    result, flags = finished
    result = run_cli(
        "ablate", *flags, "--dataset", "none", "--text_length", 64, "--max_texts", 2,
        "--heads", result.run_dir / "top_heads.json", "--output_dir", tmp_path,
    )  # fmt: skip
    table = pd.read_parquet(result.run_dir / "ablation.parquet")
    assert table["set"].tolist()[0] == "clean"
    assert len(table) == 2
    ranked = run_cli(
        "ablate", *flags, "--dataset", "none", "--text_length", 64, "--max_texts", 2,
        "--heads", "top:4", "--run", finished[0].run_dir, "--statistic", "first_token_weight",
        "--output_dir", tmp_path,
    )  # fmt: skip
    again = pd.read_parquet(ranked.run_dir / "ablation.parquet")
    np.testing.assert_allclose(again["loss"], table["loss"])


def test_on_questions_and_on_both(run_cli, small, tmp_path):
    flags = [*small, "--dataset", "arc_challenge", "--max_texts", 2, "--sweep_layers", "false"]
    path = run_cli("massive", *flags, "--output_dir", tmp_path).run_dir
    sets = pd.read_parquet(path / "sets.parquet")
    assert sets["set"][0] == "clean"
    assert sets["accuracy"].between(0, 1).all()
    text = tmp_path / "a.txt"
    text.write_text("Which animal can fly? What melts ice? " * 20)
    both = run_cli("massive", *flags, "--texts", text, "--text_length", 32,
                   "--max_samples", 3, "--output_dir", tmp_path).run_dir  # fmt: skip
    sets = pd.read_parquet(both / "sets.parquet")
    assert list(sets) == ["set", "loss", "perplexity", "accuracy"]
    assert sets.notna().all().all()
    other = pd.read_parquet(both / "layers_other_bos.parquet")
    assert len(other) == 3


def test_without_input(run_cli, tmp_path):
    result = run_cli("massive", "--model_path", tmp_path)
    assert result.code == 2
    assert "expected questions or texts to run on, found neither" in result.error_line
