"""The bench: its file, its agreement check, and our ways to be fast as counts of work."""

import json

import numpy as np
import pytest

from tl_headnorm.commands.bench import side_by_side as bench
from tl_headnorm.commands.bench.contenders import CONTENDERS
from tl_headnorm.commands.bench.studies import STUDIES
from tl_headnorm.data.plan import plan_batches, prefix_groups
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformer_lens")


def test_the_default_workload_is_arc_challenge():
    samples = bench.workload(10_000, 128_256, seed=0)
    assert len(samples) == 1168
    lengths = [len(sample) for sample in samples]
    assert (min(lengths), max(lengths)) == (80, 247)
    assert np.mean(lengths) == pytest.approx(119.8, abs=0.05)
    assert len({sample.ids[:49] for sample in samples}) == 1
    assert len({sample.ids[:50] for sample in samples}) > 100


def test_prefix_and_sorting_halve_the_positions():
    """The designed saving, as a count: no clock."""
    samples = bench.workload(1168, 128_256, seed=0)
    padded = sum(
        max(len(s) for s in samples[i : i + 8]) * len(samples[i : i + 8])
        for i in range(0, len(samples), 8)
    )
    ours = 0
    for group in prefix_groups(samples):
        ours += group.prefix_length
        for batch in plan_batches(group, 8, 10**9):
            ours += len(batch) * (max(map(len, batch)) - group.prefix_length)
    assert padded / ours > 2.1


def test_bench_writes_what_it_promises(run_cli, tmp_path):
    names = [n for n, c in CONTENDERS.items() if n != "nnsight" and c.by_default()]
    result = run_cli(
        "bench", "--model_path", "builtin:tiny", "--dtype", "fp32", "--samples", "12",
        "--repeats", "2", "--dataset", "builtin:questions", "--output_dir", tmp_path,
        "--contenders", json.dumps(names),
    )  # fmt: skip
    assert result.code == 0
    path = tmp_path / result.out.splitlines()[-1]
    report = json.loads((path / "bench.json").read_text())
    assert set(report) >= {"machine", "workload", "contenders"}
    assert set(report["contenders"]) == set(names)
    for name, row in report["contenders"].items():
        low, high = row["spread"]
        assert low <= row["samples_per_second"] <= high
        assert row["tokens_per_second"] > row["samples_per_second"]
        assert row["load_seconds"] > 0
        assert row["ratio_to_hf_forward"] > 0
        if name not in ("hf_forward", "hf_eager"):
            assert row["worst_relative_difference"] < 1e-4
    assert report["contenders"]["hf_forward"]["ratio_to_hf_forward"] == 1
    assert (path / "bench.png").stat().st_size > 10_000


def test_a_contender_that_disagrees_is_an_error():
    rng = np.random.default_rng(0)
    truth = {"head_output_norm last": rng.random((3, 2, 4)) + 1}
    wrong = {"head_output_norm last": truth["head_output_norm last"] * 1.01}
    assert bench.check_agreement({"hf_hooks": truth, "ours_last": truth}, "fp32")
    with pytest.raises(InputError, match="expected ours_last to agree"):
        bench.check_agreement({"hf_hooks": truth, "ours_last": wrong}, "fp32")


@pytest.mark.parametrize("task", list(STUDIES))
def test_studies_side_by_side(task, run_cli, tmp_path):
    """Every contender of a task gives the same values, on real prompts of unequal length."""
    result = run_cli(
        "bench", "--task", task, "--model_path", "builtin:tiny", "--dtype", "fp32", "--samples", 3,
        "--repeats", 1, "--dataset", "builtin:questions", "--batch_size", 2,
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert result.code == 0
    assert "x tl_loop" in result.err
    report = json.loads((tmp_path / result.out.splitlines()[-1] / "bench.json").read_text())
    assert (report["base"], report["workload"]["task"]) == ("tl_loop", task)
    assert set(report["contenders"]) == set(STUDIES[task])
    for row in report["contenders"].values():
        assert row["worst_relative_difference"] < 1e-3
        assert row["ratio_to_tl_loop"] > 0


def test_studies_of_made_up_prompts():
    """A random LLaMA and random tokens: letters and answers are made up, the same for all."""
    from handmade import llama

    from tl_headnorm import load_model
    from tl_headnorm.commands.bench import contenders
    from tl_headnorm.commands.bench.settings import BenchSettings
    from tl_headnorm.data.tokens import Encoded

    model = load_model(hf_model=llama(), self_check=False)
    samples = [Encoded(i, tuple(range(7, 15 + i))) for i in (2, 0, 1)]
    for task, known in STUDIES.items():
        given = contenders.Bench(model, BenchSettings(task=task, batch_size=2), 0.0)
        found = {name: contender.open(given)(samples) for name, contender in known.items()}
        assert max(bench.check_agreement(found, "fp32", task).values()) < 1e-3
        (key,) = found["ours"]
        assert found["ours"][key].shape == (3, 3, 6)
        # The rival takes every head for its neighbour, and is refused.
        wrong = {"ours": found["ours"], "rival": {key: np.roll(found["ours"][key], 1, axis=2)}}
        with pytest.raises(InputError, match="expected rival to agree"):
            bench.check_agreement(wrong, "fp32", task)


@pytest.mark.slow
@pytest.mark.skipif(not has_hooked(), reason="a bridge's own steps outweigh a tiny model's")
def test_joint_integral_is_faster_than_a_loop_over_steps():
    """CPU time of this process, so that what else the machine does counts little.

    `bench --task attribution` measures the ratio; this keeps it from falling unseen."""
    import time

    import torch

    from tl_headnorm.commands.bench.contenders import open_bench
    from tl_headnorm.commands.bench.settings import BenchSettings

    settings = BenchSettings(
        task="attribution", model_path="builtin:tiny", dtype="fp32", samples=32,
        dataset="builtin:questions",
    )  # fmt: skip
    opened = open_bench(settings)
    runs = {name: STUDIES["attribution"][name].open(opened) for name in ("tl_loop", "ours")}
    seconds = dict.fromkeys(runs, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other count as busy
    for _ in range(3):
        for name, run in runs.items():
            start = time.process_time()
            run(opened.samples)
            seconds[name] = min(seconds[name], time.process_time() - start)
    torch.set_num_threads(threads)
    print(f"\n8 steps, 32 samples: {seconds}, {seconds['tl_loop'] / seconds['ours']:.2f}")
    assert seconds["tl_loop"] > 1.6 * seconds["ours"]


def test_unknown_contenders_are_named(run_cli, tmp_path):
    result = run_cli("bench", "--contenders", '["our_last"]', "--output_dir", tmp_path)
    assert result.code == 2
    assert "did you mean 'ours_last'" in result.err


def test_resident_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """Per-sample values stream to disk: eight times the samples, the same memory."""
    import gc
    import shutil

    from handmade import llama

    from tl_headnorm import load_model
    from tl_headnorm.commands.collect.collect import measure_samples
    from tl_headnorm.data.tokens import Encoded
    from tl_headnorm.run.log import OnDisk

    model = load_model(hf_model=llama(num_hidden_layers=8, num_attention_heads=42, head_dim=4))
    shape = (model.info.n_layers, model.info.n_heads)
    tokens = tuple(range(3, 15))

    def grown(n):
        prompts = [Encoded(i, tokens) for i in range(n)]
        folder = tmp_path / str(n)
        folder.mkdir(exist_ok=True)
        log = OnDisk(folder, every=0.0)
        gc.collect()
        with bench.PeakMemory(model.device) as memory:
            measure_samples(model, prompts, batch_size=64, log=log)
        shutil.rmtree(folder)
        return memory.peak

    grown(1000)
    few, many = grown(1000), grown(8000)
    kept = 2 * 4 * 7000 * shape[0] * shape[1]  # what 7,000 more samples hold where they are kept
    assert many - few < 0.5 * kept
