"""Attention maps of a prompt, of all layers and heads or of some, as an image.

    python nanogpt/attention.py                                                  # the newest run, else long
    python nanogpt/attention.py cpu --heads 2.2 2.4 --prompt "We are accounted poor citizens"
    python nanogpt/attention.py gpt2 --prompt "The animal did not cross the street because it was too tired"

Row t of a panel shows how the token at t distributes its attention over itself and the tokens before it; a row sums to
1. Look for a line beside the diagonal (a head that attends to the previous token), for columns (ends of lines, or the
first token, when there is nothing else to attend to) and for stripes (earlier occurrences of the same token).
"""

import argparse
import itertools
import math
from dataclasses import dataclass

from common import run
from common.options import option

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sample

VISIBLE = str.maketrans({"\n": "↵", " ": "␣", "\t": "→"})


WIDEST = 40  # inches of a row of panels


def head_arg(text: str) -> tuple[int, int]:
    """An argparse type: LAYER.HEAD, both counted from 1."""
    layer, point, head = text.partition(".")
    if not (point and layer.isdecimal() and head.isdecimal() and int(layer) and int(head)):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER.HEAD, such as 2.4")
    return int(layer), int(head)


def draw(maps: Tensor, heads: list[tuple[int, int]], labels: list[str]) -> Figure:
    """A panel for each of the heads (layer, head), counted from 1, four or a layer's in a row.

    maps: (n_layer, n_head, T, T), whose rows sum to 1. labels: the T tokens.
    """
    n_layer, n_head, T, _ = maps.shape
    columns = n_head if len(heads) == n_layer * n_head else min(4, len(heads))
    rows = math.ceil(len(heads) / columns)
    side = min(max(3.0, 0.13 * T), WIDEST / columns)  # inches of a panel, in which letters can be read
    size = min(9.0, 72 * side / T)  # points
    figure = Figure(figsize=(side * columns + 0.4, (side + 0.3) * rows + 0.2), layout="constrained")
    rotation = 90 if max(map(len, labels)) > 1 else 0
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (layer, head), axes in zip(heads, panels):
        shades = maps[layer - 1, head - 1].sqrt().masked_fill(future, torch.nan)  # the root shows small weights, too
        axes.imshow(shades.numpy(), cmap="magma_r", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=11)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
        axes.set_yticks(range(T), labels, fontsize=size)
        axes.set_xticks(range(T), labels, fontsize=size, rotation=rotation)
    for axes in panels:  # those that are left
        axes.axis("off")
    figure.supxlabel("attends to", fontsize=11)
    figure.supylabel("token", fontsize=11)
    return figure


@dataclass(kw_only=True)
class Options(sample.ModelOptions):
    prompt: str = option("First Citizen:\nWe are all here.", "the text", metavar="TEXT")
    heads: tuple[str, ...] = option(
        (), "only these, such as 2.4: layer 2, head 4 (default: all)", type=head_arg, nargs="+", metavar="LAYER.HEAD"
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    model, tokenizer, folder = sample.open_model(args)
    if not hasattr(model, "attention_maps"):
        raise run.UserError(f"this model has no attention: it is a {type(model).__name__}")
    ids = sample.read_prompt(tokenizer, args.prompt)
    labels = [run.plain_text(tokenizer.decode([i]).translate(VISIBLE)) for i in ids]
    maps = model.attention_maps(torch.tensor([ids]))[:, 0]  # (n_layer, 1, n_head, T, T) -> (n_layer, n_head, T, T)
    n_layer, n_head, _, _ = maps.shape
    existing = list(itertools.product(range(1, n_layer + 1), range(1, n_head + 1)))
    for layer, head in args.heads:
        if (layer, head) not in existing:
            raise run.UserError(f"--heads {layer}.{head}: this model has {n_layer} layers of {n_head} heads")
    file = folder / "attention.png"
    run.write_figure(file, draw(maps.float(), list(args.heads) or existing, labels))
    print(f"{n_layer} layers of {n_head} heads, {len(ids)} tokens; {run.display_path(file)}")


if __name__ == "__main__":
    run.cli(main)
