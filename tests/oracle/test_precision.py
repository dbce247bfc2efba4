"""bf16 and fp16 against float32: ours passes where Hugging Face errs as much; rivals do not."""

import json

import numpy as np
import pytest
import torch
from handmade import llama

from tl_headnorm import load_model, load_questions
from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import short_blocks
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.oracle import hugging_face, precision
from tl_headnorm.oracle.hugging_face import NAMES
from tl_headnorm.settings import Settings

needs_hooked = pytest.mark.skipif(not has_hooked(), reason="rivals are edits of the short blocks")


def prompts(n, vocabulary, longest=40):
    rng = np.random.default_rng(0)
    return [
        Encoded(i, tuple(rng.integers(3, vocabulary, rng.integers(8, longest)).tolist()))
        for i in range(n)
    ]


class Case:
    """A narrow model, prompts, and the errors of Hugging Face in its data type and in float32."""

    def __init__(self, hf_model, samples, token_agg):
        self.model = load_model(hf_model=hf_model, self_check=False)
        self.samples, self.how = samples, {"token_agg": token_agg}
        self.theirs = hugging_face.measure_samples(hf_model, samples, **self.how)
        wide = precision.float32_copy(hf_model)
        self.exact = hugging_face.measure_samples(wide, samples, **self.how)

    def ours(self, **more):
        found = measure_samples(self.model, self.samples, **self.how, **more).values
        return {name: found[name].astype(np.float64) for name in NAMES}

    def passes(self, values):
        """Of validate's two ways to pass neither may let a rival through."""
        tolerance = hugging_face.TOLERANCE[self.model.info.dtype][0]
        direct = all(
            hugging_face.compare(values[n], self.theirs[n])["worst_relative"] <= tolerance
            for n in NAMES
        )
        return direct or all(
            precision.compare_errors(values[n], self.theirs[n], self.exact[n])["passed"]
            for n in NAMES
        )


def wrong_head(case, monkeypatch):
    values = case.ours()
    for value in values.values():
        value[:, 1, [0, 1]] = value[:, 1, [1, 0]]
    return values


def swapped_layer(case, monkeypatch):
    values = case.ours()
    for value in values.values():
        value[:, [0, 1]] = value[:, [1, 0]]
    return values


def swapped_samples(case, monkeypatch):
    values = case.ours()
    for value in values.values():
        value[[0, 1]] = value[[1, 0]]
    return values


def unrotated_key(case, monkeypatch):
    kv_heads, rotate = case.model.info.n_key_value_heads, short_blocks.rotate
    monkeypatch.setattr(
        short_blocks, "rotate",
        lambda x, cos, sin: x if x.shape[2] == kv_heads else rotate(x, cos, sin),
    )  # fmt: skip
    return case.ours(share_prefix=False)


def mask_off_by_one(case, monkeypatch):
    """Every query sees one key too few at the beginning."""
    make = short_blocks._make_layout

    def shifted(attn, mask, n_new):
        layout = make(attn, mask, n_new)
        keys = torch.arange(mask.shape[1])
        first = mask.argmax(1)[:, None]
        layout.allowed = layout.allowed & (keys != first)[:, None, None, :]
        layout.allowed[..., 0, :] |= keys == 0
        return layout

    monkeypatch.setattr(short_blocks, "_make_layout", shifted)
    return case.ours(share_prefix=False)


RIVALS = [wrong_head, swapped_layer, swapped_samples, unrotated_key, mask_off_by_one]


@pytest.fixture(scope="module", params=["last", "all"])
def small_case(request):
    model = llama(dtype=torch.bfloat16)
    return Case(model, prompts(24, model.config.vocab_size), request.param)


@needs_hooked
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
def test_rivals_fail_in_bf16(rival, small_case, monkeypatch):
    assert small_case.passes(small_case.ours())
    assert not small_case.passes(rival(small_case, monkeypatch))


@pytest.fixture(scope="module")
def real_case(smollm2):
    model = load_model(smollm2, dtype="bf16", device_map="cpu", self_check=False)
    questions = load_questions("builtin:questions", max_samples=8)
    encoded = prepare(model.tokenizer, model.n_ctx, questions, Settings()).encoded
    return Case(model.hf, encoded, "last")


@pytest.mark.slow
@needs_hooked
def test_the_real_model_passes_and_rivals_fail(real_case, monkeypatch):
    values = real_case.ours()
    for name in NAMES:  # by float32, where the direct tolerance alone would refuse it
        assert precision.compare_errors(
            values[name], real_case.theirs[name], real_case.exact[name]
        )["passed"]
        worst = hugging_face.compare(values[name], real_case.theirs[name])["worst_relative"]
        assert worst > hugging_face.TOLERANCE["bf16"][0]
    for rival in RIVALS:
        with monkeypatch.context() as patched:
            assert not real_case.passes(rival(real_case, patched)), rival.__name__


@pytest.mark.slow
@needs_hooked
def test_without_a_shared_beginning_bf16_is_hugging_faces_to_the_last_bit(real_case):
    values = real_case.ours(share_prefix=False, sort=False)
    for name in NAMES[:1]:
        assert np.allclose(values[name], real_case.theirs[name], rtol=1e-6)


def test_errors_by_hand():
    exact = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    found = exact * np.array([[[1.1, 1.0]], [[0.9, 1.2]]])
    expected = {
        "median": 0.1,
        "q99": np.quantile([0.1, 0, 0.1, 0.2], 0.99),
        "worst_sample": 0.2,
        "worst_mean": 0.8 / 6,
    }
    assert precision.errors(found, exact) == pytest.approx(expected)
    both = precision.compare_errors(found, found, exact)
    assert both["passed"]
    assert {r["ratio"] for r in both["ratios"].values()} == {1.0}
    assert both["per_layer"]["worst"] == pytest.approx([0.2])


@pytest.mark.parametrize(("n", "passed"), [(4, True), (400, False)])
def test_the_interval_narrows_with_more_samples(n, passed):
    """A median error 1.5 times theirs: chance on 4 samples of one head, not on 400."""
    rng = np.random.default_rng(3)
    exact = np.full((n, 1, 1), 10.0)
    theirs = exact + rng.normal(size=exact.shape) * 0.05
    ours = exact + rng.normal(size=exact.shape) * 0.075
    found = precision.compare_errors(ours, theirs, exact)
    assert found["passed"] == passed
    ratio = found["ratios"]["median"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]


def test_validate_and_collect_say_what_it_costs(run_cli, small, tmp_path):
    flags = [*small, "--dtype", "bf16", "--max_samples", 5, "--output_dir", tmp_path]
    done = run_cli("validate", *flags)
    report = json.loads((done.run_dir / "validation.json").read_text())
    assert set(report["precision"]["measures"]) == set(NAMES)
    assert report["passed"]
    assert "against float32 on the same weights" in done.err
    same = run_cli("validate", *flags, "--reference_dtype", "same")
    path = tmp_path / same.out.splitlines()[-1]
    assert "precision" not in json.loads((path / "validation.json").read_text())
    run = run_cli("collect", *flags, "--validate_samples", 5).run_dir
    found = json.loads((run / "meta.json").read_text())["precision"]
    entry = found["measures"][NAMES[0]]
    assert len(entry["per_layer"]["median"]) == 3
    assert 0 < entry["ours"]["median"] < entry["ours"]["worst_sample"] < 1
    assert "bf16 against fp32" in (run / "report.html").read_text()
    wide = run_cli("collect", *flags, "--validate_samples", 5, "--dtype", "fp32").run_dir
    assert "precision" not in json.loads((wide / "meta.json").read_text())


def test_without_memory_the_note_says_so(run_cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_free", lambda device: 0.0)
    flags = [*small, "--dtype", "bf16", "--max_samples", 3, "--output_dir", tmp_path]
    done = run_cli("validate", *flags)
    assert "not compared with float32 (no memory for it): bf16 alone" in done.err
    forced = run_cli("validate", *flags, "--reference_dtype", "fp32")
    assert "against float32 on the same weights" in forced.err
