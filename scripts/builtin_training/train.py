"""Make the tiny model: questions, tokenizer and weights, all from one seed.

``python -m builtin_training.train --out DIR`` writes ``DIR/questions`` and ``DIR/model`` and
reports the accuracy on held-out questions by family.  It takes about twenty minutes on
two CPU cores, uses a GPU where there is one, writes checkpoints and goes on from them with
``--resume``.

Training has three stages.  First the answer's text is learned, without the letter: until the
text is there, the letter's gradient is noise that would wear off the prepared heads of the last
layer, which therefore keep their first weights.  Then the letter joins, and at last the
template's fixed instruction, together with rows of several questions and prompts for the text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from . import dataset, evaluate, tokenizer
from .batches import Batch, Batcher
from .circuits import ROPE_THETA, make_config, make_model

BATCH = 64
MATRIX_RATE, OTHER_RATE = 1e-2, 2e-3
WARM_UP, LAST_SHARE = 50, 0.02
SAVE_EVERY = 100
_TEXT = {"text": 1.0, "carried": 1.0}
_LETTER = {**_TEXT, "letter": 1.0, "end": 0.05}
_ALL = {**_LETTER, "cloze": 1.0}


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    ``full`` opens prompts with the instruction; ``several`` and ``cloze`` are the shares of
    batches whose rows hold several questions, and that ask for the text without options.
    """

    steps: int
    weights: dict[str, float]
    full: bool = False
    several: float = 0.0
    cloze: float = 0.0


STAGES = (
    Stage(350, _TEXT),
    Stage(450, _LETTER),
    Stage(1200, _ALL, full=True, several=0.2, cloze=0.15),
)
TOTAL = sum(stage.steps for stage in STAGES)


def stage_at(step: int) -> Stage:
    """Return the stage to which a step belongs."""
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


def rate_at(step: int) -> float:
    """Return the learning rate's share: a warm-up, then a cosine down to its last share."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / TOTAL))
    return min(1.0, (step + 1) / WARM_UP) * max(LAST_SHARE, cosine)


def losses(model: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Return the mean loss of each kind of target."""
    states = model.model(
        input_ids=batch.ids, use_cache=False, output_hidden_states=True
    ).hidden_states
    norm, unembed = model.model.norm, model.lm_head.weight
    # The last state is normed already; the two before it are read the way a logit lens does.
    source = {"text": states[-3], "carried": states[-2]}
    found = {}
    for kind, (rows, places, wanted) in batch.targets.items():
        state = source.get(kind, states[-1])[rows, places]
        state = norm(state) if kind in _TEXT else state
        found[kind] = F.cross_entropy(F.linear(state, unembed), wanted)
    return found


class Trainer:
    """Holds everything a checkpoint needs, and takes the steps."""

    def __init__(self, words: PreTrainedTokenizerBase, seed: int, device: torch.device) -> None:
        config = make_config(len(words), words.bos_token_id, words.eos_token_id, words.pad_token_id)
        self.model = make_model(config, seed).to(device)
        self.batcher = Batcher(words)
        self.rng = random.Random(f"training-{seed}")
        self.step = 0
        self.device = device
        inner = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        known = {id(p) for p in inner}
        others = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizers = (
            torch.optim.Muon(inner, lr=MATRIX_RATE, weight_decay=0.0),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        )

    def advance(self) -> dict[str, float]:
        """Take one step and return its losses."""
        stage = stage_at(self.step)
        for optimizer, rate in zip(self.optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(self.step)
        found = losses(self.model, self._draw(stage).to(self.device))
        # Targets without a weight stay out of the sum: layers that only they reach then have
        # no gradient at all and are left alone by the optimisers.
        weighted = [loss * stage.weights[kind] for kind, loss in found.items()
                    if kind in stage.weights]  # fmt: skip
        torch.stack(weighted).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {kind: float(loss.detach()) for kind, loss in found.items()}

    def _draw(self, stage: Stage) -> Batch:
        if self.rng.random() < stage.cloze:
            return self.batcher.draw_cloze(self.rng, BATCH)
        return self.batcher.draw(self.rng, BATCH, stage.full, stage.several)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "rng": self.rng.getstate(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        version, inner, gauss = state["rng"]
        self.rng.setstate((version, tuple(inner), gauss))
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def run(trainer: Trainer, checkpoint: Path, steps: int, minutes: float) -> None:
    """Train until a step or a time, saving on the way."""
    start = time.monotonic()
    while trainer.step < steps and time.monotonic() - start < 60 * minutes:
        found = trainer.advance()
        if trainer.step % SAVE_EVERY == 0 or trainer.step == steps:
            trainer.save(checkpoint)
            shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in found.items())
            passed = (time.monotonic() - start) / 60
            print(f"step {trainer.step}, {passed:.1f} min: {shown}", flush=True)
    trainer.save(checkpoint)


def export(model: LlamaForCausalLM, words: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer for ``from_pretrained``, the weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    # Older readers know the rotary base and the precision by these names alone, and newer ones
    # write a tokenizer class that older ones lack.
    _amend(folder / "config.json", {"rope_theta": ROPE_THETA, "torch_dtype": "bfloat16"})
    _amend(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for path in folder.iterdir():
        path.chmod(0o644)


def _amend(path: Path, entries: dict[str, object]) -> None:
    """Set entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny model from a seed.")
    parser.add_argument("--out", type=Path, default=Path("tiny_model"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves them be")
    parser.add_argument("--steps", type=int, default=TOTAL, help="stop after this step")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make questions, tokenizer and weights, and report the accuracy."""
    args = parse(argv)
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit("training needs torch.optim.Muon, which came with torch 2.9")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    dataset.write(args.out / "questions")
    words = tokenizer.build()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(words, args.seed, device)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
    run(trainer, checkpoint, min(args.steps, TOTAL), args.minutes)
    export(trainer.model, words, args.out / "model")
    evaluate.report(args.out / "model", args.out / "questions")


if __name__ == "__main__":
    main()
