"""The common part of all runs: device, run folder, record, metrics, curves and checkpoints.

Nothing here knows which experiment it serves. In outline:

    args = run.parse_options(__file__, Options, argv, recipe)
    with run.Run(args, __file__, "cifar100-lenet5") as r:
        state = r.load(model=model, optimizer=optimizer)  # None in a new run
        for epoch in range(state["epoch"] if state else 0, args.epochs):
            ...
            r.log({"epoch": epoch + 1, "train_loss": 4.2, "val_loss": 4.1})
            r.save(model=model, optimizer=optimizer, epoch=epoch + 1)
        r.finish("test accuracy 42.0%", test_accuracy=0.42)
"""

import contextlib
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from common.arguments import (  # noqa: F401, scripts take these from `run`, too
    AUTO,
    ROOT,
    RunOptions,
    ScriptOptions,
    TrainOptions,
    check_dataset,
    data_dir,
    data_dir_option,
    data_place,
    dataset_arg,
    defaults_of,
    device_option,
    is_finished,
    parse_options,
    path_arg,
    path_for_record,
    precision_option,
    record_args,
    recorded_options,
    run_title,
    threads_option,
)
from common.curves import draw_curves
from common.events import Events
from common.files import (  # noqa: F401, scripts take all of these from `run`
    append,
    display_path,
    lock_folder,
    make_folder,
    plain_text,
    typed_path,
    write,
    write_figure,
    write_json,
)
from common.machine import (  # noqa: F401
    environment,
    facts,
    native_bf16,
    peak_memory_mb,
    pick_device,
    seed_at,
    set_threads,
    to_device,
)
from common.metrics import append_row, read_rows, write_rows
from common.records import FORMAT, read_json, read_record, recorded_args, runs_by_age  # noqa: F401
from common.terminal import Diverged, UserError, cli, error_line, is_main_script, printable  # noqa: F401
from common.weights import (  # noqa: F401
    Checkpoint,
    check_memory,
    check_weights,
    count_parameters,
    make_without_memory,
    read_checkpoint,
    read_safetensors,
    write_checkpoint,
    write_safetensors,
)

import torch
from tqdm import tqdm


def newest_run(experiment: str, accept=lambda record: True) -> Path | None:
    """The folder of the newest finished run of `experiment` below out/ that has a best.pt and whose record passes
    `accept`. A newer one that was interrupted is named on standard error, with the command that continues it."""
    newest = None
    interrupted = None
    for folder, record in runs_by_age(ROOT / "out" / experiment):
        if not accept(record):
            continue
        if record["state"] == "done" and (folder / "best.pt").exists():
            newest = folder
            interrupted = None
        if record["state"] in ("interrupted", "running") and (folder / "last.pt").exists():
            interrupted = folder
            script = typed_path(ROOT / experiment / record.get("script", "train.py"))
    if interrupted:
        again = shlex.join(["python", script, "--resume", typed_path(interrupted)])
        print(f"{display_path(interrupted)} has not finished; to continue it: {printable(again)}", file=sys.stderr)
    return newest


# ------------------------------------------------------------------------------------------------------ the run


class Run:
    """A run, from its folder to its record: `with Run(args, __file__, name) as r`.

    Seeds torch, picks device and precision, and locks the run folder. However the block ends, run.json says so: done,
    interrupted, diverged or failed. Ctrl-C and SIGTERM end the run at once, and at most one epoch is repeated. With
    `stop_within_epoch` the loop asks `should_stop()` after each step, saves, and calls `stop()`; a second signal ends
    the run at once.
    """

    rank, world = 0, 1  # common/ddp.py has runs of several processes

    def __init__(self, args, script, name, auto_precision="fp32", auto_threads=None, stop_within_epoch=False):
        self.args = args
        self.script = Path(script).resolve()
        self.stop_within_epoch = stop_within_epoch
        if self.world == 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"{self.script.name} trains in one process: start it with python, not with torchrun")
        self.device = self._pick_device()
        self.folder, self._lock = self._open_folder(name)
        old = read_record(self.folder / "run.json") if args.resume else {}
        for name in ("final", "warning", "diverged_at_step"):  # of a shorter run, which this one continues
            old.pop(name, None)
        threads = old["device"]["threads"] if old else getattr(args, "threads", "auto")
        set_threads(threads, auto_threads)
        auto = auto_precision if auto_precision != "bf16" or native_bf16(self.device) else "fp32"
        precision = getattr(args, "precision", "auto")
        self.precision = old.get("precision", auto) if precision == "auto" else precision
        self.rows = []
        self._steps = {}  # {step: its loss} since the last row
        self._best = None  # the first column of the row whose weights are in best.pt
        self._signal = None
        self._drawn = 0.0
        self._began = time.monotonic()
        self._saved = self._began
        self._events = Events(self.folder) if getattr(args, "tensorboard", False) else None
        self._before = old.get("wall_s", 0.0)
        self.record = old | {
            "experiment": self.script.parent.name,
            "script": self.script.name,
            "format": FORMAT,
            "args": record_args(args),
            "options": sorted(record_args(args)),
            "state": "running",
            **facts(self.device, script, old.get("git")),
            "processes": self.world,
            "precision": self.precision,
            "started": old.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
            "resumed": old.get("resumed", 0) + bool(args.resume),
        }
        torch.manual_seed(args.seed)

    def _pick_device(self):
        return pick_device(getattr(self.args, "device", "cpu"))

    def _open_folder(self, name):
        """Create or find the run folder and lock it. Returns (folder, lock)."""
        place = Path(self.args.resume or self.args.out or ROOT / "out" / self.script.parent.name)
        make_folder(place)
        if self.args.resume or self.args.out:
            lock = lock_folder(place)
            if not self.args.resume and (place / "run.json").exists():
                lock.release()
                raise UserError(f"{place}: holds a run already; continue it with --resume, or name another folder")
            return place, lock
        for n in range(1, sys.maxsize):
            folder = place / f"{name}-s{self.args.seed}-{n}"
            try:
                folder.mkdir()
                return folder, lock_folder(folder)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"{folder}: cannot be created ({error.strerror})") from error

    def __enter__(self):
        self._handlers = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle_signal)
        except ValueError:  # not the main thread, whose owner handles signals
            pass
        place = data_dir(getattr(self.args, "data_dir", None)).absolute()
        path = getattr(self.args, "data", None)
        local = {"data_dir": None, "data": None}
        if place.is_dir():
            local["data_dir"] = str(place)
        if os.path.isabs(str(path)):
            local["data"] = path
        if self.rank == 0:  # the path of the data, for --resume; never copied to results/
            write_json(self.folder / "local.json", local)
        self._write_record()
        return self

    def _handle_signal(self, number, frame):
        if self._signal is not None:  # asked twice
            self._close("interrupted")
            os._exit(128 + number)
        self._signal = number
        if not self.stop_within_epoch:
            raise KeyboardInterrupt
        if self.rank == 0:
            tqdm.write("stopping after this step ...", file=sys.stderr)

    def should_stop(self) -> bool:
        """Has the run been told to stop? Then save and call `stop()`."""
        return self._signal is not None

    def stop(self):
        """End the run as interrupted."""
        raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        if kind and self._signal and not issubclass(kind, UserError):
            kind = KeyboardInterrupt  # an extension module may have turned it into an error of its own
        ends = {None: self.record["state"], KeyboardInterrupt: "interrupted", Diverged: "diverged"}
        if kind is Diverged:
            self.record["diverged_at_step"] = error.step
            self._show_explosion(error)
        try:
            self._close(ends.get(kind, "failed"))
        finally:
            if kind is not KeyboardInterrupt or not is_main_script():  # else a second signal is still handled here
                for number, handler in self._handlers.items():
                    signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            if self.rank == 0:
                again = [*self._launcher(), typed_path(self.script), "--resume", typed_path(self.folder)]
                saved = (self.folder / "last.pt").exists()
                how = f"; continue with: {shlex.join(again)}" if saved else ""
                print(f"interrupted{how}", file=sys.stderr)
            raise SystemExit(128 + (self._signal or signal.SIGINT)) from None

    def _launcher(self):
        return ["python"]

    def _close(self, state):
        """Write the final state of the run and release its folder."""
        self.record["state"] = state
        try:
            self._write_record()
        except UserError:  # a full disk, or a folder that is gone: the error that ended the run names it
            if state == "done":
                raise
        finally:
            if self._events:
                self._events.close()
            if self._lock:
                self._lock.release()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def print(self, text: str):
        """Print lines and keep them in train.log; control characters of names and of generated text are escaped."""
        if self.rank == 0:
            text = printable(text, keep="\n\t")
            append(self.folder / "train.log", text + "\n")
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def note(self, text: str | None = None, **facts):
        """Put facts (dataset, parameters, ...) into the record; print `text` with the hardware. A resumed run must have
        the dataset with which it began."""
        before = self.record.get("dataset") or {}
        now = facts.get("dataset") or {}
        if now and self.args.resume and before and before.get("digest") != now["digest"]:
            raise UserError(f"{self.folder}: began with another dataset than is there now; start a new run")
        self.record |= facts
        self._write_record()
        if text:
            d = self.record["device"]
            processes = f", {self.world} processes" if self.world > 1 else ""
            memory = f", {d['memory_gb']} GiB" if d["memory_gb"] else ""
            where = f"{d['name']}{memory}, {d['threads']} of {d['cores']} cores{processes}, {self.precision}"
            self.print(f"{text}\n{where}")

    def _write_record(self):
        if self.rank == 0:
            self.record["wall_s"] = round(self._before + time.monotonic() - self._began, 1)
            self.record["peak_memory_mb"] = peak_memory_mb(self.device)
            write_json(self.folder / "run.json", self.record)

    def log(self, row: dict):
        """Append a row to metrics.csv; redraw curves.png if it is more than ten seconds old."""
        if self._signal and not self.stop_within_epoch:  # KeyboardInterrupt was lost in a destructor or a callback
            self.stop()
        self.rows.append(row)
        self._steps = {}
        if self.rank == 0:
            append_row(self.folder / "metrics.csv", row, names=len(self.rows) == 1)
            if time.monotonic() - self._drawn > 10:
                self._draw()
                self._drawn = time.monotonic()
            if self._events:
                self._events.log(row)

    def text(self, tag: str, text: str, step: int):
        """Show a text in TensorBoard, as it is and not as Markdown, beside the metrics that `log` wrote at `step`."""
        if self._events:
            self._events.text(tag, text, step)

    def check_finite(self, losses: torch.Tensor, first_step: int):
        """Raise Diverged at the first loss that is not finite; losses[0] belongs to step `first_step`.

        losses: (N,), or (N, K) of K numbers a step, the loss first. What came before an explosion is drawn.
        """
        losses = losses.detach().cpu().reshape(len(losses), -1)
        bad = (~torch.isfinite(losses)).any(1).nonzero().flatten().tolist()
        seen = losses[: bad[0] + 1] if bad else losses
        self._steps |= enumerate(seen[:, 0].tolist(), first_step)
        if bad:
            raise Diverged(first_step + bad[0])

    def _show_explosion(self, error: Diverged):
        """Draw the curves of a diverged run, and the loss of each step since the last row, as in explosion.csv."""
        steps = [{"step": step, "loss": loss} for step, loss in sorted(self._steps.items())]
        if self.rank == 0 and (steps or self.rows):
            with contextlib.suppress(UserError):  # a full disk: the explosion is the news
                if steps:
                    write_rows(self.folder / "explosion.csv", steps)
                self._draw(steps)
                error.figure = display_path(self.folder / "curves.png")

    def _draw(self, explosion: list[dict] = ()):
        draw_curves(self.rows, self.folder / "curves.png", run_title(self.record), self._best, explosion)

    def figure(self, name: str, figure):
        """Write a matplotlib figure into the run folder."""
        if self.rank == 0:
            write_figure(self.folder / name, figure)

    def save(self, file="last.pt", **state):
        """Write a checkpoint of modules, optimizers, tensors, numbers and strings, with torch's random state and the
        number of metrics rows."""
        state |= {"rows": len(self.rows), "random": self._random_states()}
        if file == "last.pt":
            self._saved = time.monotonic()
        if self.rank == 0:
            write_checkpoint(self.folder / file, state)
            self._write_record()

    def save_due(self, seconds: float) -> bool:
        """Is the last checkpoint, or the start of this process, longer ago than `seconds`?"""
        return time.monotonic() - self._saved > seconds

    def save_best(self, **state):
        """Write best.pt."""
        self._mark_best(len(self.rows))
        self.save("best.pt", **state)

    def _mark_best(self, rows):
        """The weights of best.pt are from the last of the first `rows` rows."""
        if 0 < rows <= len(self.rows):
            self._best = next(iter(self.rows[rows - 1].values()))

    def _random_states(self):
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return [states]

    def load(self, **parts) -> Checkpoint | None:
        """Load last.pt into the modules and optimizers `parts`, restore torch's random state, and drop later rows of
        the metrics. Returns the checkpoint, or None if there is none."""
        path, state = self.folder / "last.pt", None
        if path.exists():
            state = read_checkpoint(path)
            state.load_into(**parts)
            if len(state["random"]) != self.world:
                raise UserError(f"{path}: was written by {len(state['random'])} processes; continue with that number")
            try:
                torch.set_rng_state(state["random"][self.rank]["cpu"])
                if self.device.type == "cuda" and "cuda" in state["random"][self.rank]:
                    torch.cuda.set_rng_state(state["random"][self.rank]["cuda"], self.device)
            except (RuntimeError, TypeError, LookupError) as error:
                raise UserError(f"{path}: is damaged: its random state is not valid") from error
        file = self.folder / "metrics.csv"
        if file.exists():
            self.rows = read_rows(file, state["rows"] if state else 0, cut=self.rank == 0)
        return state

    def load_best(self, **parts) -> Checkpoint:
        """Load best.pt into the modules `parts`."""
        state = read_checkpoint(self.folder / "best.pt", self.device)
        state.load_into(**parts)
        self._mark_best(state["rows"])
        return state

    def finish(self, text: str, uniform_loss: float | None = None, **final):
        """Record the final metrics, draw the curves, and print `text` with the seconds and the folder.

        uniform_loss: the training loss of a uniform prediction, such as the logarithm of the number of classes. A run
        whose last training loss (or train_mse) is not below it says so.
        """
        row = self.rows[-1] if self.rows else {}
        last = final | row
        train_loss = last.get("train_loss", last.get("train_mse"))
        if uniform_loss is not None and train_loss is not None and not train_loss < 0.99 * uniform_loss:
            self.record["warning"] = (
                f"the training loss ends at {train_loss:.4g}, and a uniform prediction has {uniform_loss:.4g}: "
                "nothing was learned; another --lr or more steps may help"
            )
            self.print(f"warning: {self.record['warning']}")
        if self.rows and self.rank == 0:
            self._draw()
        self.record |= {"state": "done", "final": final}
        self._write_record()
        self.print(f"{text}; {self.record.get('wall_s', 0):.0f} s; {display_path(self.folder)}")
