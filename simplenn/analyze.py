"""A network taken apart: shapes, parameters, multiply-accumulates; histograms of weights and gradients.

    python simplenn/analyze.py                                   # SimpleNN, 3 x 32 x 32
    python simplenn/analyze.py --model cnn --shape 1 28 28       # any network of this folder
    python simplenn/analyze.py --model my.py:Net --shape 3 64 64 # any module of yours, made without arguments

First a sample goes through both forms of SimpleNN, and the largest difference is printed. Then the table (also as
layers.csv and layers.md) and histograms.png, with zeros.png for all weights set to zero, in --out.
"""

import csv
import importlib.util
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from model import CNN, MLP, CustomConv2d, CustomLinear, SimpleNN

COLUMNS = ("layer", "kind", "input", "weight", "output", "parameters", "multiply_accumulates", "bias_additions")
MODELS = ("simplenn", "simplenn-custom", "cnn", "mlp")
LARGEST_SAMPLE = 2**28  # numbers of the sample input, a gigabyte
CONVOLUTIONS, LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, CustomConv2d), (nn.Linear, CustomLinear)


def models(shape):
    """{name: function that makes the network for images of `shape` (C, H, W)}"""
    channels, size = shape[0], shape[-1]
    own = dict(conv=CustomConv2d, linear=CustomLinear)
    return {
        "simplenn": lambda: SimpleNN(channels, size),
        "simplenn-custom": lambda: SimpleNN(channels, size, **own),
        "cnn": lambda: CNN(channels=channels),
        "mlp": lambda: MLP([int(np.prod(shape)), 256, 10]),
    }


def load_class(text: str):
    """The class that FILE.py:CLASS names. Raises UserError."""
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise run.UserError(f"--model {text}: {file or 'it'} is not a file; give a network's name or FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location("analyzed", file)
    if spec is None:
        raise run.UserError(f"--model {text}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or call exit()
        raise run.UserError(f"{file}: cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.pop(0)
    if not isinstance(getattr(module, name, None), type) or not issubclass(getattr(module, name), nn.Module):
        raise run.UserError(f"{file}: has no nn.Module {name}")
    return getattr(module, name)


def layers(model: nn.Module, x: torch.Tensor) -> tuple[list[dict], torch.Tensor]:
    """(a row for every call of a layer without sublayers, in the order of the calls; the output of the model).

    multiply_accumulates: of convolutions and linear layers, for the whole batch x; bias_additions are separate. Others
    have none, though they work too: they compare, normalize and copy. Parameters of a module that is called twice count
    once; those that belong to no such layer are a last row.
    """
    rows = []
    handles = []
    seen = set()

    def hook(name):
        def of_call(module, inputs, output):
            tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
            weight = getattr(module, "weight", None)
            new = [p for p in module.parameters() if id(p) not in seen]
            seen.update(id(p) for p in new)
            row = {
                "layer": name,
                "kind": type(module).__name__,
                "input": " ".join(shape_of(t) for t in tensors),
                "weight": shape_of(weight) if isinstance(weight, torch.Tensor) else "",
                "output": shape_of(output) if isinstance(output, torch.Tensor) else "several",
                "parameters": sum(p.numel() for p in new),
                "multiply_accumulates": 0,
                "bias_additions": 0,
            }
            if isinstance(module, (*CONVOLUTIONS, *LINEAR)):
                # each output is one dot product with a filter (C_in / groups * k * k) or a row of the weight
                row["multiply_accumulates"] = output.numel() * weight[0].numel()
                row["bias_additions"] = output.numel() if module.bias is not None else 0
            rows.append(row)

        return of_call

    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(hook(name or type(model).__name__)))
    try:
        with torch.no_grad():
            output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if rest := sum(p.numel() for p in model.parameters() if id(p) not in seen):
        empty = dict.fromkeys(COLUMNS, "") | dict(multiply_accumulates=0, bias_additions=0)
        rows.append(empty | {"layer": "(other parameters)", "parameters": rest})
    return rows, output


def shape_of(tensor):
    return "x".join(map(str, tensor.shape)) or "number"


def with_total(rows):
    counts = {name: sum(row[name] for row in rows) for name in COLUMNS[5:]}
    return [*rows, dict.fromkeys(COLUMNS, "") | {"layer": "total"} | counts]


def as_text(rows, markdown=False):
    """The rows as an aligned table."""
    table = [[name.replace("_", " ") for name in COLUMNS]]
    for row in rows:
        values = [row[name] for name in COLUMNS]
        table.append([f"{value:,}" if isinstance(value, int) else value for value in values])
    widths = [max(map(len, column)) for column in zip(*table)]
    aligned = []
    for line in table:
        words = [word.ljust(width) for word, width in zip(line[:5], widths)]
        numbers = [word.rjust(width) for word, width in zip(line[5:], widths[5:])]
        aligned.append(words + numbers)
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in aligned) + "\n"
    rule = "|" + "|".join("-" * (w + 1) + (":" if i >= 5 else "-") for i, w in enumerate(widths)) + "|"
    lines = ["| " + " | ".join(line) + " |" for line in aligned]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def gradients(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{parameter: (its values, its gradients)}, flat, after one backward pass from the cross-entropy."""
    model.zero_grad()
    output = model(x)
    if output.dim() == 2 and output.is_floating_point():
        F.cross_entropy(output, labels % output.shape[1]).backward()
    else:
        output.square().mean().backward()  # a module of the user's own that is not a classifier
    found = {}
    for name, p in model.named_parameters():
        gradient = torch.zeros(1) if p.grad is None else p.grad
        found[name] = tuple(tensor.detach().flatten().numpy().copy() for tensor in (p, gradient))
    return found


def draw_histograms(values, title):
    """Two rows of panels, weights and gradients, one column for every weight."""
    names = [name for name in values if name.endswith("weight")] or list(values)
    figure = Figure(figsize=(max(4, 2.3 * len(names)), 4.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for row, kind in enumerate(("weight", "gradient")):
            panel, numbers = axes[row, column], values[name][row]
            finite = np.isfinite(numbers)
            if not finite.all():
                panel.text(0.5, 0.5, f"{(~finite).sum():,} not finite", ha="center", transform=panel.transAxes)
                numbers = numbers[finite]
            if not numbers.any():
                panel.text(0.5, 0.7, "all zero", ha="center", transform=panel.transAxes)
            panel.hist(numbers, bins=61, log=True)
            panel.tick_params(labelsize=7)
            panel.locator_params(axis="x", nbins=3)
            spread = f", std {numbers.std():.2g}" if numbers.size else ""
            panel.set_title(f"{run.plain_text(name)}\n{kind}{spread}", fontsize=8)
    return figure


def refuse_odd(name: str, model: nn.Module, output):
    """Raise UserError for a model of which histograms and gradients say nothing."""
    if any(p.is_complex() for p in model.parameters()):
        raise run.UserError(f"--model {name}: has complex parameters, of which no histogram can be drawn")
    if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
        raise run.UserError(f"--model {name}: its output is not finite on a random input")


def zero_all(model):
    """Set all weights and biases to zero, in place."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def compare_forms(shape, x):
    """The largest difference of the outputs of both forms of SimpleNN, and the largest output, on the sample x."""
    torch.manual_seed(0)
    theirs = models(shape)["simplenn"]()
    ours = models(shape)["simplenn-custom"]()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        return (theirs(x) - ours(x)).abs().max().item(), theirs(x).abs().max().item()


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    model: str = option("simplenn", f"{', '.join(MODELS)}, or a module in a file", metavar="NAME|FILE.py:CLASS")
    shape: tuple[int, ...] = option((3, 32, 32), "shape of one input", above=0, nargs="+", metavar="N")
    bs: int = option(1, "examples of the sample input", above=0)
    seed: int = option(0, "initial weights and the sample input", at_least=0)
    out: str = option(str(run.ROOT / "out/simplenn/analyze"), "folder of the results", type=run.path_arg, metavar="DIR")

    def check(self):
        shape = " ".join(map(str, self.shape))
        if math.prod([self.bs, *self.shape]) > LARGEST_SAMPLE:
            raise run.UserError(f"--shape {shape}: the sample input would have more than {LARGEST_SAMPLE:,} numbers")
        if ":" in self.model:
            return
        if self.model not in MODELS:
            raise run.UserError(f"--model {self.model}: is not one of {', '.join(MODELS)}, nor FILE.py:CLASS")
        square = len(self.shape) == 3 and self.shape[1] == self.shape[2] >= 8
        if not square or self.model == "cnn" and self.shape[1] != 28:
            allowed = "C 28 28" if self.model == "cnn" else "C N N with N of 8 or more"
            raise run.UserError(f"--shape {shape}: {self.model} takes {allowed}")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    shape, own = tuple(args.shape), ":" in args.model
    make = load_class(args.model) if own else models(shape)[args.model]
    out = run.make_folder(args.out)
    torch.manual_seed(args.seed)
    x, labels = torch.randn(args.bs, *shape), torch.arange(args.bs)
    if len(shape) == 3 and shape[1] == shape[2] >= 8:
        difference, largest = compare_forms(shape, x)
        print(
            f"SimpleNN from PyTorch's layers and from our own: outputs differ by {difference:.1e} at most "
            f"(largest output {largest:.2f})\n"
        )
    torch.manual_seed(args.seed)
    try:
        model = make().eval()
        rows, output = layers(model, x)
        rows = with_total(rows)
        refuse_odd(args.model, model, output)
        values = gradients(model, x, labels)
        zeros = gradients(zero_all(model), x, labels)
    except run.UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own module may raise anything, or call exit()
        if not own:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, SystemExit):
            reason = "it calls exit()"
        raise run.UserError(f"--model {args.model}: does not take {shape_of(x)} ({reason})") from error
    print(as_text(rows), end="")
    run.write(out / "layers.csv", as_csv(rows))
    run.write(out / "layers.md", as_text(rows, markdown=True))
    run.write_figure(out / "histograms.png", draw_histograms(values, f"{args.model}: initial weights"))
    run.write_figure(out / "zeros.png", draw_histograms(zeros, f"{args.model}: all weights zero"))
    print(
        "\nall weights set to zero: the gradients that are not zero belong to "
        + (", ".join(name for name, (_, gradient) in zeros.items() if gradient.any()) or "no parameter")
    )
    print(f"{run.display_path(out)}: layers.csv, layers.md, histograms.png, zeros.png")
    return rows


if __name__ == "__main__":
    run.cli(main)
