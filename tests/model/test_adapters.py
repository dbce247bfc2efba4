"""A PEFT adapter merged into the model, with the base left as it was."""

import pytest
import torch
from handmade import family_model, llama
from test_hugging_face import random_samples, worst

from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.self_check import relative_difference

pytest.importorskip("peft", reason="the extra peft is not installed")
pytestmark = [
    # peft asks transformers for a property under its old name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    # peft looks for the base model's config where a model in memory has none
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
IDS = torch.arange(3, 20)[None]


def make_adapter(path, base, modules=("q_proj", "v_proj", "o_proj"), **more):
    """A LoRA adapter with random weights, saved; gives its logits, computed without merging."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    more |= {"init_lora_weights": False}
    config = LoraConfig(r=3, lora_alpha=7, target_modules=list(modules), **more)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(path)
    with torch.no_grad():
        return adapted(IDS).logits


@pytest.mark.parametrize("engine", ["auto", "bridge"])
def test_merging_equals_the_adapter_and_spares_the_base(tmp_path, engine):
    expected = make_adapter(tmp_path, llama())
    base = llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    types = {name: type(module) for name, module in base.named_modules()}
    model = load_model(hf_model=base, adapter_path=tmp_path, engine=engine)
    assert relative_difference(model.hf(IDS).logits, expected) < 1e-5
    assert relative_difference(base(IDS).logits, expected) > 1e-2  # the adapter does something
    assert worst(model, random_samples(5, 3, 20, 97)) < 1e-4
    assert model.info.adapter == str(tmp_path)
    assert {name: type(module) for name, module in base.named_modules()} == types
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_only_adapted_weights_take_memory(tmp_path):
    make_adapter(tmp_path, llama(), modules=["q_proj"])
    base = llama()
    merged = load_model(hf_model=base, adapter_path=tmp_path).hf
    ours, theirs = merged.model.layers[0], base.model.layers[0]
    pointer = lambda module: module.weight.untyped_storage().data_ptr()  # noqa: E731
    assert pointer(ours.mlp.up_proj) == pointer(theirs.mlp.up_proj)
    assert pointer(ours.self_attn.q_proj) != pointer(theirs.self_attn.q_proj)


def test_merging_into_the_base_itself_would_change_it(tmp_path):
    """The naive rival."""
    from peft import PeftModel

    make_adapter(tmp_path, llama())
    base = llama()
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    assert not torch.equal(base.model.layers[0].self_attn.q_proj.weight, before)


def test_gpt2s_conv1d_is_adapted_too(tmp_path):
    names = ["c_attn", "c_proj"]
    expected = make_adapter(tmp_path, family_model("gpt2"), modules=names, fan_in_fan_out=True)
    model = load_model(hf_model=family_model("gpt2"), adapter_path=tmp_path)
    assert relative_difference(model.hf(IDS).logits, expected) < 1e-5


def test_what_does_not_fit_is_one_line(tmp_path):
    make_adapter(tmp_path / "small", llama())
    with pytest.raises(InputError, match="adapter_path: expected an adapter for LlamaForCausalLM"):
        load_model(hf_model=llama(hidden_size=54), adapter_path=tmp_path / "small")
    with pytest.raises(InputError, match=r"no adapter_config\.json in"):
        load_model(hf_model=llama(), adapter_path=tmp_path / "nothing")
    with pytest.raises(InputError, match="found some missing"):
        load_model(hf_model=llama(num_hidden_layers=4), adapter_path=tmp_path / "small")
