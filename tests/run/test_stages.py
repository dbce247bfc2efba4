"""Studies killed or interrupted at any stage and resumed give what they would have given."""

import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from processes import STATE, Command, only_run, wait_for

from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.run.resume import resumed

SHARED = ("--model_path", "builtin:tiny", "--dataset", "builtin:questions", "--dtype", "fp32",
          "--device_map", "cpu", "--self_check", "false", "--batch_size", 4)  # fmt: skip
STUDIES = {
    "ablate": ("--max_samples", 24, "--reference_samples", 8, "--method", "zero,mean"),
    "massive": ("--max_texts", 12, "--sweep_layers", "true"),
    "steer": ("--max_samples", 24, "--spans", "option:wrong", "--heads", "3.0-3",
              "--boost", "2,1e6"),
    "inactive": ("--max_samples", 24, "--modes", "static,on_the_fly", "--shares", "0.25,0.5",
                 "--bootstrap", 100),
    "attribute": ("--max_samples", 12, "--methods", "loo,michel", "--validate", "true",
                  "--greedy", 2, "--pruning_points", 3),
}  # fmt: skip


def units_done(run):
    """Units that the segments of all stages hold."""
    total = 0
    for path in (run / STATE).rglob("[0-9]*.npz") if run else ():
        try:
            with np.load(path) as stored:
                total += len(stored["_units"])
        except (FileNotFoundError, ValueError):  # the run has just ended
            pass
    return total


def assert_same_files(run, other):
    """Tables and arrays are equal, bit for bit."""
    names = sorted(p.name for p in other.iterdir())
    assert sorted(p.name for p in run.iterdir()) == names
    assert "meta.json" in names
    for name in names:
        if name.endswith(".parquet"):
            pd.testing.assert_frame_equal(
                pd.read_parquet(run / name), pd.read_parquet(other / name), check_exact=True
            )
        elif name.endswith(".npz"):
            with np.load(run / name) as ours, np.load(other / name) as theirs:
                assert set(ours.files) == set(theirs.files)
                for key in ours.files:
                    np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("study", STUDIES)
def test_killed_and_resumed(study, tmp_path):
    """Killed after 3 units, after 8 more, then run to its end."""
    arguments = (study, *SHARED, *STUDIES[study])
    whole = Command(tmp_path, *arguments, "--output_dir", tmp_path / "whole", name="whole")
    assert whole.wait(240) == 0, whole.err
    out = tmp_path / "killed"
    command = Command(tmp_path, *arguments, "--checkpoint_every", 0, "--output_dir", out)
    done = []
    for further in (3, 8):
        least = (done or [0])[-1] + further
        wait_for(lambda least=least: units_done(only_run(out)) >= least, 240)
        command.signal(signal.SIGKILL)
        assert command.wait() == -9
        run = only_run(out)
        done.append(units_done(run))
        assert not (run / "meta.json").is_file()
        command = Command(tmp_path, study, "--resume", run)
    assert done[0] < done[1]
    assert command.wait(240) == 0, command.err
    assert command.out.splitlines()[-1] == str(run)
    assert_same_files(run, only_run(tmp_path / "whole"))


def test_a_signal_says_how_to_go_on_and_another_command_is_refused(tmp_path):
    arguments = ("ablate", *SHARED, *STUDIES["ablate"], "--checkpoint_every", 0)
    command = Command(tmp_path, *arguments, "--output_dir", tmp_path / "out")
    wait_for(lambda: units_done(only_run(tmp_path / "out")) >= 2, 120)
    command.signal(signal.SIGTERM)
    assert command.wait() == 143
    run = only_run(tmp_path / "out")
    assert f"stopped; to go on: tl-headnorm ablate --resume {run}" in command.err
    with pytest.raises(InputError, match="expected a run of collect, found one of ablate"):
        resumed(run, {})
    changed = Command(tmp_path, "ablate", "--resume", run, "--method", "zero", name="changed")
    assert changed.wait() == 2
    assert re.search(r"method: expected \"zero,mean\", as the run in .* began", changed.err)


def test_other_interventions_are_refused(tmp_path):
    """What the settings do not say, a stage's fingerprints do: here the interventions' names."""
    from tl_headnorm import load_model
    from tl_headnorm.interventions.edits import Ablation
    from tl_headnorm.interventions.metrics import Letters
    from tl_headnorm.interventions.runner import run
    from tl_headnorm.run.log import OnDisk

    model = load_model("builtin:tiny", dtype="fp32", self_check=False)
    samples = [Encoded(i, tuple(range(5, 9 + i)), letter_ids=(5, 6)) for i in range(3)]
    heads = [Ablation(f"head 0.{h}", heads=((0, h),)) for h in range(4)]

    def into(folder: Path, interventions):
        folder.mkdir(exist_ok=True)
        return run(model, samples, interventions, Letters([0, 1, 0]), log=OnDisk(folder, 0.0))

    first = into(tmp_path / "log", heads)
    again = into(tmp_path / "log", heads)  # nothing is left to do
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        np.testing.assert_array_equal(values, run(model, samples, heads, Letters([0, 1, 0]))[name])
    with pytest.raises(InputError, match="seed: expected the interventions as when the run began"):
        into(tmp_path / "log", [*heads[:3], Ablation("head 1.3", heads=((1, 3),))])
