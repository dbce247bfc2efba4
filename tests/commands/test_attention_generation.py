"""What heads look at while writing, and beside distracting text."""

import numpy as np
import pytest
import torch

from tl_headnorm.commands.attention.distraction import distract, insert, instruction_keyword
from tl_headnorm.commands.attention.generation import write
from tl_headnorm.commands.attention.keywords import find_keyword
from tl_headnorm.data.spans import encode_text, find_spans
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model

STORY = "Once upon a time there was a little dog. The dog liked the park. He saw a cat and"
NASTY = "a <script>alert('x')</script> & $x_1$ </body> 🙂 气候变化"


@pytest.fixture(scope="module")
def stories_dir(shared_data):
    return str(shared_data / "stories260K")


@pytest.fixture(scope="module")
def stories(stories_dir):
    return load_model(stories_dir, dtype="fp32", device_map="cpu")


@pytest.fixture(scope="module")
def eager(stories_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        stories_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_rows_while_writing_are_hugging_faces(stories, eager):
    tokens = encode_text(stories.tokenizer, STORY)
    heads = ((0, 3), (2, 1), (2, 6), (4, 0))
    found = write(stories, tokens, heads, max_new_tokens=9)
    out = eager.generate(
        torch.tensor([tokens.ids]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False, max_new_tokens=9, output_attentions=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    assert found.n_prompt == len(tokens)
    assert found.weights.shape == (4, 9, len(tokens) + 9)
    assert len(found.labels) == len(tokens) + 9
    new = out.sequences[0, len(tokens) :].tolist()
    assert found.text == stories.tokenizer.decode([*tokens.ids, *new])[len(f"<s> {STORY}") :]
    for i, (layer, head) in enumerate(heads):
        for t in range(9):
            row = out.attentions[t][layer][0, head, -1].detach().numpy()
            np.testing.assert_allclose(found.weights[i, t, : len(tokens) + t], row, atol=1e-3)
            assert np.isnan(found.weights[i, t, len(tokens) + t :]).all()
    np.testing.assert_allclose(np.nansum(found.weights.astype(float), 2), 1, atol=2e-3)
    dog = [i for span in find_spans(tokens, "dog") for i in span.positions]
    by_hand = [float(out.attentions[3][2][0, 6, -1, dog].sum())]
    np.testing.assert_allclose(found.on(dog)[2, 3], by_hand[0], atol=2e-3)


def test_sampled_writing_is_the_seeds(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    how = {"max_new_tokens": 12, "temperature": 1.0}
    one = write(stories, tokens, ((1, 1),), seed=1, **how)
    again = write(stories, tokens, ((1, 1),), seed=1, **how)
    other = write(stories, tokens, ((1, 1),), seed=2, **how)
    assert one.text == again.text != other.text
    np.testing.assert_array_equal(one.weights, again.weights)


@pytest.mark.parametrize(
    ("prompt", "place", "made"),
    [
        ("One. Two. Six.", "before", "Zap! One. Two. Six."),
        ("One. Two. Six.", "after", "One. Two. Six. Zap!"),
        ("One. Two. Six.", "inside", "One. Zap! Two. Six."),
        ("One\nTwo\n", "before", "Zap!\nOne\nTwo\n"),
        ("One\nTwo\n", "inside", "One\nZap!\nTwo\n"),
        ("One\nTwo\n", "after", "One\nTwo\nZap!\n"),
        ("one two", "inside", "one Zap! two"),
        ("气候变化", "inside", "气候 Zap! 变化"),
    ],
)
def test_where_text_is_put(prompt, place, made):
    found = insert(prompt, (0, len(prompt)), "Zap!\n", place, [])
    assert found.text == made
    assert found.text[found.start : found.stop].strip() == "Zap!"
    assert found.text[: found.start] + found.text[found.stop :] == prompt
    for i, character in enumerate(prompt):
        assert found.text[found.moved(i)] == character


def test_a_keyword_is_never_split(stories):
    tokens = encode_text(stories.tokenizer, "the big dog ran far away")
    [span] = find_spans(tokens, "big dog ran far")
    found = insert(tokens.text, (0, len(tokens.text)), "Zap!", "inside", [span])
    assert "big dog ran far" in found.text
    assert found.text != tokens.text
    word = encode_text(stories.tokenizer, "dog")
    with pytest.raises(InputError, match="splits no keyword, found none"):
        insert("dog", (0, 3), "Zap!", "inside", find_spans(word, "dog"))


def test_distraction_by_hand(stories, eager):
    """Its weights are those of a look at the other text; repeats of the keyword do not count."""
    tokens = encode_text(stories.tokenizer, STORY)
    words = [find_keyword(stories, tokens, text) for text in ("dog", "park")]
    other = "A dog is not a park."
    cases = distract(stories, tokens, words, (0, len(STORY)), other, layers=range(5))
    assert [case.place for case in cases] == ["clean", "before", "inside", "after"]
    texts = {
        "clean": STORY,
        "before": f"{other} {STORY}",
        "inside": STORY.replace("dog. The", f"dog. {other} The"),
        "after": f"{STORY} {other}",
    }
    for case in cases:
        new = encode_text(stories.tokenizer, texts[case.place])
        assert case.n_tokens == len(new)
        out = eager(torch.tensor([new.ids]), output_attentions=True)
        last = torch.stack([layer[0, :, -1] for layer in out.attentions]).detach().numpy()
        begin = texts[case.place].find(other)
        inserted = range(begin, begin + len(other)) if begin >= 0 else range(0)
        for k, text in enumerate(("dog", "park")):
            at = [
                i for span in find_spans(new, text) if span.char_start not in inserted
                for i in span.positions
            ]  # fmt: skip
            np.testing.assert_allclose(case.weights[:, :, k], last[..., at].sum(-1), atol=1e-5)
            assert case.uniform[k] == pytest.approx(len(at) / len(new))
        chances = out.logits[0, -1].detach().double().softmax(0)
        assert max(case.answer.probabilities) == pytest.approx(float(chances.max()), abs=1e-5)
    assert cases[0].own.max() == 0
    assert cases[3].own.mean() > cases[1].own.mean()  # the text right before the end


def test_a_prompt_that_was_cut_takes_no_other_text(stories):
    tokens = encode_text(stories.tokenizer, STORY, max_length=12)
    word = find_keyword(stories, tokens, "park")
    with pytest.raises(InputError, match=r"expected a whole prompt to put text into, found one"):
        distract(stories, tokens, [word], (0, len(STORY)), "Zap!", layers=[0])


def test_an_instruction_without_keywords(stories):
    tokens = encode_text(stories.tokenizer, STORY)
    word = instruction_keyword(tokens, (0, len(STORY)))
    assert len(word.positions) == len(tokens) - 1  # all but BOS
    cases = distract(
        stories, tokens, [word], (0, len(STORY)), "Zap!", places=["inside"], layers=[0, 3]
    )
    for case in cases:
        rest = 1 - case.weights[:, :, 0] - case.own
        assert (rest > -1e-6).all()  # what is left is on BOS
        assert (rest < 0.9).all()
