"""The demo: the whole main job on the built-in model, without network."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from tl_headnorm.commands.demo.command import unicode_heatmap


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_demo(run_cli, tmp_path, no_network):
    result = run_cli("demo", "--output_dir", tmp_path, "--validate_samples", "16")
    assert result.code == 0
    path = tmp_path / result.out.splitlines()[-1]
    meta = json.loads((path / "meta.json").read_text())
    assert meta["accuracy"] >= 0.95
    assert meta["num_processed"] >= 400
    assert meta["validated_against_hf"] < 1e-4
    assert "strongest (layer.head)" in result.err
    assert (path / "head_output_norm_heatmap.png").stat().st_size > 10_000


def test_the_built_in_model_reads_the_question_not_a_position(run_cli, tmp_path):
    """Options in reversed order: the accuracy stays, so the letters follow the contents."""
    from dataclasses import replace

    from tl_headnorm import collect, load_model, load_questions

    questions = load_questions("builtin:questions", max_samples=100)
    turned = [
        replace(q, options=q.options[::-1], answer=len(q.options) - 1 - q.answer) for q in questions
    ]
    model = load_model("builtin:tiny", dtype="fp32", device_map="cpu")
    run = collect(model, turned, progress=False)
    assert run.attrs["accuracy"] > 0.9


def test_unicode_heatmap():
    text = unicode_heatmap(np.array([[0.0, 1.0], [np.nan, 0.5]]))
    lines = text.splitlines()
    assert "   ███" in lines[1]
    assert "···▒▒▒" in lines[2]


def test_the_real_demo(smollm2, tmp_path, capsys):
    """`make demo-real` at a small size: both runs are complete."""
    import demo_real

    demo_real.main(demo_real.DemoReal(max_samples=4, output_dir=str(tmp_path)))
    run, heads = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert (run / "report.html").is_file()
    assert (heads / "attention.html").is_file()
    for path in (run, heads):
        assert json.loads((path / "meta.json").read_text())["model"]["n_layers"] == 30
