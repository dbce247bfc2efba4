"""Ablation: its laws, the sharing that must change nothing, and what the command writes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import as_model, hooked, llama

from tl_headnorm.commands.ablate import ablate as study
from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.data.texts import read_texts, windows
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start
from tl_headnorm.engine.select import engine_of
from tl_headnorm.errors import InputError
from tl_headnorm.interventions import replacements, runner
from tl_headnorm.interventions.edits import Ablation
from tl_headnorm.interventions.intervention import Rows, stack_hooks
from tl_headnorm.interventions.metrics import Letters, NextTokens, Profile
from tl_headnorm.interventions.names import REPLACEMENTS
from tl_headnorm.model.loading import load_model
from tl_headnorm.settings import Settings

LETTERS = (20, 21, 22, 23)
ANSWERS = [0, 3, 1, 2, 2]
EVERY = [(layer, head) for layer in range(3) for head in range(6)]


def prompts(lengths=(9, 6, 12, 7, 6), offset=0):
    rng = np.random.default_rng(3 + offset)
    rows = [tuple(int(t) for t in rng.integers(3, 90, n)) for n in lengths]
    return [Encoded(i, (1, *row), letter_ids=LETTERS) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def model():
    return load_model(hf_model=llama(dtype=torch.float64), self_check=False)


@pytest.fixture(scope="module")
def others(model):
    return replacements.gather_reference(model, prompts((8, 11, 5), offset=9), bank_size=40)


def run(model, ablations, metric=None, reference=None, share=True, **settings):
    settings = Settings(**{"batch_size": 2, **settings})
    return runner.run(
        model, prompts(), ablations, metric or Letters(ANSWERS), reference=reference,
        settings=settings, share=share,
    )  # fmt: skip


def test_nothing_pruned_is_the_identity_bit_for_bit(model):
    none = np.zeros((5, 3, 6), dtype=bool)
    found = run(model, [Ablation("no heads"), Ablation("no masks", masks=none)])
    for values in found.values():
        assert (values[1:] == values[0]).all()
    # The hooks themselves: where another of the stacked rows is changed, these are not.
    rows = Rows.pad(model, prompts(), "right")
    hooks = stack_hooks([[], Ablation("all", heads=tuple(EVERY)).hooks(rows)])
    assert len(hooks) == 3
    plain = model.engine.run(Start(rows.ids.repeat(2, 1)), rows.mask.repeat(2, 1))
    found = model.engine.run(Start(rows.ids.repeat(2, 1)), rows.mask.repeat(2, 1), hooks)
    assert torch.equal(found[:5], plain[:5])
    assert not torch.equal(found[5:], plain[5:])


def test_all_heads_zero_leave_the_output_bias():
    tl = hooked(n_layers=1)
    rows = Rows.pad(as_model(tl), [Encoded(0, (1, 5, 3, 11))], "right")
    hooks = Ablation("all", heads=((0, 0), (0, 1), (0, 2))).hooks(rows)
    resid = rows.model.engine.run(Start(rows.ids), rows.mask, hooks)
    torch.testing.assert_close(resid, tl.embed(rows.ids) + engine_of(tl).b_O(0))
    with tl.hooks(
        fwd_hooks=[(hook_names.attn_out(0), lambda x, hook: 0 * x + engine_of(tl).b_O(0))]
    ):
        torch.testing.assert_close(resid, tl(rows.ids, stop_at_layer=1))


@pytest.mark.parametrize("method", [m for m in REPLACEMENTS if m != "zero"])
def test_the_mean_of_a_constant_is_the_identity(method):
    tl = hooked()
    tl.ln_final = torch.nn.Identity()  # which a model without norms lacks
    for block in tl.blocks:
        block.attn.W_V.zero_()  # z is b_V at every token
    model = as_model(tl)
    samples = [Encoded(i, (1, 5, 3, 11)[:n], letter_ids=(2, 4, 6)) for i, n in enumerate((4, 3))]
    others = replacements.gather_reference(model, samples, bank_size=5)
    every = tuple((layer, head) for layer in range(2) for head in range(3))
    found = runner.run(
        model, samples, [Ablation("all", method, every), Ablation("all", "zero", every)],
        Letters([0, 1]), reference=others,
    )["loss"]  # fmt: skip
    np.testing.assert_allclose(found[1], found[0], rtol=1e-7)
    assert (np.abs(found[2] - found[0]) > 1e-3).all()  # zero is no such mean


def test_the_reference_is_the_plain_mean_of_z(model, others):
    ones = [
        (torch.tensor([s.ids]), torch.ones(1, len(s), dtype=torch.long))
        for s in prompts((8, 11, 5), offset=9)
    ]
    rows = [model.engine.run_z(ids, mask).z for ids, mask in ones]
    for layer in range(3):
        tokens = torch.cat([z[layer][0] for z in rows])
        torch.testing.assert_close(others.mean[layer], tokens.mean(0))
        torch.testing.assert_close(others.std[layer], tokens.std(0, correction=0))
        fourth = torch.stack([z[layer][0, 3] for z in rows]).mean(0)
        torch.testing.assert_close(others.by_position[layer][3], fourth)
        # Every entry of the bank is z at some token.
        gaps = (others.bank[layer][:, None] - tokens[None]).abs().amax((2, 3))
        assert (gaps.min(1).values < 1e-12).all()


def ablations_of_every_kind():
    masks = np.random.default_rng(0).random((5, 3, 6)) < 0.3
    return [
        *(Ablation(f"{m}", m, ((1, 2),)) for m in REPLACEMENTS),
        *(Ablation(f"{m} more", m, ((1, 4), (2, 0))) for m in REPLACEMENTS),
        Ablation("first", heads=((0, 0),)),
        Ablation("last layer", heads=((2, 5),)),
        Ablation("mlp", mlps=(1,)),
        Ablation("both", heads=((0, 3),), mlps=(0, 2)),
        Ablation("per input", "mean", masks=masks),
    ]


@pytest.mark.parametrize("metric", [Letters(ANSWERS), NextTokens()], ids=["letters", "tokens"])
def test_sharing_changes_nothing(model, others, metric):
    """Every kind of ablation by itself, whole model, one sample at a time."""
    ablations = ablations_of_every_kind()
    metric = Profile(metric)
    plain = run(model, ablations, metric, batch_size=1, max_batch_tokens=1, share=False,
                reference=others)  # fmt: skip
    for settings in (
        {"batch_size": 3},
        {"batch_size": 5, "padding_side": "left"},
        {"batch_size": 2, "max_batch_tokens": 60},
    ):
        for one in (metric, metric.other):
            shared = run(model, ablations, one, reference=others, **settings)
            for name, values in shared.items():
                np.testing.assert_allclose(values, plain[name], rtol=1e-7, atol=1e-9)
    assert (np.abs(plain["loss"][1:] - plain["loss"][0]).max(1) > 1e-6).all()


def test_one_head_against_hugging_face(model):
    """Zeroing o_proj's input in Hugging Face's own model gives the same answer distribution."""
    found = run(model, [Ablation("1.2", heads=((1, 2),))])
    width = model.info.d_head

    def drop(module, args):
        z = args[0].clone()
        z[..., 2 * width : 3 * width] = 0
        return (z,)

    def letters():
        ids = [torch.tensor([s.ids]) for s in prompts()]
        return torch.stack([model.hf(i).logits[0, -1, list(LETTERS)].log_softmax(-1) for i in ids])

    clean = letters()
    handle = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(drop)
    try:
        changed = letters()
    finally:
        handle.remove()
    for row, logp in enumerate((clean, changed)):
        loss = -logp[torch.arange(5), ANSWERS]
        np.testing.assert_allclose(found["loss"][row], loss, rtol=1e-6)
        np.testing.assert_array_equal(
            found["correct"][row], logp.argmax(1) == torch.tensor(ANSWERS)
        )
    kl = (clean.exp() * (clean - changed)).sum(1)
    np.testing.assert_allclose(found["kl"][1], kl, rtol=1e-5, atol=1e-9)
    assert (found["kl"][0] == 0).all()


def test_fewer_options_are_not_padded_into_the_distribution(model):
    samples = [
        Encoded(0, (1, 5, 6), letter_ids=LETTERS[:3]),
        Encoded(1, (1, 7), letter_ids=LETTERS),
    ]
    both = runner.run(model, samples, [Ablation("a", heads=((0, 0),))], Letters([1, 3]))
    alone = runner.run(model, samples[:1], [Ablation("a", heads=((0, 0),))], Letters([1]))
    for name in ("loss", "kl"):
        np.testing.assert_allclose(both[name][:, :1], alone[name], rtol=1e-9)


def test_masks_per_input_and_a_static_set_are_different_experiments(model):
    values = np.ones((5, 3, 6))
    values[0, 1, 2] = 0.1  # weak on one input, strong on average
    values[:, 2, 4] = 0.2  # weak on all
    own, static = study.threshold_sets(values, 0.5, "head_output_norm", relative=False)
    assert own.name.startswith("per input: ")
    assert static.name.startswith("static: ")
    assert static.heads == ((2, 4),)
    assert own.masks is not None
    assert own.masks.sum() == 6
    assert own.masks[0, 1, 2]
    found = run(model, [own, static])["loss"]
    np.testing.assert_allclose(found[1, 1:], found[2, 1:])
    assert abs(found[1, 0] - found[2, 0]) > 1e-9


def test_reference_samples_are_never_the_evaluated_ones():
    data = study.split_reference(prompts(), 2)
    assert [s.index for s in data.samples] == [0, 1, 2]
    assert [s.index for s in data.reference] == [3, 4]
    same = study.split_reference(prompts(), 0)
    assert same.reference is same.samples


def test_sharing_is_measured_against_one_forward_per_head_and_sample(model):
    measured = study.sharing_ratio(model, prompts(), ANSWERS)
    assert measured["n_heads"] == 18
    assert measured["worst_loss_difference"] < 1e-9
    assert measured["ratio"] > 1


def test_a_small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=30, n_layer=3, n_head=5, initializer_range=0.3
    )
    gpt2 = load_model(hf_model=GPT2LMHeadModel(config).double().eval(), self_check=False)
    every = tuple((layer, head) for layer in range(3) for head in range(5))
    ablations = [
        Ablation("1.2", heads=((1, 2),)),
        Ablation("mlp", mlps=(1,)),
        Ablation("all", heads=every),
    ]
    plain = run(gpt2, ablations, batch_size=1, max_batch_tokens=1, share=False)
    shared = run(gpt2, ablations, Profile(Letters(ANSWERS)))
    np.testing.assert_allclose(shared["loss"], plain["loss"], rtol=1e-7)
    ids = torch.tensor([prompts()[0].ids])
    logp = gpt2.hf(ids).logits[0, -1, list(LETTERS)].log_softmax(-1)
    np.testing.assert_allclose(plain["loss"][0, 0], -logp[ANSWERS[0]].item(), rtol=1e-7)


def test_methods_by_commas():
    assert AblateSettings(method="zero, mean").methods == ("zero", "mean")
    with pytest.raises(InputError, match="unknown method 'men'; did you mean 'mean'"):
        AblateSettings(method="men")


DESIGNED = {
    *("num_processed", "num_skipped", "num_truncated", "num_tokens", "missing_layers"),
    *("accuracy", "model", "dataset", "template", "prepend_bos", "padding_side", "token_agg"),
    *("versions", "git_commit", "validated_against_hf", "wall_seconds", "tokens_per_second"),
    *("peak_memory_bytes", "seed", "started_at", "finished_at"),
}
COLUMNS = [
    *("set", "method", "layer", "head", "n_samples"),
    *("accuracy", "accuracy_drop", "loss", "loss_delta", "kl"),
]


def test_files_of_the_command(run_cli, small, tmp_path):
    result = run_cli(
        "ablate", *small, "--method", "zero,mean,resample", "--layers", "0-1", "--mlps", "sweep",
        "--heads", "sweep",
        "--reference_samples", 3, "--input_threshold", 0.8, "--profile", "--time_sharing", 2,
        "--output_dir", tmp_path,
    )  # fmt: skip
    path = result.run_dir
    table = pd.read_parquet(path / "ablation.parquet")
    assert list(table) == COLUMNS
    assert table.iloc[0][["set", "method", "layer", "head"]].tolist() == ["clean", "none", -1, -1]
    assert (table["n_samples"] == 4).all()  # seven questions, three of them the reference
    assert (table["head"] >= 0).sum() == 3 * 2 * 6
    assert table["set"].str.startswith("per input: ").sum() == 3
    assert table["set"].str.startswith("static: ").sum() >= 1
    assert table[table["set"] == "mlp 1"][["method", "layer", "head"]].values.tolist() == [
        ["zero", 1, -1]
    ]
    np.testing.assert_allclose(table["accuracy_drop"], table["accuracy"][0] - table["accuracy"])
    assert "3 other samples, none of them evaluated" in (path / "summary.md").read_text()
    meta = json.loads((path / "meta.json").read_text())
    assert meta["sharing"]["n_samples"] == 2
    assert set(meta) >= DESIGNED
    assert meta["sharing"]["worst_loss_difference"] < 1e-4
    profile = pd.read_parquet(path / "profile.parquet")
    assert len(profile) == 3 * len(table)
    for name in ("sweep_loss_delta.png", "sweep_loss_delta.html", "sets_loss_delta.png",
                 "meta.json", "config.json", "per_sample.npz"):  # fmt: skip
        assert (path / name).stat().st_size > 100


def test_components_side_by_side(run_cli, small, tmp_path):
    result = run_cli("ablate", *small, "--experiment", "components", "--output_dir", tmp_path)
    table = pd.read_parquet(result.run_dir / "ablation.parquet")
    assert table["set"].tolist() == [
        "clean", "all heads", "all mlps",
        *(f"heads of layer {i}" for i in range(3)), *(f"mlp {i}" for i in range(3)),
    ]  # fmt: skip
    for row, what in enumerate(("--heads", "--mlps"), 1):
        alone = run_cli("ablate", *small, what, "all", "--output_dir", tmp_path)
        again = pd.read_parquet(alone.run_dir / "ablation.parquet")
        assert again["set"].tolist() == ["clean", table["set"][row]]
        np.testing.assert_allclose(again["loss"], table["loss"][[0, row]], rtol=1e-5)


def test_top_heads_of_a_run(run_cli, small, finished, tmp_path):
    flags = ["--heads", "top:2", "--run", finished, "--output_dir", tmp_path]
    result = run_cli("ablate", *small, *flags)
    table = pd.read_parquet(result.run_dir / "ablation.parquet")
    assert table["set"].tolist() == ["clean", "top:2 by head_resid_contrib_norm_mean"]
    refused = run_cli("ablate", *small, *flags, "--statistic", "head_output_norm_men")
    assert refused.code == 2
    assert "did you mean 'head_output_norm_mean'?" in refused.error_line


def test_the_built_in_model_has_heads_it_needs_and_heads_it_does_not(run_cli, tmp_path):
    from tl_headnorm.builtin import model_dir, questions_dir

    result = run_cli(
        "ablate", "--model_path", model_dir(), "--dtype", "fp32", "--device_map", "cpu",
        "--dataset", "multiple_choice", "--data_dir", questions_dir() / "test.jsonl",
        "--max_samples", 24, "--layers", "0", "--method", "zero,mean,resample",
        "--output_dir", tmp_path,
    )  # fmt: skip
    table = pd.read_parquet(result.run_dir / "ablation.parquet")
    assert table["accuracy"][0] > 0.9
    for method in ("zero", "mean", "resample"):
        drops = table[table["method"] == method]["accuracy_drop"]
        assert drops.max() > 0.2
        assert (drops <= 0).any()


def test_perplexity_of_the_clean_model_is_hugging_face_s(shared_data, tmp_path):
    model = load_model(shared_data / "stories260K", dtype="fp32", device_map="cpu")
    short = tmp_path / "short.txt"
    text = (shared_data / "wikitext2_test.txt").read_text(encoding="utf-8")
    short.write_text(text[:4000], encoding="utf-8")
    rows = windows(read_texts(short), model.tokenizer, length=96, most=6)
    assert [row.ids[0] for row in rows] == [1] * len(rows)
    data = study.Data(rows, rows)
    found = study.ablate(model, data, AblateSettings(texts="given", dataset="none", heads="0.0"))
    total = count = 0
    for row in rows:
        ids = torch.tensor([row.ids])
        total += model.hf(ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    assert float(found["perplexity"][0]) == pytest.approx(np.exp(total / count), rel=1e-4)
    assert float(found["perplexity"][1]) != float(found["perplexity"][0])


def test_text_alone(run_cli, small, shared_data, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "What melts ice?"}\n"Which animal can fly?"\n')
    flags = [*small, "--dataset", "none", "--texts", texts, "--output_dir", tmp_path]
    result = run_cli("ablate", *flags, "--heads", "all", "--reference_samples", 0)
    table = pd.read_parquet(result.run_dir / "ablation.parquet")
    assert table["accuracy"].isna().all()
    assert table["n_samples"].tolist() == [2, 2]
    text = pd.read_parquet(result.run_dir / "perplexity.parquet")
    np.testing.assert_allclose(text["perplexity"], np.exp(table["loss"]))
    refused = run_cli("ablate", *small, "--dataset", "none")
    assert "expected questions or texts to run on, found neither" in refused.error_line
