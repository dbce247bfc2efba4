"""The runner: halving, chains, bases and logs change no number."""

import numpy as np
import pytest
import torch
from handmade import llama

from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.cached_run import CachedRun
from tl_headnorm.interventions.edits import Ablation
from tl_headnorm.interventions.gates import Gates
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import Letters, Profile
from tl_headnorm.interventions.runner import most_tokens, plan, run
from tl_headnorm.model.loading import load_model
from tl_headnorm.run.log import InMemory, OnDisk
from tl_headnorm.run.segments import Gathered, units_of
from tl_headnorm.settings import Settings

METRIC = Letters([0, 3, 1, 2, 2])
EVERY = [(layer, head) for layer in range(3) for head in range(6)]
SWEEP = [Ablation(f"{layer}.{head}", heads=((layer, head),)) for layer, head in EVERY]


def prompts(lengths=(9, 6, 12, 7, 6)):
    rng = np.random.default_rng(3)
    rows = [tuple(int(t) for t in rng.integers(3, 90, n)) for n in lengths]
    return [Encoded(i, (1, *row), letter_ids=(20, 21, 22, 23)) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def model():
    return load_model(hf_model=llama(dtype=torch.float64), self_check=False)


@pytest.fixture(scope="module")
def truth(model):
    return run(model, prompts(), SWEEP, METRIC, share=False, settings=Settings(batch_size=1))


def same(found, truth):
    assert set(found) == set(truth)
    for name, values in found.items():
        np.testing.assert_allclose(values, truth[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("room", [7, 3, 1])
def test_what_does_not_fit_is_halved_a_stack_first_then_the_batch(model, truth, room, monkeypatch):
    sizes = []
    engine_run = type(model.engine).run

    def small(self, start, mask, *args, **kwargs):
        sizes.append(len(mask))
        if len(mask) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return engine_run(self, start, mask, *args, **kwargs)

    monkeypatch.setattr(type(model.engine), "run", small)
    same(run(model, prompts(), SWEEP, METRIC, settings=Settings(batch_size=5)), truth)
    assert max(sizes) > room
    if room == 7:  # stacks of one run of the batch of five fit
        assert {size for size in sizes if size <= room} == {5}


def test_one_prompt_that_does_not_fit_is_said(model, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.engine), "run", full)
    with pytest.raises(InputError, match="expected room for one prompt of"):
        run(model, prompts(), SWEEP, METRIC)


def test_units_are_numbered_and_any_log_gathers_them(model, truth, tmp_path):
    """Two processes that do every other unit, and one that was interrupted and resumed."""
    settings = Settings(batch_size=2)
    units = plan(prompts(), SWEEP, settings, most_tokens(model, settings))
    assert [unit.number for unit in units] == list(range(len(units)))
    done = sorted((s.index, number) for u in units for s in u.samples for number in u.runs)
    assert done == [(s, number) for s in range(5) for number in range(1 + len(SWEEP))]

    class Part(OnDisk):
        """Every other unit, from `first` on."""

        def __init__(self, folder, first):
            super().__init__(folder, 0.0)
            self.first = first

        def missing(self, units):
            return [unit for unit in super().missing(units) if unit.number % 2 == self.first]

        def gather(self):
            return super().gather() if self.first else InMemory.gather(self)

    tmp_path.joinpath("log").mkdir()
    first = Part(tmp_path / "log", 0)
    first.gathered = Gathered([], 0)
    run(model, prompts(), SWEEP, METRIC, settings=settings, log=first)
    assert 0 < len(first.segments()) < len(units)
    second = Part(tmp_path / "log", 1)
    same(run(model, prompts(), SWEEP, METRIC, settings=settings, log=second), truth)
    assert sorted(u for p in second.segments() for u in units_of(p)) == list(range(len(units)))


def test_a_chain_starts_each_run_from_the_one_before_it(model):
    """Heads that join one by one, each from its own layer, against whole passes."""
    order = np.random.default_rng(1).permutation(len(EVERY))
    gates = torch.zeros(3, 6, dtype=torch.float64)
    chain = [Gates("all off", gates.clone(), since=0)]
    for layer, head in (EVERY[i] for i in order):
        gates[layer, head] = 1
        chain.append(Gates(f"and {layer}.{head}", gates.clone(), since=layer))
    found = run(model, prompts(), chain, METRIC, chained=True, settings=Settings(batch_size=3))
    whole = [Gates(one.name, one.gates) for one in chain]
    same(found, run(model, prompts(), whole, METRIC, share=False))
    np.testing.assert_allclose(found["loss"][-1], found["loss"][0], rtol=1e-12)
    # The rival, each from the clean run, leaves the layers below as they were.
    rival = run(model, prompts(), chain, METRIC)
    assert np.abs(rival["loss"] - found["loss"]).max() > 1e-3


def test_a_base_is_in_place_in_every_run(model):
    base = Ablation("base", heads=((0, 1), (2, 3)))
    found = run(model, prompts(), SWEEP, METRIC, base=base)
    both = [Ablation("both", heads=(*base.heads, *one.heads)) for one in SWEEP]
    whole = run(model, prompts(), [base, *both], METRIC)
    for name in ("loss", "correct"):
        np.testing.assert_allclose(found[name], whole[name][1:], rtol=1e-9)
    assert (found["kl"][0] == 0).all()  # of the base's distribution to each run's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_behind_the_scores_rounds_as_the_pass_does(dtype):
    """A mask that chooses no head, started in every layer: the clean run, bit for bit."""
    model = load_model(hf_model=llama(dtype=dtype), self_check=False)
    rows = Rows.pad(model, prompts(), "right")
    clean = CachedRun(rows, starts=range(3), last_only=True)
    for layer in range(3):
        same_z = (f"blocks.{layer}.attn.hook_z", lambda z, hook: z.clone())
        resid = clean.stack([[same_z]], layer)[0]
        assert torch.equal(resid, clean.resid)


def test_readers_before_the_start_give_the_clean_run_s(model):
    late = [Ablation("last", heads=((2, 0),))]
    found = run(model, prompts(), late, Profile())
    whole = run(model, prompts(), late, Profile(), share=False)
    same(found, whole)
    assert np.array_equal(found["top1"][0, :, :2], found["top1"][1, :, :2])
    assert (found["top1"][0, :, 2] != found["top1"][1, :, 2]).any()


def test_a_run_starts_behind_its_layer_s_scores(model):
    """One head of layer 1 off: attention is computed in layer 2 alone."""
    rows = Rows.pad(model, prompts(), "left")
    clean = CachedRun(rows, starts=range(3), last_only=True)
    fired = []
    points = [(f"blocks.{layer}.attn.hook_q", lambda q, hook: fired.append(hook.name))
              for layer in range(3)]  # fmt: skip
    with model.tl.hooks(fwd_hooks=points):
        resid = clean.stack([one.hooks(rows) for one in SWEEP[6:12]], 1)
    assert fired == ["blocks.2.attn.hook_q"]
    assert resid.shape == (6, 5, 1, model.info.d_model)
