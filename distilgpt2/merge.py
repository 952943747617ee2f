"""Merge the adapter of a LoRA run into its base model, so that any program loads the result without peft.

python distilgpt2/merge.py out/distilgpt2/RUN                 # writes out/distilgpt2/RUN/merged
python distilgpt2/merge.py out/distilgpt2/RUN --out DIR

The merged model is written only if it has the logits of the adapter on a text. The folder must be new, empty, or from
an earlier merge, which is replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import torch

import model
import pretrained

MANIFEST = "merge.json"  # names the files that a merge wrote
TEXT = "The history of the town began in 1832, when its first bridge was built across the river."
TOLERANCE = 1e-3  # of logits before and after, relative to the largest; rounding makes some 1e-5


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    model: str | None = option(
        None, "a run folder, or the folder of an adapter", type=run.path_arg, metavar="RUN|ADAPTER", positional=True
    )
    data_dir: str | None = run.data_dir_option()
    out: str | None = option(
        None, "folder of the merged model (default: merged/ in the run folder)", type=run.path_arg, metavar="DIR"
    )


def check_folder(folder: Path):
    """Raise UserError if `folder` holds anything but an earlier merge, since a merge replaces all that it holds."""
    if not folder.is_dir():
        return
    names = {file.name for file in folder.iterdir()}
    merged = run.read_json(folder / MANIFEST).get("files") if MANIFEST in names else []
    if not isinstance(merged, list) or not all(isinstance(name, str) for name in merged):
        raise run.UserError(f"{folder / MANIFEST}: is not the list of a merge; pass a new --out folder")
    if others := names - {MANIFEST, *merged}:
        raise run.UserError(f"{folder}: holds {min(others)}, which would be deleted; pass a new --out folder")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    folder = Path(args.out or Path(args.model) / "merged")
    check_folder(folder)
    net, tokenizer, facts = pretrained.open_model(args.model, args.data_dir)
    if not hasattr(net, "peft_config"):
        raise run.UserError(f"{args.model}: has no adapter to merge; its model is whole")
    run.make_folder(folder.absolute().parent)
    ids = torch.tensor(pretrained.encode(tokenizer, [TEXT]))[:, : pretrained.context(net)]  # (1, T)
    expected = logits_of(net, ids)

    def check(written: Path):
        merged, _, _ = pretrained.open_model(str(written))
        error = (logits_of(merged, ids) - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE:
            raise run.UserError(
                f"{args.model}: cannot be merged, since the logits of the merged model differ by {error:.1%}; use the "
                "adapter as it is"
            )

    size = pretrained.save(model.merge_lora(net), tokenizer, folder, check)
    files = sorted(file.name for file in folder.iterdir())
    run.write_json(folder / MANIFEST, {"model": pretrained.record_name(args.model), "files": files})
    print(f"{facts['base']} with the adapter of {args.model}: {size / 1e6:.1f} MB in {run.display_path(folder)}")


@torch.no_grad()
def logits_of(net, ids: torch.Tensor) -> torch.Tensor:
    """(1, T) -> (1, T, V)"""
    return net.eval()(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    run.cli(main)
