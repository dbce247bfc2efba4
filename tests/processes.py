"""Real processes for the tests of interruptions: forked from one that has imported everything.

A command line then costs what it computes, not the seconds of its imports, so that many can be
killed. (A test of one true `python -m tl_headnorm` stands beside every kind.)
"""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tl_headnorm.commands.collect.command", "tl_headnorm.cli", "torch.distributed",
     "transformer_lens",
     "transformers.models.llama.modeling_llama", "matplotlib.pyplot"]
)  # fmt: skip


def _main(arguments, environment, out, err):
    """In the forked process: what `python -m tl_headnorm ARGUMENTS` does."""
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from tqdm import tqdm

    from tl_headnorm.cli import main

    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    sys.exit(main(arguments))


class Command:
    """A command line at work in a process of its own."""

    def __init__(self, folder: Path, *arguments, environment=None, name="0"):
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = folder / f"{name}.out", folder / f"{name}.err"
        for path in (self.stdout, self.stderr):
            path.write_text("")
        given = ([str(a) for a in arguments], environment or {}, self.stdout, self.stderr)
        self.process = FORKS.Process(target=_main, args=given)
        self.process.start()

    @property
    def out(self):
        return self.stdout.read_text()

    @property
    def err(self):
        return self.stderr.read_text()

    def wait(self, seconds=60):
        """The exit code: negative where a signal ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs after {seconds} s: {self.err[-2000:]}")
        return self.process.exitcode

    def signal(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)


STATE = ".state"
# 260 batches of one prompt each.
BUILT_IN = ("collect", "--model_path", "builtin:tiny", "--dataset", "builtin:questions",
            "--dtype", "fp32", "--device_map", "cpu", "--batch_size", 1,
            "--max_samples", 260, "--self_check", "false")  # fmt: skip


def batches_done(run_dir):
    """Batches that the segments of a run hold."""
    total = 0
    for path in (run_dir / STATE).glob("[0-9]*.npz"):
        with suppress(FileNotFoundError), np.load(path) as stored:  # the run has just ended
            total += len(stored["_units"])
    return total


def only_run(folder):
    """The one run directory in a folder, or None before it is there."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    assert len(found) < 2
    return found[0] if found else None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(folder, world, *arguments):
    """What torchrun starts: `world` processes that find each other through the environment."""
    port = str(free_port())
    return [
        Command(
            folder, *arguments, name=str(rank),
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(world)
    ]  # fmt: skip


def wait_for(condition, seconds=60):
    """Look every few milliseconds until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


TIMES = ("wall_seconds", "tokens_per_second", "peak_memory_bytes", "started_at", "finished_at",
         "processes", "sessions")  # fmt: skip


def assert_same_run(found, truth, *, exactly=True):
    """The files of two runs say the same; moments to 1e-12 where they were merged."""
    names = [
        {p.name for p in path.iterdir() if p.suffix not in (".html", ".png")}
        for path in (found, truth)
    ]
    assert names[0] == names[1]
    metas = [json.loads((path / "meta.json").read_text()) for path in (found, truth)]
    for meta in metas:
        assert all(meta.pop(name) is not None for name in TIMES)
    assert metas[0] == metas[1]
    samples = [pd.read_parquet(path / "samples.parquet") for path in (found, truth)]
    pd.testing.assert_frame_equal(*samples)
    with np.load(found / "per_sample.npz") as ours, np.load(truth / "per_sample.npz") as theirs:
        for name in theirs.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
    with np.load(found / "moments.npz") as ours, np.load(truth / "moments.npz") as theirs:
        for name in theirs.files:
            if name.endswith("_n"):
                assert (ours[name] == metas[0]["num_processed"]).all()
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0 if exactly else 1e-11)
    for path in truth.glob("*.npy"):
        np.testing.assert_allclose(
            np.load(found / path.name), np.load(path), rtol=0 if exactly else 1e-12
        )
