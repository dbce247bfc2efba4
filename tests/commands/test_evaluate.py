"""Cloze scoring: against Hugging Face token by token, and where acc and acc_norm part."""

import numpy as np
import pytest
import torch

from tl_headnorm.commands.evaluate import evaluate as study
from tl_headnorm.commands.evaluate.settings import EvaluateSettings
from tl_headnorm.data.questions import parse_record
from tl_headnorm.data.templates import get_template
from tl_headnorm.model.loading import load_model


def question(texts, labels="ABCDE", key="A", stem="Which one?"):
    choices = {"text": list(texts), "label": list(labels[: len(texts)])}
    return parse_record({"id": "q", "question": stem, "choices": choices, "answerKey": key})


@pytest.fixture(scope="module")
def model(llama_dir):
    return load_model(llama_dir, dtype="fp32", device_map="cpu")


def by_hugging_face(model, q):
    """One forward per option, no padding, no shared prefix, no package code but the template."""
    prompt = get_template("cloze").render(q)
    tokenizer, totals = model.tokenizer, []
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for option in q.options:
        whole = tokenizer(f"{prompt} {option}", add_special_tokens=False)["input_ids"]
        start = next(i for i, t in enumerate(whole) if i >= len(bare) or t != bare[i])
        ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
        logprobs = torch.log_softmax(model.hf(ids).logits[0].double(), -1)
        totals.append(sum(logprobs[i, whole[i]].item() for i in range(start, len(whole))))
    return totals


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_equals_hugging_face_with_three_four_and_five_options(model, padding_side, n):
    texts = ["stone", "the river bed", "a", "the river", "stones and a river"][:n]
    q = question(texts, labels="12345", key="2")
    scores = study.score_cloze(
        model, [q], get_template("cloze"), EvaluateSettings(padding_side=padding_side)
    )
    np.testing.assert_allclose(scores.logprobs[0], by_hugging_face(model, q), atol=2e-4)
    assert scores.characters[0].tolist() == [len(text) for text in texts]


def test_fixed_logits_part_acc_from_acc_norm(model, monkeypatch):
    """Every token has the same log-probability: acc takes the fewest tokens, acc_norm not.

    With p constant the sum is -n_tokens * c; per character a long word of few tokens wins.
    """
    texts = ["on", "the the the the the the the the", "stone"]
    q = question(texts, labels="123", key="2")
    vocabulary = model.tl.cfg.d_vocab

    def flat(resid):
        return torch.zeros(*resid.shape[:2], vocabulary)

    monkeypatch.setattr(model.engine, "logits", flat)
    scores = study.score_cloze(model, [q], get_template("cloze"))
    rows = study._option_rows(model.tokenizer, q, get_template("cloze"), True, 384)
    n_tokens = np.array([len(ids) - start for ids, start in rows])
    np.testing.assert_allclose(scores.logprobs[0], -n_tokens * np.log(vocabulary), rtol=1e-6)
    characters = np.array([len(text) for text in texts])
    assert scores.predicted(False)[0] == np.argmin(n_tokens)
    assert scores.predicted(True)[0] == np.argmin(n_tokens / characters)
    assert scores.predicted(False)[0] != scores.predicted(True)[0]
    # The rival: the leading space counted among the characters.
    counted = scores.logprobs[0] / (characters + 1)
    assert not np.allclose(counted, scores.logprobs[0] / characters)


def test_evaluate_names_its_scoring(model):
    questions = [question(["stone", "river", "the", "on"], key=key) for key in "ABCD"]
    by_text = study.evaluate(model, questions, EvaluateSettings(scoring="cloze", max_length=64))
    assert by_text.attrs["scoring"] == "cloze"
    assert by_text.attrs["acc"] == 0.25  # the same scores for all four, whose answers differ
    assert by_text.attrs["acc_stderr"] == pytest.approx(0.25)
    by_letter = study.evaluate(model, questions, EvaluateSettings(max_length=200))
    assert by_letter.attrs["template"] == "arc_mcq_v1"
    assert "acc_norm" not in by_letter.attrs
