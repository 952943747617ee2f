"""Merge the adapter of a LoRA run into its base model, so that any program loads the result without peft.

python distilgpt2/merge.py out/distilgpt2/RUN                 # writes out/distilgpt2/RUN/merged
python distilgpt2/merge.py out/distilgpt2/RUN --out DIR

The folder must be new, empty, or from an earlier merge, which is replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import pretrained

MANIFEST = "merge.json"  # names the files that a merge wrote


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
    merged = run.read_json(folder / MANIFEST).get("files", []) if MANIFEST in names else []
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
    size = pretrained.save(net.merge_and_unload(), tokenizer, folder)
    files = sorted(file.name for file in folder.iterdir())
    run.write_json(folder / MANIFEST, {"model": pretrained.record_name(args.model), "files": files})
    print(f"{facts['base']} with the adapter of {args.model}: {size / 1e6:.1f} MB in {run.display_path(folder)}")


if __name__ == "__main__":
    run.cli(main)
