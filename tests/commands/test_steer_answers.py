"""The command on the built-in model: heads that look at the answer, and a wrong option boosted."""

import json

import pandas as pd
import pytest

TINY = ("--model_path", "builtin:tiny", "--dataset", "builtin:questions", "--dtype", "fp32",
        "--batch_size", "20", "--option_part", "text", "--self_check", "false")  # fmt: skip


@pytest.fixture(scope="module")
def profiled(run_cli, tmp_path_factory):
    """The built-in model: heads picked by attention to the answer, a wrong option boosted."""
    return run_cli(
        "steer", *TINY, "--max_samples", 40, "--spans", "option:wrong", "--span_offset", 4,
        "--profile", "--profile_by", "attention", "--profile_boost", 1e12, "--boost", "1,1e16",
        "--bootstrap", 200, "--random_sets", 2, "--generate", 2, "--examples", 2,
        "--output_dir", tmp_path_factory.mktemp("steer"),
    ).run_dir  # fmt: skip


def test_heads_that_look_at_the_answer_are_found(profiled):
    """What the last token reads of the right option stands 4 tokens behind its text."""
    heads = json.loads((profiled / "heads.json").read_text())
    assert heads == {"3": list(range(8))}
    offsets = pd.read_parquet(profiled / "offsets.parquet").set_index(["offset", "layer", "head"])
    best = offsets["contrast"].groupby("offset").max()
    assert best.idxmax() == 4
    assert best[4] > 0.9
    assert best.drop(4).max() < 0.3
    table = pd.read_parquet(profiled / "profile.parquet")
    assert len(table) == 32
    assert table.loc[table["picked"], "attention_test_low"].min() > 0.8
    assert table.loc[~table["picked"], "attention_test_high"].max() < 0.3


def test_boosting_a_wrong_option_there_moves_the_answer_to_it(profiled):
    table = pd.read_parquet(profiled / "steer.parquet")
    assert table["n_samples"].eq(20).all()  # the half that did not pick
    clean, rest = table.iloc[0], table.iloc[1:]
    same = rest[rest["boost"] == 1]
    for column in ("accuracy", "loss", "target_share", "answer_changed_share"):
        assert (same[column] == clean[column]).all()
    assert (same["kl"] == 0).all()
    far = rest[rest["boost"] == 1e16].set_index("set")
    chosen, others = far.iloc[0], far[far.index.str.startswith("random ")]
    assert len(others) == 2
    assert clean["target_share"] == 0
    assert chosen["target_share_low"] > others["target_share_high"].max()
    assert chosen["target_share"] > 0.6
    # The random heads look there just as much: it is not the weight that moves the answer.
    assert (others["keyword_weight"] > chosen["keyword_weight"] - 0.1).all()
    samples = pd.read_parquet(profiled / "samples.parquet")
    moved = samples[(samples["boost"] == 1e16) & (samples["set"] == chosen.name)]
    assert (moved["predicted"] == moved["target"]).mean() == chosen["target_share"]


def test_what_a_run_leaves_behind(profiled):
    names = {p.name for p in profiled.iterdir()}
    stems = {f"{stem}.{kind}" for stem in ("steer", "profile") for kind in ("html", "png")}
    assert stems | {"generations.jsonl", "generations.html", "summary.md", "meta.json"} <= names
    meta = json.loads((profiled / "meta.json").read_text())
    assert meta["num_processed"] == 20
    assert meta["accuracy"] > 0.9
    assert meta["spans"] == "option:wrong"
    text = " ".join((profiled / "summary.md").read_text().split())
    assert "4 tokens behind its text" in text
    assert "2 random sets (mean) | 1e+16" in text


def test_heads_of_a_profile_serve_another_run_and_texts(run_cli, profiled, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("The plate is in the hall. The kite is in the barn. " * 20)
    folder = run_cli(
        "steer", *TINY, "--max_samples", 8, "--keyword", "the", "--heads",
        profiled / "heads.json", "--boost", "0,4", "--random_sets", 1, "--texts", text,
        "--text_length", 40, "--max_texts", 3, "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    table = pd.read_parquet(folder / "steer.parquet")
    needed = ["boost", "accuracy", "loss", "keyword_weight", "kl", "answer_changed_share"]
    assert set(needed) <= set(table.columns)
    assert table["target_share"].isna().all()
    assert (table.loc[table["boost"] == 0, "keyword_weight"] == 0).all()


def test_either_padding_side_and_any_batch_give_one_table(run_cli, tmp_path):
    def table(*more):
        return pd.read_parquet(
            run_cli(
                "steer", *TINY, "--max_samples", 7, "--spans", "option:wrong", "--heads",
                "0.3,3.*", "--boost", "0,1e12", "--random_sets", 0, "--output_dir", tmp_path, *more,
            ).run_dir / "steer.parquet"
        )  # fmt: skip

    right, left = table(), table("--padding_side", "left", "--batch_size", 3)
    pd.testing.assert_frame_equal(right, left, rtol=1e-3, atol=1e-5)
    assert right["kl"].iloc[1:].min() > 1e-4  # that there is something to agree on
    bridged = table("--engine", "bridge")
    pd.testing.assert_frame_equal(right, bridged, rtol=1e-2, atol=1e-4)


def test_nothing_is_left_of_a_run_that_cannot_be(run_cli, tmp_path):
    """What does not fit is said before the sweep, and no directory stays."""
    for more, said in (
        (["--generate", 2000, "--spans", "question"], "generate: expected at most"),
        (["--keyword", "zebra"], "expected a question with such a span, found none"),
        (["--spans", "option:Z"], "expected an option among ABCD"),
    ):
        result = run_cli(
            "steer", *TINY, "--max_samples", 5, "--heads", "all", *more, "--output_dir", tmp_path
        )
        assert result.code == 2
        assert said in result.error_line
        assert not list(tmp_path.iterdir())
