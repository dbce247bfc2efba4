"""Models that are not there, damaged, of another kind, or bring code: one clear line each."""

import json
import os
import warnings

import pytest
import torch
from conftest import train_tokenizer
from hostile import Cases, copy_of, edit_config, last_line
from safetensors.torch import load_file, save_file

from tl_headnorm import load_model
from tl_headnorm.errors import InputError

case = Cases()


@case("model_path: expected a hub id (owner/name) or an existing directory, found nothing at ",
      "no_model; check the path")  # fmt: skip
def missing_model(folder, model):
    return {"model_path": folder / "no_model"}


@case("model_path: expected a directory in Hugging Face format, found no config.json in ")
def no_config(folder, model):
    return {"model_path": folder}


@case("model_path: expected a hub id (owner/name) or an existing directory, found nothing")
def a_file_as_model(folder, model):
    return {"model_path": model / "config.json"}


@case("model_path: the config of ", " could not be read: ")
def broken_config(folder, model):
    path = copy_of(model, folder)
    (path / "config.json").write_text("{")
    return {"model_path": path}


@case("model_path: expected an architecture among", "LlamaForCausalLM", "found BertForMaskedLM in")
def another_architecture(folder, model):
    path = copy_of(model, folder)
    edit_config(path, architectures=["BertForMaskedLM"], model_type="bert")
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def damaged_weights(folder, model):
    path = copy_of(model, folder)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def not_safetensors(folder, model):
    path = copy_of(model, folder)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def no_weights(folder, model):
    path = copy_of(model, folder)
    (path / "model.safetensors").unlink()
    return {"model_path": path}


@case("model_path: expected all tensors of the architecture in ", "found 2 missing (",
      "model.layers.1.self_attn.o_proj.weight")  # fmt: skip
def missing_tensors(folder, model):
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.self_attn.o_proj.weight"]
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return {"model_path": path}


@case(
    "model_path: expected tensors of the sizes in the config of ",
    "found 1 other (model.layers.1.self_attn.o_proj.weight (42, 50) instead of (42, 60)); mend",
)
def tensors_of_another_size(folder, model):
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name] = state[name][:, :-10].contiguous()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return {"model_path": path}


@case("model_path: the tokenizer of ", " could not be read: ")
def no_tokenizer(folder, model):
    path = copy_of(model, folder)
    for file in path.glob("tokenizer*"):
        file.unlink()
    return {"model_path": path}


@case("model_path: the config of nobody/nothing could not be read: ", "a hub id that can be reach")
def hub_out_of_reach(folder, model):
    return {"model_path": "nobody/nothing"}


@case(
    "self_check: expected finite numbers, found NaN or infinity in layer 1, head 0, 1, 2, 3 and 2 "
)
def nan_weights(folder, model):
    return {"model_path": with_nan(folder, model, slice(None))}


@case("head_output_norm: expected finite values, found nan in layer 1, head 2 of sample q",
      "check the weights")  # fmt: skip
def nan_in_one_head(folder, model):
    return {"model_path": with_nan(folder, model, slice(20, 30)), "self_check": "false"}


@case("head_output_norm: expected finite values, found nan in layer 1, head 0 of sample q")
def nan_in_a_whole_layer(folder, model):
    return {"model_path": with_nan(folder, model, slice(None)), "self_check": "false"}


def with_nan(folder, model, rows):
    """NaN in some of layer 1's query rows, ten to a head."""
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][rows] = torch.nan
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@case("device_map: expected auto, cpu or a device that is here, found 'cuda:99' (")
def no_such_device(folder, model):
    return {"device_map": "cuda:99"}


@case("device_map: expected auto, cpu or a device that is here, found 'gpu' (")
def misnamed_device(folder, model):
    return {"device_map": "gpu"}


def changed(folder, model, change):
    """A copy of the model whose tensors `change` has edited."""
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def filled(folder, model, name, where, value):
    def fill(state):
        state[name][where] = value

    return changed(folder, model, fill)


@case("self_check: expected finite numbers, found NaN or infinity in layer 1, head 2; the tensor ",
      "model.layers.1.self_attn.q_proj.weight holds such numbers: mend the weights")  # fmt: skip
def nan_in_one_heads_query(folder, model):
    return {"model_path": with_nan(folder, model, slice(20, 30))}


@case("found NaN or infinity in layer 2, head 3; the tensor model.layers.2.self_attn.o_proj.weight")
def infinity_in_one_heads_output(folder, model):
    columns = (slice(None), slice(30, 40))
    name = "model.layers.2.self_attn.o_proj.weight"
    return {"model_path": filled(folder, model, name, columns, torch.inf)}


@case("found NaN or infinity in layer 0, head 3, 4, 5; the tensor model.layers.0.self_attn.v_proj.")
def nan_in_a_groups_value(folder, model):
    name = "model.layers.0.self_attn.v_proj.weight"
    return {"model_path": filled(folder, model, name, slice(10, 20), torch.nan)}


@case("found NaN or infinity in layer 1, head 0, 1, 2, 3 and 2 more; the tensor ",
      "model.layers.0.mlp.up_proj.weight holds such numbers")  # fmt: skip
def nan_in_an_mlp(folder, model):
    name = "model.layers.0.mlp.up_proj.weight"
    return {"model_path": filled(folder, model, name, 3, torch.nan)}


@case("found NaN or infinity outside the attention heads; the tensor lm_head.weight holds")
def nan_in_the_unembedding(folder, model):
    return {"model_path": filled(folder, model, "lm_head.weight", 5, torch.nan)}


@case(
    "model_path: expected no tensors but the architecture's in ",
    "found 1 more (model.layers.3.self_attn.o_proj.weight), which would not be run; mend config",
)
def a_layer_the_config_does_not_know(folder, model):
    def add(state):
        state["model.layers.3.self_attn.o_proj.weight"] = torch.ones(42, 60)

    return {"model_path": changed(folder, model, add)}


@case("model_path: expected no tensors but", "found 1 more (model.layers.0.self_attn.q_proj.bias)")
def a_bias_the_config_does_not_know(folder, model):
    def add(state):
        state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(60)

    return {"model_path": changed(folder, model, add)}


@case("found 2 other (lm_head.weight (400, 42) instead of (10, 42), model.embed_tokens.weight (")
def a_smaller_vocabulary(folder, model):
    path = copy_of(model, folder)
    edit_config(path, vocab_size=10)
    return {"model_path": path}


@case("model_path: the config of ", "integer modulo by zero")
def no_heads(folder, model):
    path = copy_of(model, folder)
    edit_config(path, num_attention_heads=0)
    return {"model_path": path}


@case("model_path: expected a model that takes prompts of 2 tokens or more, found 0 in config")
def no_positions(folder, model):
    path = copy_of(model, folder)
    edit_config(path, max_position_embeddings=0)
    return {"model_path": path}


@case("model_path: expected no tensors but the architecture's in ", "found 9 more (model.layers.2.")
def fewer_layers_than_weights(folder, model):
    path = copy_of(model, folder)
    edit_config(path, num_hidden_layers=2)
    return {"model_path": path}


@case("model_path: expected all tensors of the architecture in ", "found 9 missing (model.layers.3")
def more_layers_than_weights(folder, model):
    path = copy_of(model, folder)
    edit_config(path, num_hidden_layers=4)
    return {"model_path": path}


@case("model_path: expected a tokenizer of at most the embedding's 400 tokens in ", "found 500; it")
def another_models_tokenizer(folder, model):
    path = copy_of(model, folder)
    train_tokenizer([chr(i) * 3 for i in range(0x100, 0x200)] * 9, 500).save_pretrained(path)
    return {"model_path": path}


@case("model_path: the tokenizer of ", " could not be read: ")
def a_damaged_tokenizer(folder, model):
    path = copy_of(model, folder)
    (path / "tokenizer.json").write_text("{}")
    return {"model_path": path}


@case("model_path: expected weights as safetensors in ", "found pickled ones (pytorch_model.bin), ",
      "save_pretrained(..., safe_serialization=True), or pass --pickled_weights true")  # fmt: skip
def pickled(folder, model):
    return {"model_path": pickle_of(folder, model)}


def pickle_of(folder, model):
    path = copy_of(model, folder)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


@case("model_path: the weights of ", " could not be read: ")
def a_pickle_that_runs_code(folder, model):
    """Asked for, it is still read without running what it holds."""
    path = pickle_of(folder, model)
    torch.save({"x": Evil(folder / "marker")}, path / "pytorch_model.bin")
    return {"model_path": path, "pickled_weights": "true"}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@case(
    "adapter_path: expected a PEFT adapter's directory or hub id, found no adapter_config.json in"
)
def no_adapter(folder, model):
    (folder / "adapter").mkdir()
    return {"adapter_path": folder / "adapter"}


def adapter(folder, model, **lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    with warnings.catch_warnings():  # of peft's own use of transformers
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(base, LoraConfig(r=2, **lora)).save_pretrained(folder / "adapter")
    return folder / "adapter"


@case("adapter_path: expected weights as safetensors in ", "found pickled ones (adapter_model.bin)")
def a_pickled_adapter(folder, model):
    path = adapter(folder, model, target_modules=["q_proj"])
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    return {"adapter_path": path}


@case("adapter_path: expected an adapter for LlamaForCausalLM of this size, found one that does no")
def a_damaged_adapter(folder, model):
    path = adapter(folder, model, target_modules=["q_proj"])
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[:50])
    return {"adapter_path": path}


@case("adapter_path: expected an adapter for LlamaForCausalLM of this size, found one that does no")
def an_adapter_with_nan(folder, model):
    path = adapter(folder, model, target_modules=["q_proj"])
    state = load_file(path / "adapter_model.safetensors")
    next(iter(state.values()))[:] = torch.nan
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"adapter_path": path}


@case("model_path: the config of ", "its repository brings code of its own: read it, then pass ",
      "--trust_remote_code true if you trust it")  # fmt: skip
def code_in_the_repository(folder, model):
    return {"model_path": with_code(folder, model)}


def with_code(folder, model):
    """A repository whose config and model are classes of its own, which leave a mark."""
    path = copy_of(model, folder)
    mark = f"with open({str(folder / 'marker')!r}, 'a') as f:\n    f.write(__name__ + ' ')\n"
    (path / "configuration_x.py").write_text(
        mark + "from transformers import LlamaConfig\n"
        "class XConfig(LlamaConfig):\n    model_type = 'marked'\n"
    )
    (path / "modeling_x.py").write_text(
        mark + "from transformers import LlamaForCausalLM as Base\n"
        "from .configuration_x import XConfig\n"
        "class LlamaForCausalLM(Base):\n    config_class = XConfig\n"
    )
    classes = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.LlamaForCausalLM",
    }
    edit_config(path, auto_map=classes, model_type="marked")
    return path


@case.table
def test_one_clear_line(name, run_cli, flags, tmp_path, llama_dir):
    case.check(name, run_cli, flags, tmp_path, llama_dir)


def test_no_case_ran_anothers_code(run_cli, flags, tmp_path, llama_dir):
    path = with_code(tmp_path, llama_dir)
    assert run_cli("collect", *flags({"model_path": path})).code == 2
    assert not (tmp_path / "marker").exists()
    trusted = {"model_path": path, "trust_remote_code": "true", "max_samples": 1}
    assert run_cli("collect", *flags(trusted)).code == 0
    assert "modeling_x" in (tmp_path / "marker").read_text(), "the mark is really left"


def test_code_beside_a_known_architecture_stays_unread(run_cli, flags, tmp_path, llama_dir):
    """transformers has a LLaMA of its own; the repository's is not wanted."""
    path = with_code(tmp_path, llama_dir)
    edit_config(path, model_type="llama")
    assert run_cli("collect", *flags({"model_path": path, "max_samples": 1})).code == 0
    assert not (tmp_path / "marker").exists()


def test_a_tokenizers_code_is_not_run_either(run_cli, flags, tmp_path, llama_dir):
    path = copy_of(llama_dir, tmp_path)
    (path / "tokenization_x.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\nclass XTokenizer: pass\n"
    )
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    settings["tokenizer_class"] = "XTokenizer"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run_cli("collect", *flags({"model_path": path, "max_samples": 1}))
    assert not (tmp_path / "marker").exists()
    if result.code:
        assert "--trust_remote_code true" in last_line(result)


def test_pickle_runs_nothing_even_when_asked_for(run_cli, flags, tmp_path, llama_dir):
    changes = a_pickle_that_runs_code(tmp_path, llama_dir)
    assert run_cli("collect", *flags(changes)).code == 2
    assert not (tmp_path / "marker").exists()
    torch.load(changes["model_path"] / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "marker").exists(), "the rival, a plain load, runs it"


def test_pickled_weights_when_asked_for(run_cli, flags, tmp_path, llama_dir):
    path = pickle_of(tmp_path, llama_dir)
    changes = {"model_path": path, "pickled_weights": "true", "max_samples": 1}
    assert run_cli("collect", *flags(changes)).code == 0
    same = load_model(path, dtype="fp32", device_map="cpu", pickled_weights=True)
    ours = load_model(llama_dir, dtype="fp32", device_map="cpu")
    for a, b in zip(same.hf.parameters(), ours.hf.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="found pickled ones"):
        load_model(path)


def test_a_pickled_adapter_when_asked_for(run_cli, flags, tmp_path, llama_dir):
    path = a_pickled_adapter(tmp_path, llama_dir)["adapter_path"]
    changes = {"adapter_path": path, "pickled_weights": "true", "max_samples": 1}
    assert run_cli("collect", *flags(changes)).code == 0


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_buffers_of_older_checkpoints_pass(name, tmp_path, llama_dir):
    def add(state):
        state[name] = torch.ones(5)

    assert load_model(changed(tmp_path, llama_dir, add), dtype="fp32", device_map="cpu")


def test_fp16_on_a_device_that_cannot(run_cli, flags, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("\"softmax_lastdim_kernel_impl\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "softmax", refuse)
    result = run_cli("collect", *flags({"dtype": "fp16"}))
    assert result.code == 2
    assert result.error_line == (
        "tl-headnorm: dtype: expected one that cpu computes, found fp16 "
        "(\"softmax_lastdim_kernel_impl\" not implemented for 'Half'); use --dtype bf16 or "
        "--dtype fp32"
    )
    assert not any((tmp_path / "runs").glob("*"))


def test_numbers_beyond_the_data_type(tmp_path, llama_dir):
    """The weights are finite, what float16 makes of them is not."""

    def widen(state):
        for name in state:
            if "mlp" in name:
                state[name] *= 3000

    path = changed(tmp_path, llama_dir, widen)
    load_model(path, dtype="fp32", device_map="cpu", self_check=False)
    with pytest.raises(InputError, match=r"the weights are finite, so the data type is too narrow"):
        load_model(path, dtype="fp16", device_map="cpu")
