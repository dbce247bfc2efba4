"""Side-by-side throughput: the same prompts through every contender, interleaved, as ratios."""

import ctypes
import gc
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tl_headnorm.commands.bench.contenders import CONTENDERS, Bench, Contender, Values, open_bench
from tl_headnorm.commands.bench.settings import BenchSettings
from tl_headnorm.commands.bench.studies import STUDIES, STUDY_TOLERANCE
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError, unknown
from tl_headnorm.oracle.hugging_face import TOLERANCE, compare
from tl_headnorm.run import results

WORKLOAD = Path(__file__).parent / "workloads" / "arc_challenge_llama3.json"


# Prompts on which the contenders must agree, and warm up, before they are timed: in batches.
COMPARED_BATCHES = 4


def workload(n_samples: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Random tokens with the lengths and the shared prefix of ARC-Challenge's real prompts."""
    stored = json.loads(WORKLOAD.read_text())
    lengths = stored["lengths"][:n_samples]
    rng = np.random.default_rng(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocabulary, n).tolist())

    prefix = draw(stored["prefix"])
    return [Encoded(i, prefix + draw(n - len(prefix))) for i, n in enumerate(lengths)]


class PeakMemory:
    """Most memory held inside the block, above what was held when it began."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        trim_heap()
        self.before, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident_bytes() - self.before)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Hand freed memory back, so that one contender does not hide in what another left."""
    if platform.system() == "Linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library: figures only get coarser
            return


def of_largest(found: np.ndarray, reference: np.ndarray) -> float:
    """Worst difference as a share of the reference's largest value."""
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def of_each(found: np.ndarray, reference: np.ndarray) -> float:
    """Worst difference relative to the value itself."""
    return float(compare(found, reference)["worst_relative"])


def check_agreement(
    found: Mapping[str, Values], dtype: str, task: str = "norms"
) -> dict[str, float]:
    """Worst relative difference of every contender to the reference; InputError beyond it.

    The reference is `hf_hooks` where it runs, else the first contender that gives values. Scores
    of heads are compared by the largest of them: many are zero but for rounding.
    """
    with_values = {name: values for name, values in found.items() if values}
    if not with_values:
        return {}
    reference = with_values.get("hf_hooks") or next(iter(with_values.values()))
    norms = task == "norms"
    tolerance = TOLERANCE[dtype][0] if norms else STUDY_TOLERANCE[dtype]
    differ, worst = of_each if norms else of_largest, {}
    for name, values in with_values.items():
        shared = values.keys() & reference.keys()
        worst[name] = max((differ(values[key], reference[key]) for key in shared), default=0.0)
        if worst[name] > tolerance:
            raise InputError(
                f"bench: expected {name} to agree with the others within {tolerance:g}, found a "
                f"relative difference of {worst[name]:.2g}; its speed would mean nothing"
            )
    return worst


def contenders_of(task: str) -> Mapping[str, Contender]:
    """The ways to one task's numbers; the first is what throughput is divided by."""
    return CONTENDERS if task == "norms" else STUDIES[task]


def run_bench(settings: BenchSettings) -> dict[str, Any]:
    """Run the contenders on the same prompts, `repeats` times in turn; what bench.json holds."""
    known = contenders_of(settings.task)
    names = settings.contenders or [n for n, c in known.items() if c.by_default()]
    for name in names:
        if name not in known:
            raise unknown("contender", name, known)
    bench = open_bench(settings)
    samples = bench.samples or workload(settings.samples, bench.model.tl.cfg.d_vocab, settings.seed)
    runs, loads = {}, {}
    for name in names:
        clock = time.perf_counter()
        runs[name] = known[name].open(bench)
        loads[name] = time.perf_counter() - clock + bench.hf_load_seconds
    few = samples[: COMPARED_BATCHES * settings.batch_size]
    first = {name: run(few) for name, run in tqdm(runs.items(), unit="run", desc="compare")}
    differences = check_agreement(first, bench.model.info.dtype, settings.task)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    rounds = [name for _ in range(settings.repeats) for name in names]
    for name in tqdm(rounds, unit="run", desc="bench"):
        with PeakMemory(bench.model.device) as memory:
            seconds[name].append(_timed(runs[name], samples, bench))
        peaks[name] = max(peaks[name], memory.peak)
    report = _report(bench, samples, seconds, peaks, loads, differences)
    report["workload"]["source"] = settings.data_dir or WORKLOAD.name
    return report


def _timed(run: Any, samples: Sequence[Encoded], bench: Bench) -> float:
    _wait(bench)
    clock = time.perf_counter()
    run(samples)
    _wait(bench)
    return time.perf_counter() - clock


def _wait(bench: Bench) -> None:
    if bench.model.device.type == "cuda":
        torch.cuda.synchronize(bench.model.device)


def _report(
    bench: Bench,
    samples: Sequence[Encoded],
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    loads: Mapping[str, float],
    differences: Mapping[str, float],
) -> dict[str, Any]:
    tokens = sum(len(sample) for sample in samples)
    reference = next(iter(contenders_of(bench.settings.task)))
    base = seconds.get(reference)
    rows = {}
    for name, times in seconds.items():
        # Ratios are taken round by round: what slows the machine slows neighbours alike.
        ratios = [b / t for b, t in zip(base, times, strict=True)] if base else None
        rows[name] = {
            "samples_per_second": len(samples) / median(times),
            "spread": [len(samples) / max(times), len(samples) / min(times)],
            "tokens_per_second": tokens / median(times),
            "peak_memory_above_weights_bytes": peaks[name],
            f"ratio_to_{reference}": median(ratios) if ratios else None,
            "load_seconds": loads[name],
            "worst_relative_difference": differences.get(name),
        }
    info = bench.model.info
    return {
        "machine": machine(bench.model.device),
        "base": reference,
        "workload": {
            "task": bench.settings.task,
            "model": info.as_dict(),
            "samples": len(samples),
            "tokens": tokens,
            "batch_size": bench.settings.batch_size,
            "repeats": bench.settings.repeats,
        },
        "versions": results.versions(),
        "contenders": rows,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Name and size of what the figures were taken on."""
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report as a table of at most 80 columns."""
    head = f"{'contender':<17}{'samples/s':>10}{'min':>8}{'max':>8}{'tokens/s':>10}"
    base = report["base"]
    head += f"{'peak MiB':>10}{'x ' + base.removeprefix('hf_'):>11}"
    lines = [head]
    for name, row in report["contenders"].items():
        ratio = row[f"ratio_to_{base}"]
        low, high = row["spread"]
        lines.append(
            f"{name:<17}{row['samples_per_second']:>10.2f}{low:>8.2f}{high:>8.2f}"
            f"{row['tokens_per_second']:>10,.0f}"
            f"{row['peak_memory_above_weights_bytes'] / 2**20:>10,.0f}"
            + (f"{ratio:>11.2f}" if ratio else f"{'':>11}")
        )
    return "\n".join(lines)
