"""What every run shares: its flags, device, folder, record, metrics, curves and checkpoints.

Plain functions and one small class; nothing here knows which experiment it serves. The same file, to the byte, lies in
every folder, so that a folder can be copied away alone (tests/test_contract.py holds the copies equal). In outline:

    args = run.parse(parser, argv)
    with run.Run(args, __file__, "cifar100-lenet5", auto_precision="fp32") as r:
        state = r.load()                                        # None in a new run
        for ...:
            r.log({"epoch": 1, "train_loss": 4.2, "val_loss": 4.1})
            r.save({"epoch": 1, "model": model.state_dict()})   # last.pt
        r.finish(test_accuracy=0.42)
"""

import argparse
import csv
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # the repository, or whatever holds a copied folder


class UserError(SystemExit):
    """Something the user can mend: Python prints it as one line on standard error and exits with 1."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


class Diverged(UserError):
    """The loss is no longer finite; `step` is where."""

    def __init__(self, step):
        super().__init__(f"diverged: the loss is not finite at step {step}; a smaller --lr usually mends it")
        self.step = step


# ---------------------------------------------------------------------------------------------------- flags


def number(kind, low, strict):
    """An argparse type: an int or float of at least `low` (above it, if `strict`), finite and, if whole, in 32 bits."""

    def parse(text):
        value = kind(text)
        if not (low < value or low == value and not strict) or not value < (2**31 if kind is int else math.inf):
            raise argparse.ArgumentTypeError(f"{text} is no {word} {'above' if strict else 'of at least'} {low}")
        return value

    word = parse.__name__ = "whole number" if kind is int else "number"
    return parse


positive_int, whole = number(int, 0, strict=True), number(int, 0, strict=False)
positive_float, nonnegative_float = number(float, 0, strict=True), number(float, 0, strict=False)

# The same flag means the same thing in every script; a script names those that it reads.
FLAGS = {
    "data": dict(metavar="NAME|PATH"),
    "data_dir": dict(metavar="DIR", help="where datasets lie, or are put (default: $DATA_DIR, else data/)"),
    "out": dict(metavar="DIR", help="the run folder (default: the first free out/FOLDER/DATA-MODEL-sSEED-N)"),
    "resume": dict(metavar="DIR", help="continue the run in DIR, with the arguments in its run.json"),
    "epochs": dict(type=positive_int, metavar="N", help="passes over the training set"),
    "iters": dict(type=positive_int, metavar="N", help="training steps"),
    "bs": dict(type=positive_int, metavar="N", help="batch size"),
    "lr": dict(type=positive_float, metavar="X", help="learning rate (its peak, where it is scheduled)"),
    "seed": dict(type=whole, metavar="N", default=0, help="initial weights, data order, augmentation"),
    "device": dict(choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, else mps, else cpu"),
    "precision": dict(choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is known to gain"),
    "limit": dict(type=positive_int, metavar="N", help="only the first N examples of each part, for a quick look"),
}


def add_flags(parser, *names, **changes):
    """Add the shared flags `names` to `parser`; a keyword names one too, with options that differ."""
    for name in (*names, *changes):
        options = FLAGS[name] | changes.get(name, {})
        if options.get("default") is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument("--" + name.replace("_", "-"), **options)


def parse(parser, argv=None, extendable=lambda saved: False):
    """Parse `argv`. With --resume DIR every argument comes from DIR's run.json, and a flag that differs from it is an
    error that names it, except a larger --epochs or --iters where `extendable(saved arguments)` holds."""
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    record_file, unset = Path(args.resume) / "run.json", object()
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        saved, experiment = record["args"], record["experiment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--resume {args.resume}: no readable run.json there ({error})")
    if experiment != Path(__file__).parent.name:
        parser.error(f"--resume {args.resume}: holds a run of {experiment}/")
    if saved.get("data", "").startswith("./"):
        saved["data"] = str((ROOT / saved["data"]).resolve())
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    for name, old in saved.items():
        new = given.get(name, unset)
        longer = name in ("epochs", "iters") and new is not unset and new > old and extendable(saved)
        if new is not unset and new != old and not longer:
            parser.error(f"--{name.replace('_', '-')} {new}: the run in {args.resume} has {old}")
        setattr(args, name, new if longer else old)
    if args.out and Path(args.out).resolve() != Path(args.resume).resolve():
        parser.error(f"--out {args.out}: a resumed run stays in its folder, {args.resume}")
    return args


def kept(args):
    """What a record keeps of the arguments: all but where things lie on this machine."""
    names = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "data_dir")}
    if Path(names.get("data", "")).is_absolute():
        names["data"] = "./" + Path(os.path.relpath(names["data"], ROOT)).as_posix()
    return names


def ended(folder, args):
    """Is the run in `folder` over? One with other arguments than `args`, a quick look perhaps, is an error."""
    file = Path(folder) / "run.json"
    if not file.exists():
        return False
    record, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(kept(args)))
    for name in wanted.keys() | record["args"].keys():
        if record["args"].get(name) != wanted.get(name) and (name, wanted.get(name)) != ("data", "auto"):
            raise UserError(f"{folder}: holds a run with another --{name.replace('_', '-')}; name another --out")
    return record["state"] in ("done", "diverged")


def data_dir(given=None):
    """The folder of datasets: --data-dir, else $DATA_DIR, else data/ beside the experiment's folder."""
    return Path(given or os.environ.get("DATA_DIR") or ROOT / "data")


# ------------------------------------------------------------------------------------- device and precision


def join():
    """Under torchrun, meet the other processes. Returns (rank, how many there are): (0, 1) without torchrun."""
    if "RANK" in os.environ and not dist.is_initialized():
        # DDP would import it later, whose default arguments then keep the group: gloo's threads are there when the
        # interpreter ends, which now and then aborts for it
        from torch.distributed.nn import functional  # noqa: F401

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: no such device here; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def seed_at(seed, place):
    """A seed for torch that is a function of (seed, place), the place an epoch or a step, in 32 bits: a generator on a
    CPU takes no more of them, and drops the others without a word."""
    return ((seed << 24) + (seed >> 8) * 2_654_435_761 + place) % 2**32


def native_bf16(device):
    """Does the hardware multiply bfloat16 itself?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", lambda: False) for kind in ("amx_tile", "avx512_bf16"))
    return device.type == "cpu" and any(check() for check in checks)


def describe_device(device):
    """What the record and the first line on the screen say of the hardware."""
    facts = {"type": device.type, "name": platform.processor() or platform.machine(), "memory_gb": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_gb": round(properties.total_memory / 2**30, 1)}
    else:
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
            facts["name"] = models[0] if models else facts["name"]
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            facts["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return facts | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def peak_memory_mb(device):
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def git_state(folder, began=None):
    """{"commit", "dirty"}: dirty when `folder` differs from that commit. None without git or outside a repository.

    began: the state that a resumed run began with, whose commit it keeps: dirty then, or different now, is dirty.
    """

    def ask(*words):
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, dirty = (began["commit"], began["dirty"]) if began else (ask("rev-parse", "HEAD"), False)
        changed = ask("status", "--porcelain", "--", ".") or ask("diff", "--name-only", commit, "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": dirty or bool(changed)}


# -------------------------------------------------------------------------------------------------- writing


def write(path, content):
    """Write bytes or text to `path` whole or not at all: a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there before is unharmed") from None


def write_json(path, content):
    write(path, json.dumps(content, indent=1) + "\n")


def write_figure(path, figure):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    write(path, picture.getvalue())


def draw_curves(rows, path):
    """One panel a quantity: train_X and val_X of the metrics `rows` against their first column."""
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(c.split("_", 1)[1] for c in rows[0] if c.startswith(("train_", "val_"))))
    x = next(iter(rows[0]))
    figure = Figure(figsize=(4.5 * len(quantities), 3.4), layout="constrained")
    for axes, quantity in zip(np.atleast_1d(figure.subplots(1, len(quantities))), quantities):
        for part, style in (("train", "--"), ("val", "-")):
            points = [(row[x], row[f"{part}_{quantity}"]) for row in rows if f"{part}_{quantity}" in row]
            if points:
                axes.plot(*zip(*points), style, marker="." if len(points) < 30 else None, label=part)
        axes.set(xlabel=x, title=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure)


def make_folder(path):
    """The folder `path`, made if it is not there: ask before the work whose results it is to hold."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror})") from None
    return Path(path)


def hold(folder):
    """Lock `folder` for this process and return the open lock. The system drops it when the process dies."""
    try:
        handle = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise UserError(f"{folder}: another process is running there") from None
    return handle


def open_folder(args, experiment, name):
    """Make or find the run folder, lock it, and return (folder, lock)."""
    wanted = Path(args.resume or args.out or "")
    try:
        if args.resume or args.out:
            wanted.mkdir(parents=True, exist_ok=True)
            lock = hold(wanted)
            if not args.resume and (wanted / "run.json").exists():
                lock.close()
                raise UserError(f"{wanted}: holds a run already; name another folder")
            return wanted, lock
        for n in range(1, sys.maxsize):
            wanted = ROOT / "out" / experiment / f"{name}-s{args.seed}-{n}"
            try:
                wanted.mkdir(parents=True)
                return wanted, hold(wanted)
            except FileExistsError:
                if not wanted.is_dir():
                    raise
    except OSError as error:
        raise UserError(f"{wanted}: cannot be used as the run folder ({error.strerror})") from None


def shown(path):
    """`path` as one would type it here."""
    relative = os.path.relpath(path) if Path(path).anchor == Path.cwd().anchor else str(path)
    return min(str(path), relative, key=len)


# -------------------------------------------------------------------------------------------------- the run


class Run:
    """A run, from its folder to its record: `with Run(args, __file__, name) as r`.

    Seeds torch, resolves device and precision, and holds the run folder. `r.stopping` turns true at Ctrl-C or SIGTERM:
    the loop then saves and calls `r.stop()`. However the block ends, run.json says so: done, interrupted or diverged.

    Under torchrun there is one in each of `r.world` processes, and the one of `r.rank` 0 alone writes and speaks. They
    ask for `stopping` and call `save` together; what they pass to `log` and `check_finite` is reduced over them before.
    """

    def __init__(self, args, script, name, auto_precision="fp32"):
        self.args, self.script = args, Path(script).resolve()
        self.rank, self.world = join()
        self.device = pick_device(args.device)
        self.folder, self._lock = self._open_folder(name)
        record_file, old = self.folder / "run.json", {}
        if args.resume:
            old = json.loads(record_file.read_text(encoding="utf-8"))
            torch.set_num_threads(old["device"]["threads"])
        gains = auto_precision == "bf16" and native_bf16(self.device)
        auto = old.get("precision") or ("bf16" if gains else "fp32")
        self.precision = auto if args.precision == "auto" else args.precision
        self.rows, self._signal, self._drawn, self._began = [], None, 0.0, time.monotonic()
        self._before = old.get("wall_s", 0.0)
        self.record = old | {
            "experiment": self.script.parent.name,
            "args": kept(args),
            "state": "running",
            "git": git_state(self.script.parent, old.get("git")) if old.get("git", True) else None,
            "versions": versions(),
            "platform": platform.system() + " " + platform.machine(),
            "device": describe_device(self.device),
            "processes": self.world,
            "precision": self.precision,
            "started": old.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
            "resumed": old.get("resumed", 0) + bool(args.resume),
        }
        torch.manual_seed(args.seed)

    def _open_folder(self, name):
        """The first process opens the folder and tells the others; where it cannot, it says why and all of them end."""
        opened, error = (None, None), None
        if self.rank == 0:
            try:
                opened = open_folder(self.args, self.script.parent.name, name)
            except UserError as caught:
                error = caught
        if self.world > 1:
            told = [opened[0]]
            dist.broadcast_object_list(told)
            opened = told[0], opened[1]
        if opened[0] is None:
            raise error or SystemExit(1)
        return opened

    def __enter__(self):
        self._handlers = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._signalled)
        except ValueError:  # not the main thread: whoever owns it handles its signals
            pass
        self._write_record()
        return self

    def _signalled(self, number, frame):
        if self._signal == number:  # asked twice: at once
            raise KeyboardInterrupt
        self._signal = number
        if self.rank == 0:
            tqdm.write("stopping after this step ...", file=sys.stderr)

    @property
    def stopping(self):
        """Has any process been told to stop?"""
        if self.world == 1:
            return self._signal is not None
        told = torch.tensor(self._signal is not None, dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def __exit__(self, kind, error, trace):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is not None:
            self.record["state"] = "diverged" if kind is Diverged else "interrupted"
            if kind is Diverged:
                self.record["diverged_at_step"] = error.step
        try:
            self._write_record()
        except UserError:
            if kind is None:
                raise
        finally:
            if self._lock:
                self._lock.close()
        if self.world > 1 and kind in (None, KeyboardInterrupt):
            if kind is None:
                dist.barrier()  # none hangs up while another still speaks
            dist.destroy_process_group()
        if kind is KeyboardInterrupt and self.rank:
            raise SystemExit(128 + (self._signal or signal.SIGINT)) from None
        if kind is KeyboardInterrupt:
            again = ["python"] if self.world == 1 else ["torchrun", f"--nproc-per-node={self.world}"]
            again += [shown(self.script), "--resume", shown(self.folder)]
            again += ["--data-dir", self.args.data_dir] if getattr(self.args, "data_dir", None) else []
            saved = (self.folder / "last.pt").exists()
            print("interrupted" + f"; continue with: {shlex.join(again)}" * saved, file=sys.stderr)
            raise SystemExit(128 + (self._signal or signal.SIGINT)) from None
        if kind is not None and issubclass(kind, OSError):
            raise UserError(f"{error.filename or self.folder}: {error.strerror or error}") from None

    def stop(self):
        """End the run in an orderly way, after the loop has saved what it was told to stop in the middle of."""
        raise KeyboardInterrupt

    @property
    def hardware(self):
        d = self.record["device"]
        memory = f", {d['memory_gb']} GiB" if d["memory_gb"] else ""
        return f"{d['name']}{memory}, {d['threads']} of {d['cores']} cores, {self.precision}"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def say(self, text):
        """Print a line and keep it in train.log."""
        if self.rank:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        with open(self.folder / "train.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def note(self, **facts):
        """Put facts (dataset, parameters, ...) into the record. A resumed run must have the data that it began with."""
        before, now = (named.get("dataset", {}).get("digest") for named in (self.record, facts))
        if before and now and before != now:
            raise UserError(f"{self.folder}: began with other data than is there now; start a new run")
        self.record |= facts
        self._write_record()

    def _write_record(self):
        if self.rank:
            return
        self.record["wall_s"] = round(self._before + time.monotonic() - self._began, 1)
        self.record["peak_memory_mb"] = peak_memory_mb(self.device)
        write_json(self.folder / "run.json", self.record)

    def log(self, row):
        """Append a row to metrics.csv, and redraw curves.png if that is ten seconds ago."""
        self.rows.append(row)
        if self.rank:
            return
        with open(self.folder / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(row))
            if len(self.rows) == 1:
                table.writeheader()
            table.writerow(row)
        if time.monotonic() - self._drawn > 10:
            draw_curves(self.rows, self.folder / "curves.png")
            self._drawn = time.monotonic()

    def check_finite(self, losses, first_step):
        """Raise Diverged at the first of `losses`, those of the steps from `first_step` on, that is not finite."""
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            raise Diverged(first_step + bad[0].item())

    def save(self, state, name="last.pt"):
        """Write a checkpoint of plain tensors, numbers and strings; torch's random state and the number of metrics
        rows go with it."""
        states = {"torch_rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        extra = {"rows": len(self.rows), "random": [states]}
        if self.world > 1:
            extra["random"] = [None] * self.world
            dist.all_gather_object(extra["random"], states)
        if self.rank:
            return
        content = io.BytesIO()
        torch.save(state | extra, content)
        write(self.folder / name, content.getbuffer())
        self._write_record()

    def load(self):
        """The state of last.pt, or None where there is none; metrics rows that came after it are dropped."""
        path, state = self.folder / "last.pt", None
        if path.exists():
            state = read_checkpoint(path)
            if len(state["random"]) != self.world:
                raise UserError(f"{path}: was written by {len(state['random'])} processes; continue it with as many")
            torch.set_rng_state(state["random"][self.rank]["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in state["random"][self.rank]:
                torch.cuda.set_rng_state(state["random"][self.rank]["cuda_rng"], self.device)
        metrics = self.folder / "metrics.csv"
        if metrics.exists():
            with open(metrics, newline="", encoding="utf-8") as file:
                counted = list(csv.reader(file))[: 1 + state["rows"] if state and state["rows"] else 0]
            self.rows = [{k: float(v) for k, v in zip(counted[0], row)} for row in counted[1:]]
            if self.rank == 0:
                write(metrics, "".join(",".join(row) + "\r\n" for row in counted))
        return state

    def finish(self, **final):
        """Draw the last curves and record the final metrics; the run is done."""
        if self.rows and self.rank == 0:
            draw_curves(self.rows, self.folder / "curves.png")
        self.record |= {"state": "done", "final": final}
        self._write_record()


def read_checkpoint(path, device="cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"{path}: not a readable checkpoint, damaged or cut short ({reason})") from None


def restore(module, weights, path):
    """Load `weights` into `module`; a checkpoint of another model is an error that names the file."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: is the checkpoint of another model ({detail})") from None


def cli(main):
    """Run a script's main() as a command: Ctrl-C before the run has begun is one line too."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
