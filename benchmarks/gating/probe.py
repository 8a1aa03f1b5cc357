"""What a base's hidden states, all that a gate reads, tell of the skill of a token's segment.

    .venv/bin/python -m benchmarks.gating.probe [FOLDER …]    # bases/large and bases/instructed

A linear probe for each layer, fitted on composites of seen pairs with their right answers, judged
on those of unseen pairs, training inputs and test inputs. The base alone: no adapter is at work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from examples.tiny import experts
from examples.tiny.modeling import ANSWER, EOS
from examples.tiny.segments import NAMES, Marks
from examples.tiny.tasks import CompositeItem, composite_pairs, sample_composites
from router_training.gates.loading import base_in

FITTED, JUDGED, SEED = 370, 160, 5
PLACES = ("prompt, first", "prompt, second", "answer, first", "answer, second")


@torch.inference_mode()
def states(model: Any, tokenizer: Any, items: Sequence[CompositeItem]) -> tuple[Any, Any, Any]:
    """Of all tokens but the start: each layer's input as it reads it (layers + 1, n, d), the skills
    (n,) and the places (n,) in `PLACES`."""
    marks = Marks.of(tokenizer)
    texts = [f"{item.prompt}{ANSWER}{item.answer}{EOS}" for item in items]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids: Tensor = batch["input_ids"]
    real = batch["attention_mask"].bool() & (ids != tokenizer.bos_token_id)
    segments = marks.segments(ids)
    skills = torch.tensor([[NAMES.index(part.skill) for part in item.parts] for item in items])
    hidden = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
    read = [torch.nn.functional.rms_norm(h, h.shape[-1:])[real].numpy() for h in hidden]
    places = 2 * marks.answering(ids) + segments
    return np.stack(read), skills.gather(1, segments)[real].numpy(), places[real].numpy()


def table(folder: Path) -> str:
    """Share of tokens whose skill the probe tells, in %, by what has been read."""
    base = base_in(folder)
    fitted = sample_composites("train", FITTED, SEED, composite_pairs("seen"))
    judged = sample_composites("test", JUDGED, SEED, composite_pairs("unseen"))
    x, y, _ = states(base.model, base.tokenizer, fitted)
    asked, truth, places = states(base.model, base.tokenizer, judged)
    lines = [
        f"| {folder.name}: after | all | {' | '.join(PLACES)} |",
        "|---|---:" + "|---:" * 4 + "|",
    ]
    for layer in range(len(x)):
        probe = LogisticRegression(C=0.1, max_iter=1000).fit(x[layer], y)
        right = probe.predict(asked[layer]) == truth
        shares = [right.mean(), *(right[places == place].mean() for place in range(len(PLACES)))]
        name = "the embeddings" if layer == 0 else f"layer {layer}"
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    two = [experts.base_folder(name) for name in ("large", "instructed")]
    parser.add_argument("folders", nargs="*", type=Path, default=two)
    torch.set_num_threads(1)
    print("\n\n".join(table(folder) for folder in parser.parse_args().folders))


if __name__ == "__main__":
    main()
