"""A recipe of this folder beside nanoGPT's own script: the same tokens, as many seconds, one measure.

    git clone https://github.com/karpathy/nanoGPT
    python nanogpt/beside.py nanoGPT                              # the recipe web on OpenWebText, one seed: 30 minutes
    python nanogpt/beside.py nanoGPT --seeds 3

For each seed, train.py trains the recipe. Then nanoGPT's train.py trains on the same train.bin, with the options that
its README gives for a CPU. Its number of steps is what fits into the seconds of our training, by the speed of its first
steps. Both models are evaluated by the same function, on all of val.bin.

nanoGPT's files are copied to --out and run there; the seed in the copy is 1337 + SEED. Run again, the command continues
after the last training that has ended. Writes web.json into --out.
"""

import importlib.util
import math
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import machine, run, study
from common.options import option, to_argv

import torch
from torch import Tensor, nn

import data
import train
from bench import OneProcess
from training.validation import evaluate

FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
SEED = "torch.manual_seed(1337 + seed_offset)"  # the line of its train.py
LAPTOP = dict(  # the options of its README for a CPU; those of the whole command are in the record
    device="cpu",
    compile=False,
    eval_iters=20,
    log_interval=1,
    block_size=64,
    batch_size=12,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
)
TRIAL = 20  # steps that tell how long a step takes
STEP = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)  # a line that it prints


class TheirModel(nn.Module):
    """nanoGPT's model, from token ids (B, T) to logits (B, T, V). By itself it returns those of the last token, unless
    it gets targets."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.theirs = theirs
        self.block_size = theirs.config.block_size

    def forward(self, idx: Tensor) -> Tensor:
        any_targets = torch.zeros_like(idx, memory_format=torch.contiguous_format)
        logits, _ = self.theirs(idx, any_targets)
        return logits


def copy_script(source: Path, folder: Path, seed: int, bins: Path):
    """Copy nanoGPT's files to `folder`, with another seed, and link the tokens to where it reads them. Raises
    UserError."""
    for name in FILES:
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        except OSError as error:
            raise run.UserError(f"{source / name}: cannot be copied ({error.strerror})") from error
    script = (folder / "train.py").read_text(encoding="utf-8")
    if SEED not in script:
        raise run.UserError(f"{source / 'train.py'}: does not have the line {SEED}")
    (folder / "train.py").write_text(script.replace(SEED, SEED.replace("1337", str(1337 + seed))), encoding="utf-8")
    where = folder / "data/openwebtext"
    where.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (where / name).unlink(missing_ok=True)
        (where / name).symlink_to((bins / name).resolve())


def run_script(folder: Path, iters: int) -> tuple[list[str], list[float]]:
    """Run nanoGPT's train.py for `iters` steps. Returns (its command, the seconds of each step). Raises UserError."""
    options = LAPTOP | dict(dataset="openwebtext", max_iters=iters, lr_decay_iters=iters, eval_interval=iters)
    arguments = ["config/train_shakespeare_char.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise run.UserError(f"nanoGPT's train.py: exit status {done.returncode}: {study.last_line(done.stderr)}")
    seconds = [float(milliseconds) / 1000 for _, milliseconds in STEP.findall(done.stdout)]
    return ["train.py", *arguments], seconds


def load_model(folder: Path) -> TheirModel:
    """The model of its last checkpoint, by its own model.py."""
    spec = importlib.util.spec_from_file_location("nanogpts_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its own module
    spec.loader.exec_module(module)
    checkpoint = torch.load(folder / "out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
    theirs = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
    theirs.load_state_dict(checkpoint["model"])
    return TheirModel(theirs)


def our_row(seed: int, data_dir: str | None, folder: Path) -> dict:
    """Train the recipe, and return the row of the record."""
    flags = {"recipe": "web", "data": "openwebtext", "data_dir": data_dir, "seed": seed, "device": "cpu"}
    argv = to_argv(train.Options, flags)
    if not run.is_finished(folder, train.parse(argv)):
        train.main([*argv, "--out", str(folder), "--resume", "auto"])
    return study.row("web", "recipe web", seed, folder)


def their_row(seed: int, args, folder: Path, seconds: float, text) -> dict:
    """Train nanoGPT's model for about `seconds`, evaluate it, and return the row of the record."""
    source = Path(args.nanogpt)
    copy_script(source, folder, seed, run.data_dir(args.data_dir) / "openwebtext")
    _, trial = run_script(folder, TRIAL)
    iters = max(TRIAL, round(seconds / statistics.median(trial[1:])))  # the first one has an evaluation, too
    command, steps = run_script(folder, iters)
    net = load_model(folder)
    val_loss = evaluate(net, text.val, LAPTOP["batch_size"], OneProcess(torch.device("cpu"), "fp32"))
    bits_per_byte = val_loss / math.log(2) / text.bytes_per_token["val"]
    return {
        "study": "web",
        "setting": "nanoGPT's train.py",
        "seed": seed,
        "folder": folder.name,
        "state": "done",
        "final": {"seconds": sum(steps), "val_loss": val_loss, "val_bits_per_byte": bits_per_byte},
        "args": {"iters": iters},
        "tokens_per_step": LAPTOP["batch_size"] * LAPTOP["block_size"],
        "parameters": run.count_parameters(net),
        "precision": "fp32",
        "command": command,
        "repository": "github.com/karpathy/nanoGPT",
        "git": machine.git_state(source, own=["."]),
        "device": machine.facts(torch.device("cpu"), __file__)["device"],
    }


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    nanogpt: str = option(
        "", "a clone of github.com/karpathy/nanoGPT", type=run.path_arg, metavar="NANOGPT", positional=True
    )
    data_dir: str | None = run.data_dir_option()
    seeds: int = option(1, "seeds 0 to N - 1", above=0)
    out: str = option(str(run.ROOT / "out/nanogpt/beside"), "folder of the runs", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    text = data.load("openwebtext", args.data_dir, tokens="gpt2")
    out = run.make_folder(args.out)
    rows = []
    for seed in range(args.seeds):
        ours = our_row(seed, args.data_dir, out / f"web-s{seed}")
        folder = out / f"nanogpt-s{seed}"
        file = folder / "row.json"
        if not file.is_file():
            run.write_json(file, their_row(seed, args, folder, ours["final"]["seconds"], text))
        rows += [ours, run.read_json(file)]
        run.write_json(out / "web.json", {"study": "web", "rows": rows})
        for row in rows[-2:]:
            final = row["final"]
            print(
                f"seed {seed}  {row['setting']:<20}{row['args']['iters']:>6,} steps  {final['seconds']:>5.0f} s  "
                f"loss {final['val_loss']:.4f}  {final['val_bits_per_byte']:.4f} bits per byte"
            )
    return rows


if __name__ == "__main__":
    run.cli(main)
