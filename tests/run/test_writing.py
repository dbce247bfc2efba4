"""A full disk, a directory that cannot be written to: one clear line, and no file is half there."""

import contextlib
import json
import os
import resource
import signal
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import question_record, write_jsonl

from tl_headnorm import load_run
from tl_headnorm.errors import InputError
from tl_headnorm.run import files
from tl_headnorm.run.directory import new_run_dir
from tl_headnorm.run.files import write_bytes, write_with
from tl_headnorm.run.segments import RowFile

STUDY = ["--max_samples", 4]
COMMANDS = {
    "collect": ["collect"],
    "validate": ["validate", "--max_samples", 2],
    "evaluate": ["evaluate"],
    "ablate": ["ablate", "--heads", "0.1,1.2", "--reference_samples", 2],
    "massive": ["massive", "--dataset", "arc_challenge", "--prune", 2, "--max_texts", 3],
    "attribute": ["attribute", "--methods", "[grad_x_act]", "--stability"],
}


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: EFBIG, which nobody's rights lift."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python's own start does this"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def last_line(result):
    """The error's line; a bar may stand before it."""
    lines = [x for x in result.err.replace("\r", "\n").splitlines() if x.startswith("tl-headnorm")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1] == lines[0]
    return lines[0]


def all_whole(folder):
    """Every file that is there can be read; none is temporary."""
    for path in folder.rglob("*"):
        if path.is_dir() or ".state" in path.parts:
            continue
        assert not path.name.endswith(".tmp"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix in (".npy", ".npz"):
            with path.open("rb") as stream:
                np.load(stream)
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("size", [200, 1000, 4000, 20_000, 1_000_000])
def test_no_room(size, run_cli, small, tmp_path):
    """The smaller the room, the earlier the file that does not fit."""
    with largest_file(size):
        result = run_cli("collect", *small, "--output_dir", tmp_path)
    assert (result.code, result.out) == (2, "")
    line = last_line(result)
    assert line.startswith(
        "tl-headnorm: expected files that can be read and written, found [Errno 27] File too large"
    )
    assert "; make room or choose another --output_dir" in line
    all_whole(tmp_path)
    assert not list(tmp_path.glob("*/meta.json"))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_room_for_any_command(name, run_cli, small, tmp_path):
    with largest_file(500):
        result = run_cli(*COMMANDS[name], *STUDY, *small, "--output_dir", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "File too large" in last_line(result)
    all_whole(tmp_path)
    assert not list(tmp_path.glob("*/meta.json"))


@pytest.mark.parametrize("number", range(1, 16, 2))
def test_the_disk_is_full_at_any_file(number, run_cli, small, tmp_path, monkeypatch):
    """What a disk says late, when it is asked to keep what was written."""
    calls = []
    real = os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) >= number:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    result = run_cli("collect", *small, "--max_samples", 2, "--output_dir", tmp_path)
    if result.code == 0:
        assert len(calls) < number, "a failed write went unnoticed"
        return
    assert result.code == 2
    assert "found [Errno 28] No space left on device" in last_line(result).replace(
        "(No space", "found [Errno 28] No space"
    ).replace("([Errno", "found [Errno")
    all_whole(tmp_path)
    assert not list(tmp_path.glob("*/meta.json"))


def test_an_earlier_run_is_untouched_by_a_full_disk(run_cli, small, tmp_path):
    run = run_cli("collect", *small, "--max_samples", 2, "--output_dir", tmp_path).run_dir
    before = {p: p.read_bytes() for p in run.iterdir()}
    with largest_file(1000):
        assert run_cli("merge", run, run.parent / "x", "--output_dir", tmp_path).code == 2
        assert run_cli("collect", *small, "--output_dir", tmp_path).code == 2
    assert {p: p.read_bytes() for p in run.iterdir()} == before
    load_run(run)


def test_merging_into_a_full_disk(run_cli, small, tmp_path):
    runs = [
        run_cli("collect", *small, "--shard", f"{k}/2", "--output_dir", tmp_path).run_dir
        for k in (1, 2)
    ]
    with largest_file(1_000_000):
        result = run_cli("merge", *runs, "--output_dir", tmp_path / "merged")
    assert (result.code, result.out) == (2, "")
    assert "heatmap.html" in last_line(result)
    all_whole(tmp_path)
    assert not list(tmp_path.glob("merged/*/meta.json"))


# Every file of every command comes by renaming


class Watch:
    """The files opened for writing below a folder, and what was renamed to what."""

    def __init__(self):
        self.folder, self.opened, self.renamed = None, set(), set()

    def __call__(self, event, arguments):
        if self.folder is None or event not in ("open", "os.rename"):
            return
        path = arguments[event == "os.rename"]  # of an open file it is its number
        if isinstance(path, int) or not str(path).startswith(str(self.folder)):
            return
        path = str(path)
        if event == "os.rename":
            self.renamed.add(path)
        elif isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.opened.add(path)


@pytest.fixture(scope="module")
def watch():
    """Audit hooks cannot be taken off again; this one can be put to sleep."""
    hook = Watch()
    sys.addaudithook(hook)
    yield hook
    hook.folder = None


def direct(watch):
    """Files that were written in place: under the name they are to be found by."""
    return {p for p in watch.opened if not os.path.basename(p).startswith(".")
            and "/.state/" not in p}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_file_is_renamed_into_place(name, run_cli, small, tmp_path, watch):
    watch.folder, watch.opened, watch.renamed = tmp_path, set(), set()
    run = run_cli(*COMMANDS[name], *STUDY, *small, "--output_dir", tmp_path).run_dir
    watch.folder = None
    assert direct(watch) == set()
    found = {str(p) for p in run.iterdir()}
    assert found
    assert found <= watch.renamed
    assert not any(p.name.startswith(".") for p in run.iterdir())


def test_the_watch_would_see_a_file_written_in_place(tmp_path, watch):
    watch.folder, watch.opened, watch.renamed = tmp_path, set(), set()
    (tmp_path / "rival.json").write_text("{}")
    write_bytes(tmp_path / "ours.json", b"{}")
    watch.folder = None
    assert direct(watch) == {str(tmp_path / "rival.json")}
    assert watch.renamed == {str(tmp_path / "ours.json")}


# Directories that cannot be written to


@contextlib.contextmanager
def nobody():
    """Root may write anywhere, so it steps down; others are nobody enough."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "kept.json").write_text("old")
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_read_only_directory(read_only):
    with nobody(), pytest.raises(InputError) as caught:
        new_run_dir(read_only, "run")
    assert str(caught.value).startswith(
        f"output_dir: expected a directory that can be written, found {read_only} ([Errno 13] "
        "Permission denied: "
    )
    assert [p.name for p in read_only.iterdir()] == ["kept.json"]


def test_a_directory_that_becomes_read_only(read_only):
    with nobody(), pytest.raises(PermissionError):
        write_bytes(read_only / "kept.json", b"new")
    assert (read_only / "kept.json").read_text() == "old"
    assert [p.name for p in read_only.iterdir()] == ["kept.json"]


def test_a_directory_that_goes_away(run_cli, small, tmp_path, monkeypatch):
    """A scratch disk that is cleaned while the run goes on."""
    from tl_headnorm.commands.collect import plots

    def vanish(array, stem):
        for path in stem.parent.iterdir():
            path.unlink() if path.is_file() else None
        stem.parent.rename(tmp_path / "elsewhere")
        write_bytes(stem.with_suffix(".html"), b"x")

    monkeypatch.setattr(plots, "save_heatmap", vanish)
    result = run_cli("collect", *small, "--max_samples", 1, "--output_dir", tmp_path / "runs")
    assert result.code == 2
    assert "found [Errno 2] No such file or directory: " in last_line(result)


def test_a_run_directory_that_got_no_file_is_taken_back(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_headnorm.run.directory.write_bytes", full)
    with pytest.raises(InputError, match=r"found .* \(\[Errno 28\] No space left on device\); ch"):
        new_run_dir(tmp_path, "run")
    assert not list(tmp_path.iterdir())


# The parts


def test_an_error_names_its_file(tmp_path):
    def fail(stream):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/x.bin'"):
        write_with(tmp_path / "x.bin", fail)


def test_a_full_disk_under_a_row_file_is_an_error(tmp_path):
    """Written through a map it would end the process."""
    file = RowFile(tmp_path, (2, 3000), "<f4")
    with largest_file(20_000), pytest.raises(OSError, match="File too large"):
        file[np.array([1])] = np.ones((1, 3000), np.float32)


def test_rows_that_are_taken_in_parts(tmp_path, monkeypatch):
    """A disk about to be full takes some bytes and reports their number, not an error."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:5], at))
    file = RowFile(tmp_path, (3, 4), "<f4")
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    file[np.array([2, 0, 1])] = values[[2, 0, 1]]
    assert np.array_equal(file.array(), values)


def test_interrupted_writes_leave_the_old_file(tmp_path):
    write_bytes(tmp_path / "x", b"old")

    def stopped(stream):
        stream.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "x", stopped)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_never_seen_half_written(tmp_path):
    """Whoever looks while it is written sees the old one, or none."""
    seen = []

    def write(stream):
        stream.write(b"ne")
        stream.flush()
        seen.append((tmp_path / "x").read_bytes())
        stream.write(b"w")

    write_bytes(tmp_path / "x", b"old")
    write_with(tmp_path / "x", write)
    assert seen == [b"old"]
    assert (tmp_path / "x").read_bytes() == b"new"


def test_the_smallest_room_still_lets_an_error_out(run_cli, tmp_path):
    data = write_jsonl(tmp_path / "q.jsonl", [question_record(0)])
    with largest_file(0):
        result = run_cli("collect", "--model_path", "builtin:tiny", "--data_dir", data,
                         "--output_dir", tmp_path / "runs")  # fmt: skip
    assert result.code == 2
    last_line(result)
    all_whole(tmp_path / "runs")
