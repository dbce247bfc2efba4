"""Several processes give what one gives, whatever their number and whatever becomes of them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import (
    BUILT_IN,
    Command,
    assert_same_run,
    batches_done,
    free_port,
    only_run,
    wait_for,
)
from processes import ranks as start_ranks

from tl_headnorm.commands import table
from tl_headnorm.data.plan import Group, Planned
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.run import ranks
from tl_headnorm.run.log import OnDisk, Work
from tl_headnorm.run.ranks import Ranks, device_for
from tl_headnorm.run.segments import Column
from tl_headnorm.stats import Moments

# 31 batches in two groups: no number of processes below divides them.
TWOS = (*BUILT_IN, "--batch_size", 2, "--max_samples", 61)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    command = Command(folder, *TWOS, "--output_dir", folder / "out")
    assert command.wait() == 0, command.err
    return only_run(folder / "out")


def processes_of(run_dir):
    return json.loads((run_dir / "meta.json").read_text())["processes"]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_many_processes_equal_one(world, tmp_path, alone):
    commands = start_ranks(tmp_path, world, *TWOS, "--output_dir", tmp_path / "out")
    assert [command.wait() for command in commands] == [0] * world, commands[0].err
    run = only_run(tmp_path / "out")
    assert_same_run(run, alone, exactly=False)
    assert processes_of(run) == world
    assert [command.out for command in commands] == [f"{run}\n"] + [""] * (world - 1)
    assert "sample/s" in commands[0].err
    assert [command.err for command in commands[1:]] == [""] * (world - 1)


def test_more_processes_than_batches(tmp_path, small):
    """Three batches for four processes: one gets nothing."""
    arguments = ["collect", *small]
    whole = Command(tmp_path, *arguments, "--output_dir", tmp_path / "one")
    assert whole.wait() == 0, whole.err
    commands = start_ranks(tmp_path, 4, *arguments, "--output_dir", tmp_path / "four")
    assert [command.wait() for command in commands] == [0] * 4
    assert_same_run(only_run(tmp_path / "four"), only_run(tmp_path / "one"), exactly=False)


class InTurn(Ranks):
    """Ranks that take turns in one process: all begin before any measures."""

    def all_gather(self, value):
        return [value] * self.world_size

    def broadcast(self, make):
        return make()

    def agree(self, work):
        return work()

    def barrier(self, timeout=None):
        pass


def test_shares_are_alike():
    """Every batch once; long ones, which come first, are not all one process's."""
    group = Group((), 0)
    plan = [Planned(i, group, (Encoded(i, (0,) * (100 - i)),)) for i in range(100)]
    shares = []
    for rank in range(3):
        log = OnDisk(Path("nowhere"), ranks=InTurn(rank, 3))
        log.done = set(range(0, 100, 7))
        shares.append(log.missing(plan))
    numbers = sorted(p.number for share in shares for p in share)
    assert numbers == [i for i in range(100) if i % 7]
    tokens = [sum(len(p.samples[0]) for p in share) for share in shares]
    assert max(tokens) < 1.05 * min(tokens)
    halves = [numbers[:28], numbers[28:56], numbers[56:]]  # the rival: ranges
    loads = [sum(100 - n for n in half) for half in halves]
    assert max(loads) > 1.5 * min(loads)


def launched(tmp_path, *command, timeout=180):
    """A true launcher's exit code, stdout and stderr."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, cwd=tmp_path
    )
    return done.returncode, done.stdout, done.stderr


def test_accelerate_launch(tmp_path, alone):
    code, out, err = launched(
        tmp_path, BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 3,
        "--main_process_port", free_port(), "-m", "tl_headnorm", *TWOS, "--output_dir", "out",
    )  # fmt: skip
    assert code == 0, err
    run = only_run(tmp_path / "out")
    assert out == f"out/{run.name}\n"
    assert processes_of(run) == 3
    assert_same_run(run, alone, exactly=False)


def test_accelerate_launch_without_a_gpu_starts_one_process_and_that_is_said(tmp_path, small):
    """Without GPUs it takes `--num_processes 3` for one; this is the environment it makes."""
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}
    command = Command(tmp_path, "collect", *small, "--output_dir", tmp_path / "out",
                      environment=alone)  # fmt: skip
    assert command.wait() == 0, command.err
    assert "accelerate started one process; without several GPUs it takes --mul" in command.err
    assert processes_of(only_run(tmp_path / "out")) == 1


def test_torchrun_ends_with_a_killed_process_and_one_resumes(tmp_path, alone):
    out = tmp_path / "out"
    arguments = [*TWOS, "--checkpoint_every", 0, "--output_dir", "out"]
    launcher = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [str(a) for a in (*launcher, "-m", "tl_headnorm", *arguments)],
            stdout=subprocess.DEVNULL, stderr=err, cwd=tmp_path,
        )  # fmt: skip
    wait_for(lambda: only_run(out) and batches_done(only_run(out)) > 2, 120)
    began = time.monotonic()
    child_of(process.pid, rank=1).kill()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - began < 30
    run = only_run(out)
    hints = re.findall(r"^.*to go on: .*$", (tmp_path / "err").read_text(), re.MULTILINE)
    assert len(hints) == 1, hints
    assert hints[0].endswith(f"to go on: tl-headnorm collect --resume out/{run.name}")
    assert 2 < batches_done(run) < 31
    resumed = Command(tmp_path, "collect", "--resume", run)
    assert (resumed.wait(), resumed.out) == (0, f"{run}\n"), resumed.err
    assert_same_run(run, alone, exactly=False)


def child_of(launcher, rank):
    import psutil

    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no rank {rank}")


def test_twenty_kills_of_three_processes(tmp_path, alone):
    """Some are killed, the others stopped as a launcher would; resumed by one to three."""
    chance, kills, number, worlds = random.Random(7), 0, 0, set()
    while kills < 20:
        number += 1
        out = tmp_path / str(number)
        while not (only_run(out) and (only_run(out) / "meta.json").is_file()):
            run = only_run(out)
            begun = run and (run / "config.json").is_file()
            world = chance.choice([3, 3, 3, 2, 1]) if begun else 3
            worlds.add(world)
            if begun:
                arguments = ["collect", "--resume", run, "--checkpoint_every", 0]
            else:
                shutil.rmtree(out, ignore_errors=True)
                arguments = [*TWOS, "--checkpoint_every", 0, "--output_dir", out]
            every = start_ranks(tmp_path, world, *arguments)
            if kills < 20:
                kills += kill_some(chance, every, out)
            codes = [command.wait() for command in every]
            assert set(codes) <= {0, -9, 143, 2, -15}, [command.err for command in every]
        assert_same_run(only_run(out), alone, exactly=False)
    assert worlds >= {1, 3}


def kill_some(chance, every, out):
    """How many were killed."""
    run = only_run(out)
    goal = (batches_done(run) if run else 0) + chance.choice([0, 1, 4, 10])
    wait_for(
        lambda: (
            not all(c.process.is_alive() for c in every)
            or (only_run(out) and batches_done(only_run(out)) >= goal)
        )
    )
    every[0].process.join(chance.uniform(0, 0.05))
    victims = chance.sample(every, chance.randint(1, len(every)))
    alive = [command for command in victims if command.process.is_alive()]
    for command in alive:
        command.signal(signal.SIGKILL)
        command.process.join(chance.uniform(0, 0.02))
    for command in every:
        if command not in alive:
            command.signal(signal.SIGTERM)
    return len(alive)


def test_without_a_launcher_the_others_notice(tmp_path):
    """Nobody stops them: they come to their end, miss the dead one and say so."""
    options = ("--checkpoint_every", 0, "--output_dir", tmp_path / "out")
    every = start_ranks(tmp_path, 3, *TWOS, *options)
    wait_for(lambda: only_run(tmp_path / "out") and batches_done(only_run(tmp_path / "out")) > 2)
    every[1].signal(signal.SIGKILL)
    assert [command.wait() for command in every] == [2, -9, 2]
    run = only_run(tmp_path / "out")
    said = [line for c in every for line in c.err.splitlines() if line.startswith("tl-headnorm")]
    assert len(said) == 1, said
    assert "processes: expected all processes of the run until its end, lost one" in said[0]
    assert said[0].endswith(f"kept, to go on: tl-headnorm collect --resume {run}")
    again = Command(tmp_path, "collect", "--resume", run)
    assert again.wait() == 0, again.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_is_answered_once(number, code, tmp_path):
    every = start_ranks(tmp_path, 2, *BUILT_IN, "--output_dir", tmp_path / "out")
    wait_for(lambda: re.search(r" [1-9]\d/130", every[0].err))
    for command in every:
        command.signal(number)
    if number == signal.SIGINT:  # as torchrun hands it on
        for command in every:
            command.signal(number)
    assert [command.wait() for command in every] == [code, code]
    said = [line for c in every for line in c.err.splitlines() if "to go on" in line]
    assert len(said) == 1
    assert 0 < batches_done(only_run(tmp_path / "out")) < 260


SAME_FOR_ALL = {
    "a setting": (["collect", "--dtype", "fp31"], "dtype: expected one of bf16, fp16, fp32, found"),
    "the data": (
        ["collect", "--model_path", "builtin:tiny", "--data_dir", "/no/such/file"],
        "data_dir: expected an existing",
    ),
    "the prompts": (
        [*TWOS, "--max_length", 5],
        "max_length",
    ),
    "another command": (
        ["evaluate", "--model_path", "builtin:tiny"],
        "expected one process for this command, found 2 of a launcher; only collect shares its",
    ),
    "a spread model": (
        ["collect", "--model_path", "builtin:tiny", "--device_map", "balanced"],
        "device_map: expected a device for each of 2 processes, found balanced",
    ),
    "no run": (["collect", "--resume", "/no/such/run"], "resume: expected a run directory"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME_FOR_ALL)
def test_what_is_wrong_for_all_is_said_once(what, tmp_path):
    arguments, message = SAME_FOR_ALL[what]
    out = [] if "--resume" in arguments else ["--output_dir", tmp_path / "out"]
    every = start_ranks(tmp_path, 2, *arguments, *out)
    assert [command.wait() for command in every] == [2, 2]
    said = [line for c in every for line in c.err.splitlines() if line.strip()]
    assert len(said) == 1, said
    assert said[0].startswith(f"tl-headnorm: {message}")
    assert not any((tmp_path / "out").rglob("*"))


def test_what_is_wrong_for_one_ends_all(tmp_path, questions_file):
    """The second process finds other questions than the first."""
    other = tmp_path / "test.jsonl"
    other.write_text(questions_file.read_text().replace("gravity", "Gravity", 1))
    flags = ["collect", "--model_path", "builtin:tiny", "--dtype", "fp32", "--output_dir",
             tmp_path / "out", "--max_length", 400]  # fmt: skip
    port = str(free_port())
    every = [
        Command(
            tmp_path, *flags, "--data_dir", path, name=str(rank),
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": port},
        )
        for rank, path in enumerate((questions_file, other))
    ]  # fmt: skip
    assert [command.wait() for command in every] == [2, 2]
    said = [line for c in every for line in c.err.splitlines() if line.strip()]
    assert len(said) == 1
    assert "data_dir: expected the questions' file alike for all processes" in said[0]


def test_every_process_takes_its_own_gpu(monkeypatch):
    import torch

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device_map in ("auto", "cuda"):
        assert [device_for(device_map, Ranks(2 + i, 4, i, 2)) for i in range(2)] == [
            "cuda:0", "cuda:1"
        ]  # fmt: skip
    assert taken == [0, 1, 0, 1]
    assert device_for("cpu", Ranks(1, 2, 1, 2)) == "cpu"
    assert device_for("cuda:1", Ranks(0, 2, 0, 2)) == "cuda:1"
    assert device_for("balanced", Ranks()) == "balanced"
    with pytest.raises(InputError, match="a GPU for each process on this machine, found 2 for 3"):
        device_for("auto", Ranks(2, 3, 2, 3))


def test_one_process_asks_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = ranks.connect()
    assert found == Ranks()
    assert found.agree(lambda: 3) == 3
    assert found.all_gather(4) == [4]
    found.barrier()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE: expected a whole number from the launcher"):
        ranks.connect()


def test_a_launcher_that_leads_nowhere_is_one_line(tmp_path):
    command = Command(tmp_path, *TWOS, environment={"RANK": "0", "WORLD_SIZE": "two"})
    assert command.wait() == 2
    assert command.err == (
        "tl-headnorm: WORLD_SIZE: expected a whole number from the launcher, found 'two'\n"
    )


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    sessions=st.lists(st.tuples(st.integers(1, 4), st.data()), max_size=4),
    stored=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_any_sessions_and_any_kills_measure_every_sample_once(sizes, sessions, stored):
    """Law: whatever was killed when, and however many went on, all is as in one pass."""
    group, count = Group((), 0), sum(sizes)
    ends = np.cumsum(sizes)
    order = np.random.default_rng(count).permutation(count)  # batches are not in dataset order
    plan = [
        Planned(i, group, tuple(Encoded(int(s), (1,)) for s in order[end - size : end]))
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    truth = np.random.default_rng(0).normal(1e3, 1, (count, 2, 3))
    columns = [Column("m", (2, 3), stored=stored), Column("said", dtype="<i2", moments=False)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # for speed: no process dies here
        for world, data in [*sessions, (2, None)]:
            every = 0.0 if data is None or data.draw(st.booleans()) else 1e9
            logs = [OnDisk(Path(folder), every, InTurn(r, world)) for r in range(world)]
            for log in logs:
                log.begin(Work(columns, count, len(plan)))
            for log in logs:
                end = None if data is None else data.draw(st.integers(0, len(log.missing(plan))))
                for number, planned in enumerate(log.remaining(plan)):
                    if number == end:
                        break
                    places = [sample.index for sample in planned.samples]
                    for part in (places[:1], places[1:]):  # as halved for want of memory
                        log.add(part, {"m": truth[part], "said": np.array(part, int) % 5})
        gathered = [log.gather() for log in reversed(logs)][-1]
    assert (gathered.moments["m"].n == count).all()
    one_pass = Moments.of(truth)
    np.testing.assert_allclose(gathered.moments["m"].mean, one_pass.mean, rtol=1e-12)
    np.testing.assert_allclose(gathered.moments["m"].M2, one_pass.M2, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(gathered.values["said"], np.arange(count) % 5)
    np.testing.assert_array_equal(gathered.values["m"], truth[:stored].astype(np.float32))


def test_only_collect_is_shared():
    assert [name for name, command in table.COMMANDS.items() if command.shared] == ["collect"]
