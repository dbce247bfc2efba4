"""What several tests share: a small random model on disk, questions, and the command line."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# Nothing here may reach the network; read by the libraries when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Small models: two workers of one thread each are several times faster than threads that wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# All sizes differ, so that a wrong axis cannot fit; 6 * 10 heads' width is not d_model.
SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_size": 42,
    "intermediate_size": 44,
    "max_position_embeddings": 512,
}
STEMS = (
    "Which planet is closest to the Sun?",
    "What do plants need to make food?",
    "Which of these is a solid?",
    "Why does a ball fall down?",
    "What melts ice?",
    "Which animal can fly?",
    "What carries blood through the body?",
)
WORDS = ("heat", "light", "a stone", "gravity", "an owl", "water", "the heart", "Mercury")


def question_record(number, n_options=4, *, layout="ai2", digits=False, answer=None):
    """A well-formed record in AI2's or Hugging Face's layout, different for every number."""
    labels = [str(i + 1) if digits else "ABCDEFGHIJ"[i] for i in range(n_options)]
    texts = [f"{WORDS[(number + i) % len(WORDS)]} {i}" for i in range(n_options)]
    stem = f"{STEMS[number % len(STEMS)]} ({number})"
    key = labels[number % n_options] if answer is None else answer
    if layout == "ai2":
        choices = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
        question = {"stem": stem, "choices": choices}
        return {"id": f"q{number}", "question": question, "answerKey": key}
    choices = {"text": texts, "label": labels}
    return {"id": f"q{number}", "question": stem, "choices": choices, "answerKey": key}


def write_jsonl(path, records):
    """Write one JSON object a line; a record that is text already is written as it stands."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def train_tokenizer(texts, vocab_size=400, *, split=True):
    """A byte-level BPE tokenizer with BOS `<s>` and EOS `</s>` that adds BOS by itself.

    Without `split` merges may cross spaces, so that " A" becomes one token and a prompt's final
    space is part of it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def prompts(n=40):
    """Prompts of the default template, for a tokenizer to learn its merges from."""
    from tl_headnorm.data.questions import parse_record
    from tl_headnorm.data.templates import arc_mcq_v1

    questions = [parse_record(question_record(i, 4 + i % 2)) for i in range(n)]
    return [f"{arc_mcq_v1(q)}{q.answer_letter}" for q in questions]


def make_llama(path, tokenizer, *, seed=0, **changes):
    """Save a small random LLaMA model with a tokenizer to `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **{**SIZES, **changes},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # wider than the usual start, so that heads differ visibly
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def error_line(self):
        """The one line on stderr of a refused command."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"expected one line on stderr, found:\n{self.err}"
        assert lines[0].startswith("tl-headnorm: ")
        assert "Traceback" not in self.err
        return lines[0]

    @property
    def run_dir(self):
        assert self.code == 0, self.err
        return Path(self.out.splitlines()[-1])


def command_line(*args):
    """Run the command line in this process."""
    from tl_headnorm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in args])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_cli():
    return command_line


@pytest.fixture(scope="session")
def shared_data():
    """Real data kept beside the repository, not in it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data are not here: expected them in {path}")
    return path


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as a GGUF file; fetched where CI is set, else only if it is there."""
    from tl_headnorm.builtin.downloads import cached
    from tl_headnorm.commands.fetch.command import fetch

    if os.environ.get("CI"):
        return fetch("smollm2")
    if not cached("smollm2").is_file():
        pytest.skip("the real model is not here: tl-headnorm fetch smollm2")
    return cached("smollm2")


@pytest.fixture(scope="session")
def bpe():
    """A tokenizer for which the prompt's final space is a token of its own."""
    return train_tokenizer(prompts())


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, bpe):
    return make_llama(tmp_path_factory.mktemp("model") / "llama", bpe)


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory):
    """Seven test questions, two of them with five options, and one that is skipped."""
    records = [question_record(i, 5 if i in (2, 5) else 4, digits=i == 3) for i in range(7)]
    records.insert(4, question_record(50, 3))
    return write_jsonl(tmp_path_factory.mktemp("questions") / "test.jsonl", records)


@pytest.fixture(scope="session")
def small(llama_dir, questions_file):
    """Flags of a run that takes a second."""
    return ["--model_path", llama_dir, "--data_dir", questions_file, "--dtype", "fp32",
            "--device_map", "cpu", "--max_length", 400, "--batch_size", 3]  # fmt: skip


@pytest.fixture(scope="session")
def finished(run_cli, small, tmp_path_factory):
    """A finished run directory; read only."""
    return run_cli("collect", *small, "--output_dir", tmp_path_factory.mktemp("runs")).run_dir


@pytest.fixture
def flags(small, tmp_path):
    """The flags of a small run with some replaced, as a function."""
    from hostile import merged_flags

    return lambda changes: merged_flags(small, tmp_path, changes)


@pytest.fixture(scope="session")
def browser():
    """Chromium, for the tests of pages."""
    from chromium import find_chromium
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
