"""What results look like in a notebook, and what an interrupt leaves behind."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils._python_dispatch import TorchDispatchMode

import tl_headnorm
from tl_headnorm import collect, load_model, load_questions
from tl_headnorm.commands.ablate.ablate import Data, ablate
from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.commands.attribute.attribute import attribute
from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.commands.massive.massive import Inputs, study_massive
from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.plots.notebook import run_html, show_runs

ENGINES = ("hooked", "bridge")


@pytest.fixture(scope="module", params=ENGINES)
def model(request):
    return load_model(
        "builtin:tiny", dtype="fp32", device_map="cpu", engine=request.param, self_check=False
    )


@pytest.fixture(scope="module")
def questions():
    return load_questions("builtin:questions")[:12]


@pytest.fixture(scope="module")
def run(questions):
    model = load_model("builtin:tiny", dtype="fp32", device_map="cpu", self_check=False)
    return collect(model, questions, progress=False)


# Forms.


def ours(run):
    """What is shown before xarray's own form, which has ids that change."""
    return run_html(run).partition("<details>")[0]


def test_a_run_in_small(run):
    text = run_html(run)
    for part in ("builtin:tiny", "12 samples", "4 layers × 8 heads", "accuracy (letter)",
                 "head_output_norm", "LlamaForCausalLM", "fp32", "all variables"):  # fmt: skip
        assert part in text
    assert len(ours(run)) < 10_000
    mean = run["head_resid_contrib_norm_mean"].values
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    assert f"largest (layer.head): {layer}.{head} ({mean.max():.3g})" in text
    assert "<script" not in ours(run)


def test_the_small_map_is_the_data(run):
    import base64
    import io
    import re

    from matplotlib.image import imread

    found = re.findall(r"data:image/png;base64,([^\"]+)", run_html(run))
    names = [n for n in run.data_vars if n.endswith("_mean")]
    assert len(found) == min(len(names), 6)
    pixels = imread(io.BytesIO(base64.b64decode(found[0])))
    assert pixels.shape[:2] == (4, 8)
    # Viridis grows brighter all the way: its order of brightness is that of the values.
    brightness = (pixels[..., :3] @ [0.299, 0.587, 0.114]).ravel()
    values = run[names[0]].values.ravel()
    assert np.corrcoef(brightness.argsort().argsort(), values.argsort().argsort())[0, 1] > 0.99


def test_text_of_others_is_escaped_and_other_datasets_are_left_alone(run):
    run = run.copy()
    run.attrs = {**run.attrs, "dataset": {"name": "<script>alert(1)</script>", "split": ""}}
    assert "<script>alert" not in ours(run)
    assert "&lt;script&gt;alert" in ours(run)
    for plain in (xr.Dataset({"x_mean": (("layer", "head"), np.ones((2, 2)))}), xr.Dataset()):
        assert "class=tlh" not in run_html(plain)
        assert "xr-wrap" in run_html(plain)


def test_missing_layers_and_signs(run):
    run = run.copy(deep=True)
    run["head_output_norm_mean"][1] = np.nan
    run["head_resid_contrib_norm_mean"] -= 9
    run.attrs["missing_layers"] = [1]
    text = run_html(run)
    assert "no data for layers [1]" in text
    assert "(nan)" not in text
    run["head_output_norm_mean"][:] = np.nan
    assert "no data</figcaption>" in run_html(run)


def test_ipython_is_told(run, monkeypatch):
    from IPython.core.formatters import DisplayFormatter

    class Shell:
        display_formatter = DisplayFormatter()

    form = lambda: Shell.display_formatter.format(run)[0]["text/html"]  # noqa: E731
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    show_runs()
    assert "class=tlh" not in form()
    monkeypatch.setattr("IPython.get_ipython", Shell)
    show_runs()
    assert "class=tlh" in form()
    assert "class=tlh" in run_html(run)


def test_a_loaded_run_shows_itself(finished, monkeypatch):
    from IPython.core.formatters import DisplayFormatter

    class Shell:
        display_formatter = DisplayFormatter()

    monkeypatch.setattr("IPython.get_ipython", Shell)
    run = tl_headnorm.load_run(finished)  # the package's names are looked up inside IPython
    assert "class=tlh" in Shell.display_formatter.format(run)[0]["text/html"]


def test_a_model_and_questions_in_one_line(model, questions):
    assert repr(model) == (
        f"Model(builtin:tiny: LlamaForCausalLM, 4 layers x 8 heads (2 key/value), d_model 128, "
        f"d_head 32, fp32, {model.info.engine}, cpu)"
    )
    assert repr(questions) == "Questions(builtin:questions test: 12 questions)"


# Interrupts.


class Interrupt(TorchDispatchMode):
    """Ctrl-C at the `at`-th operation of torch; without it, counts them."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def state(model):
    """Everything an interrupted run could leave behind on a model."""
    hooks = {}
    for which, module in (("tl", model.tl), ("hf", model.hf)):
        for name, part in module.named_modules():
            kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            hooks[which, name] = [len(getattr(part, kind)) for kind in kinds]
            if hasattr(part, "fwd_hooks"):
                hooks[which, name] += [len(part.fwd_hooks), len(part.bwd_hooks)]
            # A forward put on the instance, over the class's own.
            hooks[which, name].append("forward" in vars(part))
    asked = [p.requires_grad for p in model.hf.parameters()]
    settings = {k: v for k, v in vars(model.tl.cfg).items() if isinstance(v, (bool, int, str))}
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return hooks, asked, settings, grad


def by_collect(model, questions, **settings):
    return collect(model, questions, progress=False, batch_size=5, **settings)


def by_ablate(model, questions):
    encoded = prepare(model.tokenizer, model.n_ctx, questions, AblateSettings()).encoded
    data = Data(encoded[:6], encoded[6:], [q.answer for q in questions[:6]])
    return ablate(model, data, AblateSettings(heads="all", method="mean,resample"))


def by_massive(model, questions):
    encoded = prepare(model.tokenizer, model.n_ctx, questions, AblateSettings()).encoded
    inputs = Inputs(encoded[:4], [], answers=[q.answer for q in questions[:4]], texts=False)
    settings = MassiveSettings(dataset="builtin:questions", sweep_layers=False)
    return study_massive(model, inputs, settings)


def by_attribute(model, questions):
    methods = ("ig_joint", "loo")
    settings = AttributeSettings(methods=methods, steps=8, max_steps=8, tolerance=9.0)
    return attribute(model, questions[:4], settings)


WORK = [
    *((engine, work) for engine in ENGINES for work in (by_collect, by_ablate, by_massive)),
    ("hooked", by_attribute),
]


@pytest.mark.parametrize(("model", "work"), WORK, indirect=["model"])
def test_an_interrupt_leaves_nothing_behind(model, questions, work):
    clean = by_collect(model, questions)
    before = state(model)
    with Interrupt() as counted:
        work(model, questions)
    assert counted.count > 100
    assert state(model) == before
    for share in (0.2, 0.5, 0.8, 0.97):
        with pytest.raises(KeyboardInterrupt), Interrupt(int(share * counted.count)):
            work(model, questions)
        assert state(model) == before, f"after an interrupt at {share:.0%}"
    again = by_collect(model, questions)
    for name in clean.data_vars:
        assert np.array_equal(clean[name], again[name]), name


def test_what_is_left_behind_would_be_seen(model):
    before = state(model)
    handle = model.tl.hook_dict["blocks.1.attn.hook_z"].register_forward_hook(lambda *_: None)
    assert state(model) != before
    handle.remove()
    assert state(model) == before
