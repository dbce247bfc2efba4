"""Killed at any moment, any number of times, a run resumed gives what it would have given."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from handmade import llama
from processes import BUILT_IN, STATE, Command, assert_same_run, batches_done, only_run, wait_for

from tl_headnorm import collect, load_model, load_questions
from tl_headnorm.cli import parse
from tl_headnorm.commands.collect import command, plots
from tl_headnorm.errors import InputError
from tl_headnorm.measures import measurer
from tl_headnorm.run import fingerprints, log, resume, segments
from tl_headnorm.run.files import locked
from tl_headnorm.run.segments import (
    Column,
    Gathered,
    Unit,
    read_segment,
    units_of,
    write_segment,
)
from tl_headnorm.settings import Settings


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nothing interrupts, and that keeps its state only at its beginning and end."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, *BUILT_IN, "--output_dir", folder / "out")
    assert command.wait() == 0, command.err
    return next((folder / "out").iterdir())


def kill_at_random(chance, command, out):
    """Kill after a random time, or a random number of further batches, and somewhat later."""
    run = only_run(out)
    further = chance.choice([None, 1, 3, 10, 30])
    if further is None:
        command.process.join(chance.uniform(0, 0.5))
    else:
        goal = (batches_done(run) if run else 0) + further
        wait_for(
            lambda: (
                not command.process.is_alive()
                or (only_run(out) and batches_done(only_run(out)) >= goal)
            )
        )
        command.process.join(chance.uniform(0, 0.03))
    command.signal(signal.SIGKILL)


def test_twenty_kills_at_random_moments(tmp_path, uninterrupted):
    """Runs are killed and resumed until 20 kills are done and the last run is finished."""
    chance, kills, progress, number = random.Random(5), 0, [], 0
    while kills < 20:
        number += 1
        out = tmp_path / str(number)
        while not (only_run(out) and (only_run(out) / "meta.json").is_file()):
            run = only_run(out)
            if run and (run / "config.json").is_file():
                command = Command(tmp_path, "collect", "--resume", run)
            else:  # killed before there was anything to resume
                shutil.rmtree(out, ignore_errors=True)
                command = Command(tmp_path, *BUILT_IN, "--checkpoint_every", 0.02,
                                  "--output_dir", out)  # fmt: skip
            if kills < 20:
                kill_at_random(chance, command, out)
            code = command.wait()
            assert code in (0, -9), command.err
            kills += code == -9
            progress.append(batches_done(only_run(out)) if only_run(out) else 0)
        assert_same_run(only_run(out), uninterrupted)
    assert len(set(progress)) > 8, f"the kills hit too few moments: {progress}"


def test_a_true_command_killed_and_resumed(tmp_path, uninterrupted):
    program = [sys.executable, "-m", "tl_headnorm"]
    arguments = [*map(str, BUILT_IN), "--checkpoint_every", "0.02", "--output_dir", str(tmp_path)]
    process = subprocess.Popen([*program, *arguments], stderr=subprocess.DEVNULL)
    wait_for(lambda: only_run(tmp_path) and batches_done(only_run(tmp_path)) > 20)
    process.kill()
    assert process.wait() == -9
    run = only_run(tmp_path)
    before = batches_done(run)
    assert 20 < before < 260
    done = subprocess.run(
        [*program, "collect", "--resume", str(run)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"{run}\n"), done.stderr
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped")],
)
def test_a_signal_saves_and_says_how_to_go_on(number, code, word, tmp_path, uninterrupted):
    """The default of a minute between saves has not passed: the signal saved."""
    command = Command(tmp_path, *BUILT_IN, "--output_dir", tmp_path / "out")
    wait_for(lambda: "sample/s" in command.err and re.search(r" [1-9]\d/260", command.err))
    command.signal(number)
    assert command.wait() == code
    run = only_run(tmp_path / "out")
    lines = [x for x in command.err.splitlines() if x and "sample/s" not in x]
    assert lines == [f"{word}; to go on: tl-headnorm collect --resume {run}"]
    assert command.out == ""
    assert 0 < batches_done(run) < 260
    resumed = Command(tmp_path, *lines[0].split("tl-headnorm ")[1].split())
    assert resumed.wait() == 0, resumed.err
    assert resumed.out == f"{run}\n"
    assert_same_run(run, uninterrupted)
    assert json.loads((run / "meta.json").read_text())["sessions"] == 2


def test_a_second_signal_ends_it_at_once(tmp_path):
    command = Command(tmp_path, *BUILT_IN, "--output_dir", tmp_path / "out")
    wait_for(lambda: re.search(r" [1-9]\d/260", command.err))
    command.signal(signal.SIGSTOP)  # so that both wait for it before its batch ends
    command.signal(signal.SIGINT)
    time.sleep(0.05)
    command.signal(signal.SIGTERM)
    command.signal(signal.SIGCONT)
    assert command.wait() in (-signal.SIGINT, -signal.SIGTERM)


def test_a_signal_before_anything_was_measured_leaves_nothing(tmp_path):
    command = Command(tmp_path, *BUILT_IN, "--output_dir", tmp_path / "out")
    wait_for(lambda: only_run(tmp_path / "out") and (only_run(tmp_path / "out") / STATE).is_dir())
    command.signal(signal.SIGINT)
    code = command.wait()
    assert code == 130
    if "sample/s" not in command.err:  # it was still opening the model
        assert command.err == "interrupted\n"
        assert only_run(tmp_path / "out") is None


# Within this process: a crash between any two batches, and what may differ afterwards.


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than all the rest of a small run."""
    monkeypatch.setattr(plots, "save_heatmap", lambda *_: None)


class Crash(BaseException):
    """Ends a run where it stands, as far as one process can end itself."""


def crash_at(monkeypatch, batch):
    """Let the measuring of the batch with this number (from 0) crash."""
    original, count = measurer.Measurer.__call__, iter(range(10**6))

    def measured(self, *args):
        if next(count) == batch:
            raise Crash
        return original(self, *args)

    monkeypatch.setattr(measurer.Measurer, "__call__", measured)


@pytest.fixture
def broken(run_cli, small, tmp_path, monkeypatch, no_figures):
    """A run directory of three batches, crashed in the third; every batch was saved."""
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", tmp_path / "out")
    run = only_run(tmp_path / "out")
    assert batches_done(run) == 2
    return run


@pytest.mark.usefixtures("no_figures")
def test_a_crash_at_any_batch(run_cli, small, tmp_path, monkeypatch, finished):
    for batch in range(3):
        out = tmp_path / str(batch)
        with monkeypatch.context() as patch:
            crash_at(patch, batch)
            with pytest.raises(Crash):
                run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", out)
        assert batches_done(only_run(out)) == batch
        resumed = run_cli("collect", "--resume", only_run(out))
        assert_same_run(resumed.run_dir, finished)


@pytest.mark.usefixtures("no_figures")
def test_a_crash_after_all_was_measured_measures_nothing_again(
    run_cli, small, tmp_path, monkeypatch, finished
):
    for function in ("save_arrays", "finish"):
        out = tmp_path / function
        with monkeypatch.context() as patch:
            patch.setattr(command, function, lambda *_: (_ for _ in ()).throw(Crash))
            with pytest.raises(Crash):
                run_cli("collect", *small, "--output_dir", out)
        with monkeypatch.context() as patch:
            crash_at(patch, 0)
            resumed = run_cli("collect", "--resume", only_run(out))
        assert_same_run(resumed.run_dir, finished)


@pytest.mark.usefixtures("no_figures")
def test_a_crash_while_clearing_up_is_a_finished_run(run_cli, small, tmp_path, monkeypatch):
    from tl_headnorm.run.resume import ResumableRun

    with monkeypatch.context() as patch:
        patch.setattr(ResumableRun, "finish", lambda _: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run_cli("collect", *small, "--output_dir", tmp_path)
    run = only_run(tmp_path)
    assert (run / STATE).is_dir()
    again = run_cli("collect", "--resume", run)
    assert (again.code, again.out) == (0, f"{run}\n")
    assert again.err == f"{run} is finished: nothing is left to do\n"
    assert not (run / STATE).exists()


@pytest.mark.usefixtures("no_figures")
def test_state_between_the_halves_of_a_batch_is_never_saved(
    run_cli, small, tmp_path, monkeypatch, finished
):
    """A batch that did not fit counts when all its parts are there, and then once."""
    original, calls = measurer.Measurer.__call__, []

    def small_memory(self, batch):
        calls.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        if len(calls) == 3:  # the second half of the first batch
            raise Crash
        return original(self, batch)

    monkeypatch.setattr(measurer.Measurer, "__call__", small_memory)
    with pytest.raises(Crash):
        run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", tmp_path)
    assert calls == [3, 2, 1]
    assert batches_done(only_run(tmp_path)) == 0
    run = run_cli("collect", "--resume", only_run(tmp_path)).run_dir
    with np.load(run / "moments.npz") as stored, np.load(finished / "moments.npz") as truth:
        assert (stored["head_output_norm_n"] == 7).all()
        np.testing.assert_allclose(
            stored["head_output_norm_mean"], truth["head_output_norm_mean"], rtol=1e-5
        )


def a_unit_twice(broken):
    """Another segment with units that are there, as of a worker that was thought dead."""
    state = broken / STATE
    first, second = sorted(state.glob("[0-9]*.npz"))
    with np.load(first) as one, np.load(second) as other:
        joined = {
            name: np.concatenate([one[name], other[name]]) if one[name].ndim else one[name]
            for name in one.files
        }
    np.savez(state / "00000000-0001.npz", **joined)
    return broken


def test_a_unit_in_two_segments_counts_once(run_cli, broken, finished):
    assert batches_done(a_unit_twice(broken)) == 4
    assert_same_run(run_cli("collect", "--resume", broken).run_dir, finished)


def test_rival_that_adds_up_segments_counts_it_twice(run_cli, broken, monkeypatch, finished):
    original = segments.Gathered.add

    def add(self, unit):
        self.units.discard(unit.number)
        original(self, unit)

    monkeypatch.setattr(segments.Gathered, "add", add)
    run = run_cli("collect", "--resume", a_unit_twice(broken)).run_dir
    with pytest.raises(AssertionError):
        assert_same_run(run, finished)


@pytest.mark.usefixtures("no_figures")
def test_rival_that_counts_samples_and_plans_anew(run_cli, small, tmp_path, monkeypatch):
    """ "The first n samples are done" is wrong where batches were sorted by length."""

    def in_dataset_order(self, plan):
        count = int(sum(len(p.samples) for p in plan if p.number in self.done))
        return [p for p in plan if any(s.index >= count for s in p.samples)]

    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", tmp_path)
    monkeypatch.setattr(log.OnDisk, "missing", in_dataset_order)
    with pytest.raises(RuntimeError, match="1 of 3 batches are missing"):
        run_cli("collect", "--resume", only_run(tmp_path))


@pytest.mark.usefixtures("no_figures")
def test_batches_stay_the_same_when_memory_does_not(run_cli, small, tmp_path, monkeypatch):
    """`max_batch_tokens: auto` is settled once: with less memory free the plan is the old one."""
    sizes, original = [], measurer.Measurer.__call__

    def measured(self, batch):
        sizes.append(len(batch))
        return original(self, batch)

    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", tmp_path)
    monkeypatch.setattr(measurer.Measurer, "__call__", measured)
    monkeypatch.setattr(measurer, "auto_batch_tokens", lambda model: 1)
    assert run_cli("collect", "--resume", only_run(tmp_path)).code == 0
    assert sizes == [3, 1]


REFUSED = {
    "dtype": ("bf16", 'dtype: expected "fp32", as the run in {run} began, found "bf16"; leave it '
              "out, or start a new run without --resume"),
    "batch_size": (4, "batch_size: expected 3, as the run in {run} began, found 4; "),
    "token_agg": ("all", 'token_agg: expected "last", as the run in {run} began, found "all"; '),
    "max_samples": (5, "max_samples: expected -1, as the run in {run} began, found 5; "),
    "max_batch_tokens": (99, 'max_batch_tokens: expected "auto", as the run in {run} began, fou'),
    "padding_side": ("left", 'padding_side: expected "right", as the run in {run} began, found '),
    "template": ("{{question}}: ", 'template: expected null, as the run in {run} began, found "{{'),
    "n_options": ("[3,4]", "n_options: expected [4, 5], as the run in {run} began, found [3, 4]; "),
    "measures": ("head_output_norm", "measures: expected ["),
    "output_dir": ("elsewhere", "output_dir: expected "),
    "seed": (1, "seed: expected 42, as the run in {run} began, found 1; "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_change_numbers_is_refused(name, run_cli, broken, tmp_path):
    value, message = REFUSED[name]
    expected = message.replace("{run}", str(broken))
    before = batches_done(broken)
    by_flag = run_cli("collect", "--resume", broken, f"--{name}", value)
    assert (by_flag.code, by_flag.out) == (2, "")
    assert expected in by_flag.error_line
    text = json.dumps(value) if name == "template" else value
    (tmp_path / "run.yaml").write_text(f"resume: {broken}\n{name}: {text}\n")
    by_file = run_cli("collect", "--config", tmp_path / "run.yaml")
    assert by_file.error_line == by_flag.error_line
    assert batches_done(broken) == before


def test_every_setting_may_change_or_is_refused():
    """The free ones are named; of each other one the default differs from some other value."""
    assert set(resume.FREE) < set(Settings().as_dict())


def test_what_changes_no_number_may_change(run_cli, small, broken, finished):
    free = ("--checkpoint_every", 0.5, "--self_check", "false", "--debug", "--device_map", "cpu",
            "--validate_samples", 2)  # fmt: skip
    same = (*small, *free, "--seed", 42)  # given again as it was
    run = run_cli("collect", "--resume", broken, *same).run_dir
    meta = json.loads((run / "meta.json").read_text())
    assert meta["validated_against_hf"] < 1e-4
    config = json.loads((run / "config.json").read_text())
    assert (config["checkpoint_every"], config["resume"]) == (0.5, None)
    with np.load(run / "per_sample.npz") as ours, np.load(finished / "per_sample.npz") as truth:
        for name in truth.files:
            np.testing.assert_array_equal(ours[name], truth[name])


@pytest.mark.usefixtures("no_figures")
def test_other_versions_are_said(run_cli, broken, caplog):
    record = json.loads((broken / STATE / "run.json").read_text())
    record["facts"]["made_by"]["torch"] = "1.0"
    (broken / STATE / "run.json").write_text(json.dumps(record))
    assert run_cli("collect", "--resume", broken).code == 0
    assert f"resumed with torch 1.0, now {torch.__version__}: the batches that" in caplog.text


def test_resumed_by_a_yaml_key(broken):
    name, settings = parse(["collect", f"--resume={broken}", "--debug"])
    began = json.loads((broken / "config.json").read_text())
    found = settings.as_dict()
    assert found["resume"] == str(broken)
    assert {k: v for k, v in found.items() if k not in ("resume", "debug")} == {
        k: v for k, v in began.items() if k not in ("resume", "debug")
    }
    assert name == "collect"


def test_no_run_to_resume(run_cli, tmp_path, finished, broken):
    def line(path):
        result = run_cli("collect", "--resume", path)
        assert result.code == 2
        return result.error_line

    assert f"resume: expected a run directory of collect, found nothing at {tmp_path / 'no'}" in (
        line(tmp_path / "no")
    )
    (tmp_path / "empty").mkdir()
    assert "expected a directory that collect left unfinished, found no .state in" in line(
        tmp_path / "empty"
    )
    (tmp_path / "early" / STATE).mkdir(parents=True)
    assert "found none: the run ended before it began to measure; start it again" in line(
        tmp_path / "early"
    )
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    assert "expected settings this version knows, found colour in" in line(broken)
    (broken / "config.json").write_text("{")
    assert "config.json as collect wrote it, found it damaged" in line(broken)
    done = run_cli("collect", "--resume", finished)
    assert (done.code, done.out) == (0, f"{finished}\n")
    assert done.err == f"{finished} is finished: nothing is left to do\n"


def test_a_run_killed_before_its_first_batch_starts_from_its_settings(run_cli, broken, finished):
    for path in (broken / STATE).iterdir():
        path.unlink()
    assert_same_run(run_cli("collect", "--resume", broken).run_dir, finished)


def test_damaged_state_is_one_line(run_cli, broken):
    state = broken / STATE / "00000001-0000.npz"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    message = run_cli("collect", "--resume", broken).error_line
    assert f"expected {state} as collect wrote it, found it damaged" in message
    state.write_bytes(whole)
    (broken / STATE / "run.json").write_text("{}")
    assert "run.json as collect wrote it, found it damaged" in (
        run_cli("collect", "--resume", broken).error_line
    )


def test_a_segment_that_is_removed_is_measured_again(run_cli, broken, finished):
    (broken / STATE / "00000000-0000.npz").unlink()
    assert batches_done(broken) == 1
    assert_same_run(run_cli("collect", "--resume", broken).run_dir, finished)


def test_a_run_in_use_is_left_alone(run_cli, broken, finished):
    with locked(broken / STATE, alone=True):
        message = run_cli("collect", "--resume", broken).error_line
    assert f"expected a run that no process works on, found {broken} in use" in message
    assert_same_run(run_cli("collect", "--resume", broken).run_dir, finished)


def test_changed_data_and_weights_are_refused(run_cli, broken, tmp_path, questions_file, llama_dir):
    def line(*arguments):
        return run_cli("collect", "--resume", broken, *arguments).error_line

    other = tmp_path / "test.jsonl"
    other.write_text(questions_file.read_text().replace("gravity", "Gravity", 1))
    message = line("--data_dir", other)
    assert message.startswith("tl-headnorm: data_dir: expected the questions' file as when the run")
    assert str(questions_file) in message
    assert str(other) in message
    from safetensors.torch import load_file, save_file

    for name, key in (("weights", "model.layers.1.self_attn.o_proj.weight"), ("config", None)):
        folder = tmp_path / name
        shutil.copytree(llama_dir, folder)
        if key:
            tensors = load_file(folder / "model.safetensors")
            tensors[key][:, 10:20] = 0  # one head's W_O
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        message = line("--model_path", folder)
        assert message.startswith(f"tl-headnorm: model_path: expected the model's {name} as when")
        assert str(llama_dir) in message
        assert str(folder) in message
    assert batches_done(broken) == 2


def test_data_and_weights_may_move(run_cli, broken, tmp_path, questions_file, llama_dir):
    shutil.copytree(llama_dir, tmp_path / "model")
    shutil.copy(questions_file, tmp_path / "moved.jsonl")
    moved = ("--model_path", tmp_path / "model", "--data_dir", tmp_path / "moved.jsonl")
    run = run_cli("collect", "--resume", broken, *moved).run_dir
    meta = json.loads((run / "meta.json").read_text())
    assert meta["model"]["source"] == str(tmp_path / "model")


@pytest.mark.usefixtures("no_figures")
def test_a_changed_template_file_is_noticed(run_cli, small, tmp_path, monkeypatch):
    template = tmp_path / "prompt.j2"
    template.write_text(
        "{{ question }}\n{% for l, t in options %}{{ l }}) {{ t }}\n{% endfor %}A: "
    )
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            run_cli("collect", *small, "--template", template, "--output_dir", tmp_path / "out")
    template.write_text(template.read_text().replace("A: ", "Answer: "))
    message = run_cli("collect", "--resume", only_run(tmp_path / "out")).error_line
    assert message.startswith("tl-headnorm: template: expected the prompts' tokens and answers as")


@pytest.mark.usefixtures("no_figures")
def test_an_error_after_the_first_save_keeps_the_run(run_cli, small, tmp_path, monkeypatch):
    original, calls = measurer.Measurer.__call__, []

    def full(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "x")
        return original(self, batch)

    monkeypatch.setattr(measurer.Measurer, "__call__", full)
    result = run_cli("collect", *small, "--checkpoint_every", 0, "--output_dir", tmp_path)
    run = only_run(tmp_path)
    line = result.err.splitlines()[-1]
    assert result.code == 2
    assert "No space left on device" in line
    hint = f"; what was measured is kept, to go on: tl-headnorm collect --resume {run}"
    assert line.endswith(hint)
    assert run_cli("collect", "--resume", run).code == 0


def test_an_error_before_the_first_save_leaves_nothing(run_cli, small, tmp_path, monkeypatch):
    def fail(self, batch):
        raise InputError("expected this, found that")

    monkeypatch.setattr(measurer.Measurer, "__call__", fail)
    result = run_cli("collect", *small, "--output_dir", tmp_path)
    assert result.code == 2
    assert result.err.splitlines()[-1] == "tl-headnorm: expected this, found that"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["-1", ".nan", "soon"])
def test_seconds_that_make_no_sense(run_cli, value):
    message = run_cli("collect", "--checkpoint_every", value).error_line
    assert "checkpoint_every: expected " in message


@pytest.mark.usefixtures("no_figures")
def test_without_per_sample_values_little_is_kept(run_cli, small, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            run_cli("collect", *small, "--checkpoint_every", 0, "--per_sample", "false",
                    "--validate_samples", 2, "--output_dir", tmp_path)  # fmt: skip
    run = only_run(tmp_path)
    stored = 0
    for path in (run / STATE).glob("[0-9]*.npz"):
        with np.load(path) as arrays:
            stored += len(arrays["head_output_norm"])
    assert stored <= 2  # those that will be compared
    resumed = run_cli("collect", "--resume", run).run_dir
    assert not (resumed / "per_sample.npz").exists()
    assert json.loads((resumed / "meta.json").read_text())["validated_against_hf"] < 1e-4
    for path in finished.glob("*.npy"):
        np.testing.assert_array_equal(np.load(resumed / path.name), np.load(path))


# The library, and the parts.


def test_the_library_keeps_state_too(tmp_path, monkeypatch):
    model = load_model("builtin:tiny", dtype="fp32", device_map="cpu", self_check=False)
    questions = load_questions("builtin:questions", max_samples=20)
    options = {"batch_size": 2, "checkpoint_every": 0.0, "progress": False}
    truth = collect(model, questions, **options)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            collect(model, questions, state_dir=tmp_path, **options)
    assert (tmp_path / STATE).is_dir()
    with pytest.raises(InputError, match="measures: expected the measures as when"):
        collect(model, questions, state_dir=tmp_path, token_agg="all", **options)
    run = collect(model, questions, state_dir=tmp_path, **options)
    assert not any(tmp_path.iterdir())
    assert run.attrs["sessions"] == 2
    for name in ("head_output_norm", "head_resid_contrib_norm"):
        np.testing.assert_array_equal(run[name].values, truth[name].values)
        np.testing.assert_array_equal(run[f"{name}_M2"].values, truth[f"{name}_M2"].values)


def test_handlers_are_put_back():
    from tl_headnorm.run.signals import on_signals

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with on_signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_echo_of_a_launcher_is_no_second_signal(monkeypatch):
    from tl_headnorm.run import signals

    killed = []
    monkeypatch.setattr(signals.os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(signals.signal, "signal", lambda *args: None)
    for echoed, deaths in ((True, 0), (False, 1)):
        stop = signals.Stop(echoed=echoed)
        with suppress(signals.Stopped), stop.held():
            stop.handle(signal.SIGINT, None)
            stop.handle(signal.SIGINT, None)
        assert stop.signum == signal.SIGINT
        assert len(killed) == deaths


def test_fingerprints_know_their_own():
    first, same = load_model(hf_model=llama()), load_model(hf_model=llama())
    assert fingerprints.weights(first) == fingerprints.weights(same)
    assert fingerprints.config(first) == fingerprints.config(same)
    with torch.no_grad():
        first.hf.model.layers[0].mlp.up_proj.weight[3] *= 1.5
    assert fingerprints.weights(first) != fingerprints.weights(same)


def test_a_large_tensor_is_read_at_all_its_columns():
    """Places at a fixed step would fall on the same columns again and again, and miss a head."""
    weight = torch.zeros(2048, 2048)
    changed = weight.clone()
    changed[:, 640:704] = 1  # one head of 64 in o_proj
    assert (fingerprints._drawn(weight) != fingerprints._drawn(changed)).any()
    step = weight.numel() // fingerprints.DRAWN
    assert torch.equal(weight.flatten()[::step], changed.flatten()[::step])
    view = torch.arange(12.0).reshape(3, 4).T
    np.testing.assert_array_equal(
        fingerprints._drawn(view).view(np.float32), view.flatten().numpy()
    )


def columns():
    return [Column("m", (2,), stored=3), Column("said", dtype="<i2", moments=False)]


def unit(number, rows):
    found = Unit(number)
    values = np.array(rows, float)[:, None] + [0.25, 0.5]
    found.add(columns(), rows, {"m": values, "said": np.array(rows)})
    return found


def test_a_segment_is_read_as_it_was_written(tmp_path):
    """Units of no, one and two rows; of a column the first three rows are stored."""
    written = [unit(4, [3, 0]), unit(9, [2])]
    written[0].add(columns(), [5], {"m": np.ones((1, 2)), "said": np.array([7])})
    write_segment(tmp_path / "x.npz", columns(), written, seconds=1.5)
    assert units_of(tmp_path / "x.npz") == [4, 9]
    read, facts = read_segment(tmp_path / "x.npz", columns())
    assert facts == {"seconds": 1.5}
    gathered = [Gathered(columns(), 6), Gathered(columns(), 6, tmp_path)]
    for found, units in zip(gathered, (written, read), strict=True):
        for one in units:
            found.add(one)
    assert gathered[0].values["m"].tolist() == [[0.25, 0.5], [0, 0], [2.25, 2.5]]
    assert gathered[0].values["said"].tolist() == [0, 0, 2, 3, 0, 7]
    for name in ("m", "said"):
        np.testing.assert_array_equal(gathered[0].values[name], gathered[1].values[name])
    for part in ("n", "mean", "M2"):
        in_memory, on_disk = (getattr(g.moments["m"], part) for g in gathered)
        np.testing.assert_array_equal(in_memory, on_disk)
    assert gathered[0].moments["m"].n.tolist() == [4, 4]
    assert gathered[0].units == {4, 9}


def test_a_segment_that_holds_other_columns_is_damaged(tmp_path):
    write_segment(tmp_path / "x.npz", columns(), [unit(0, [1])])
    for other in (Column("m", (3,)), Column("n", (2,))):
        with pytest.raises(InputError, match=r"x.npz as collect wrote it, found it damaged"):
            read_segment(tmp_path / "x.npz", [other])


def test_a_log_without_per_sample_memory(tmp_path, monkeypatch):
    """A segment is written before its values grow large, however long an interval is."""
    monkeypatch.setattr(log, "SEGMENT_BYTES", 1000)
    on_disk = log.OnDisk(tmp_path, every=1e9)
    on_disk.begin(log.Work([Column("m", (10,))], 20, 20))
    for planned in on_disk.remaining([Numbered(i) for i in range(20)]):
        on_disk.add([planned.number], {"m": np.full((1, 10), float(planned.number))})
        assert sum(u.nbytes for u in on_disk._pending) <= 1000 + 280
    assert 2 < len(on_disk.segments()) < 20
    assert on_disk.gather().values["m"][:, 3].tolist() == list(range(20))


@dataclass
class Numbered:
    number: int


def test_an_unfinished_unit_is_not_written(tmp_path):
    """Neither after an error in it, nor after a loop that was left."""
    on_disk = log.OnDisk(tmp_path, every=0.0)
    on_disk.begin(log.Work([Column("m")], 3, 3))
    for planned in on_disk.remaining([Numbered(i) for i in range(3)]):
        on_disk.add([planned.number], {"m": np.ones(1)})
        if planned.number == 1:
            break
    assert [units_of(path) for path in on_disk.segments()] == [[0]]
    with pytest.raises(RuntimeError, match="2 of 3 batches are missing"):
        on_disk.gather()
