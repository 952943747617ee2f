"""Attention maps of a prompt, all layers and heads, as an image.

    python nanogpt/attention.py cpu                                              # the committed model
    python nanogpt/attention.py out/nanogpt/shakespeare-cpu-s0-1 --prompt "ROMEO: I love thee"
    python nanogpt/attention.py gpt2 --prompt "The animal did not cross the street because it was too tired"

Row t of a panel shows how the token at t distributes its attention over itself and the tokens before it; a row sums to
1. Look for a line beside the diagonal (a head that attends to the previous token), for columns (ends of lines, or the
first token, when there is nothing else to attend to) and for stripes (earlier occurrences of the same token).
"""

from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sample

VISIBLE = str.maketrans({"\n": "↵", " ": "␣", "\t": "→"})


def draw(maps: Tensor, labels: list[str], path: Path):
    """Write a PNG of maps (n_layer, n_head, T, T), whose rows sum to 1, with the T labels of the tokens."""
    n_layer, n_head, T, _ = maps.shape
    side = max(1.2, min(2.6, 11 / n_head))  # inches per panel
    figure = Figure(figsize=(side * n_head + 0.7, side * n_layer + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    size = max(3.0, min(8.0, 60 * side / T))  # points; as large as a row allows
    rotation = 90 if max(map(len, labels)) > 1 else 0
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer, row in enumerate(figure.subplots(n_layer, n_head, squeeze=False)):
        for head, axes in enumerate(row):
            shades = maps[layer, head].sqrt().masked_fill(future, torch.nan)  # the root makes small weights visible
            axes.imshow(shades.numpy(), cmap="magma_r", vmin=0, vmax=1)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7, pad=2)
            axes.tick_params(length=0, pad=1)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_yticks(range(T), labels if head == 0 else [""] * T, fontsize=size)
            axes.set_xticks(range(T), labels if layer == n_layer - 1 else [""] * T, fontsize=size, rotation=rotation)
    run.write_figure(path, figure)


@dataclass(kw_only=True)
class Options(sample.ModelOptions):
    prompt: str = option("First Citizen:\nWe are all here.", "the text", metavar="TEXT")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    model, tokenizer, folder = sample.open_model(args)
    if not hasattr(model, "attention_maps"):
        raise run.UserError(f"this model has no attention: it is a {type(model).__name__}")
    ids = sample.read_prompt(tokenizer, args.prompt)
    labels = [tokenizer.decode([i]).translate(VISIBLE) for i in ids]
    maps = model.attention_maps(torch.tensor([ids]))[:, 0]  # (n_layer, 1, n_head, T, T) -> (n_layer, n_head, T, T)
    file = folder / "attention.png"
    draw(maps.float(), labels, file)
    print(f"{maps.shape[0]} layers of {maps.shape[1]} heads, {len(ids)} tokens; {run.display_path(file)}")


if __name__ == "__main__":
    run.cli(main)
