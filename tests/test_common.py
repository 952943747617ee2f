"""common/: errors, streams, arguments, checkpoints, downloads, image datasets and studies."""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import types
import warnings

from common import arguments, calibration, fetch, image_files, images, records, shapes, study, terminal, weights
from common.cores import usable_cores

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

import processes
from conftest import ROOT, failure, one_line, run, start
from helpers import make_images, mutations, prepare, write_drop_in, write_idx

# --------------------------------------------------------------------------------------- errors and the terminal

SCRIPT = """
import multiprocessing, sys, time, warnings
from pathlib import Path

warnings.filterwarnings("ignore", "This DataLoader will create 2 worker processes")  # where there is one core

if multiprocessing.current_process().name == "SpawnProcess-2":
    time.sleep(60)
from common import run
import torch

class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        raise run.UserError("image 7 is broken: cannot be read")

def main():
    {body}

if __name__ == "__main__":
    run.cli(main)
"""


@pytest.fixture
def script(tmp_path):
    """script(body, **options): what a script of its own folder whose main() has that body ends with, and says:
    (exit status, standard output, standard error)."""
    folder = tmp_path / "repository" / "experiment"
    folder.mkdir(parents=True)
    (folder.parent / "common").symlink_to(ROOT / "common")
    shutil.copy(ROOT / "cifar" / "common.py", folder)

    def execute(body, **options):
        (folder / "script.py").write_text(SCRIPT.format(body=body))
        process = processes.start(folder / "script.py", **options)
        output, errors = process.communicate()
        return process.returncode, output, errors

    return execute


@pytest.mark.skipif(os.name == "nt", reason="POSIX: FIFOs")
@pytest.mark.parametrize("write", ["write", "append"])
def test_only_regular_files_are_written(write, tmp_path):
    """A rename would replace a device such as /dev/full for everybody; a FIFO would wait for ever."""
    os.mkfifo(tmp_path / "fifo")
    code, message = failure(getattr(run, write), tmp_path / "fifo", "text")
    assert code == 1 and "not a regular file" in message and (tmp_path / "fifo").is_fifo()


def test_a_user_error_is_an_exception_and_one_line(script):
    assert script('raise run.UserError("no such thing")') == (1, "", "error: no such thing\n")
    _, _, errors = script(r'raise run.UserError("a\nb.png: is no image")')
    assert errors == "error: a\\nb.png: is no image\n"
    assert issubclass(run.UserError, Exception) and run.Diverged(7).step == 7


def test_a_user_error_keeps_its_traceback_where_debug_is_set(script):
    code, _, errors = script('raise run.UserError("no such thing")', env={"DEBUG": "1"})
    assert code == 1 and "Traceback" in errors and "no such thing" in errors


def test_other_exceptions_keep_their_traceback(script):
    code, _, errors = script("1 / 0")
    assert code == 1 and "Traceback" in errors and "ZeroDivisionError" in errors


@pytest.mark.parametrize("allocate", [bytearray, np.empty, torch.empty])
def test_an_allocation_that_fails_is_one_line(allocate, capsys):
    """As of a network whose sizes are each allowed, but which no machine holds."""
    with pytest.raises(SystemExit) as caught:
        terminal.cli(lambda: allocate(2**58))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: not enough memory (")


@pytest.mark.slow
def test_a_user_error_in_a_dataloader_worker_is_one_line(script):
    """Also where another worker has not started yet: Python kills it at exit, which PyTorch would report."""
    done = script("list(torch.utils.data.DataLoader(Broken(), num_workers=2, multiprocessing_context='spawn'))")
    assert done == (1, "", "error: image 7 is broken: cannot be read\n")


@pytest.mark.skipif(os.name == "nt", reason="streams of POSIX")
@pytest.mark.parametrize(
    "streams",
    [dict(stdout="/dev/full"), dict(closed=["stdout"]), dict(closed=["stderr"]), dict(closed=["stdout", "stderr"])],
)
def test_output_that_cannot_be_written_changes_nothing_else(streams, script, tmp_path):
    body = "[print('line', i, flush=True) for i in range(9)]; Path('done').touch(); raise SystemExit(7)"
    code, _, errors = script(body, cwd=tmp_path, **streams)
    assert code == 7 and (tmp_path / "done").exists() and "Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_closed_pipe_changes_nothing_else(script, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` does after its line
    body = "[print('line', i, flush=True) for i in range(9999)]; Path('done').touch(); raise SystemExit(7)"
    with open(writing, "wb") as pipe:
        code, _, errors = script(body, cwd=tmp_path, stdout=pipe)
    assert code == 7 and (tmp_path / "done").exists() and not errors


@pytest.mark.slow
def test_names_that_the_terminal_cannot_show_are_escaped(script):
    env = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    done = script(r"print('caf\u00e9 \udcff'); raise run.UserError('\udcff')", env=env, fresh=True)
    assert done == (1, "caf\\xe9 \\udcff\n", "error: \\udcff\n")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2Jred\a", "\\x1b[2Jred\\x07"),  # clears the screen
        ("a\nb\r\u2028c", "a\\nb\\r\\u2028c"),
        ("a\u202eb", "a\\u202eb"),  # turns the direction of writing
        ("caf\u00e9 \u0926\u093f\u0932 a\u200db", "caf\u00e9 \u0926\u093f\u0932 a\u200db"),
    ],
)
def test_control_characters_of_a_name_are_escaped(text, shown):
    assert terminal.printable(text) == terminal.error_line(run.UserError(text)) == shown
    assert run.display_path(text) == shown and run.typed_path(text) == text


def test_a_module_that_is_started_names_the_commands_of_its_folder():
    """Such as nanogpt/sampling.py, where sample.py was meant; it ends before PyTorch is imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "nanogpt" / "sampling.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and "torch" not in done.stderr
    assert lines[0].startswith("error: sampling.py is a module") and "bench.py, beside.py, data.py" in lines[0]
    assert "sample.py" in lines[0] and "model.py" not in lines[0]


def test_what_is_a_command(tmp_path):
    guard = '\nif __name__ == "__main__":'
    for folder in ("nanogpt", "gan", "cifar"):
        for file in (ROOT / folder).glob("*.py"):
            if file.name != "common.py":
                assert terminal.is_command(file) == (guard in file.read_text(encoding="utf-8")), file
    own = tmp_path / "own.py"
    for text, command in {
        "import math\n\nx = math.pi\n\n\ndef f():\n    print(x)\n": False,
        '"""Only words."""\n': False,
        "print(1)\n": True,
        "for i in range(2):\n    print(i)\n": True,
    }.items():
        own.write_text(text)
        assert terminal.is_command(own) == command
    terminal.refuse_module(tmp_path / "<stdin>")  # is no module


def test_what_a_run_prints_has_no_control_characters(tmp_path, capsys):
    """Neither those of a dataset's name nor those of a generated text; lines and tabs stay."""
    r = types.SimpleNamespace(rank=0, folder=tmp_path)
    run.Run.print(r, "on \x1b[2Jred:\n\ta\rb")
    shown = "on \\x1b[2Jred:\n\ta\\rb\n"
    assert capsys.readouterr().out == (tmp_path / "train.log").read_text(encoding="utf-8") == shown


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("folder, module", [("cifar", "numpy"), ("nanogpt", "torch")])
def test_ctrl_c_during_the_imports_is_one_line(folder, module, tmp_path):
    """With a module in place of the real one that says when it is imported, and takes ten minutes."""
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    script = ROOT / folder / "train.py"
    process = processes.start(script, "--help", env={"PYTHONPATH": str(tmp_path)}, fresh=True)
    processes.wait_for(lambda: process.output()[0] == "importing\n", "the import", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("importing\n", "interrupted\n") and process.returncode == 130


# ------------------------------------------------------------------------------------------------------- arguments


def test_old_arguments_get_todays_names():
    assert run.recorded_args({"l2": 0.1, "augment": True}) == {"weight_decay": 0.1, "augment": "crop+flip"}
    assert run.recorded_args({"augment": False}) == {"augment": "none"}
    language = run.recorded_args({"iters": 9, "bs": 12, "accumulate": 40})
    assert language == {"iters": 9, "bs": 480, "micro_batch": 12}
    assert run.recorded_args({"epochs": 9, "bs": 256, "accumulate": 4}) == {"epochs": 9, "bs": 256, "micro_batch": 64}
    assert run.recorded_args({"epochs": 9, "bs": 256, "accumulate": 1})["micro_batch"] is None


def test_seconds_are_found_in_old_and_new_metrics():
    assert [records.seconds_of({"epoch": "1", name: "2.5"}) for name in (*records.SECONDS, "seconds")] == [2.5] * 4


def test_old_metrics_get_todays_names():
    old = {"order": 0.9, "chance": 0.98, "shuffled_chance": 0.5, "chances": 3}
    new = {"order": 0.9, "order_precision": 0.98, "shuffled_order_precision": 0.5, "chances": 3}
    assert records.recorded_metrics(old) == new == records.recorded_metrics(new)


# ------------------------------------------------------------------------------------------------------ the record


@pytest.mark.parametrize("edited", ["experiment", "common", "new", "other"])
def test_dirty_means_that_the_folder_or_common_differs(edited, tmp_path, monkeypatch):
    for name in ("experiment", "common", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text("x = 1\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    machine = sys.modules["common.machine"]
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "common" / "machine.py"))
    began = machine.git_state(tmp_path / "experiment")
    assert began["dirty"] is False
    path = tmp_path / "experiment" / "new.py" if edited == "new" else tmp_path / edited / "file.py"
    path.write_text("x = 2\n")
    assert machine.git_state(tmp_path / "experiment")["dirty"] is (edited != "other")
    for words in (["add", "-A"], ["commit", "-qm", "second"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    resumed = machine.git_state(tmp_path / "experiment", began)
    assert resumed == began | {"dirty": edited != "other"}, "a resumed run keeps the commit at which it began"


LIMITS = {
    "ATEN_CPU_CAPABILITY": {"avx2": False, "default": False, "avx512": True},
    "ONEDNN_MAX_CPU_ISA": {"AVX2": False, "AVX512_CORE": False, "AVX512_CORE_BF16": True, "AVX512_CORE_AMX": True},
    "MKL_ENABLE_INSTRUCTIONS": {"AVX2": False, "AVX512": True},
}


@pytest.mark.parametrize("gib, fits", [(26.0, False), (26.1, True)])
def test_the_memory_of_a_network_is_known_before_it_is_allocated(gib, fits, monkeypatch):
    """A billion weights in float32, with gradients, moments and a checkpoint: 28 GB. No random number is drawn."""
    monkeypatch.setattr(weights, "memory_bytes", lambda device: gib * 2**30)
    state = torch.get_rng_state()

    def make():
        layer = torch.nn.Linear(100_000, 10_000, bias=False)
        layer.weight.data.normal_(0, 0.02)
        return layer

    if fits:
        run.check_memory(make, torch.device("cpu"), "--width")
    else:
        code, message = failure(run.check_memory, make, torch.device("cpu"), "--width")
        assert code == 1 and "--width: training 1,000,000,000 weights needs 26 GiB" in message
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)
def test_freed_memory_is_kept_for_the_next_step():
    resource = pytest.importorskip("resource")

    def page_faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)  # 40 MB, some 9,800 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    run.pick_device("cpu")
    assert min(page_faults() for _ in range(20)) < 100


@pytest.mark.parametrize("name, value", [(name, value) for name, values in LIMITS.items() for value in values])
def test_native_bf16_respects_what_forbids_the_instructions(name, value, monkeypatch):
    for variable in LIMITS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert run.native_bf16(torch.device("cpu"))
    assert "limits" not in run.environment(torch.device("cpu"), __file__)["device"]
    monkeypatch.setenv(name, value)
    assert run.native_bf16(torch.device("cpu")) is LIMITS[name][value]
    facts = run.environment(torch.device("cpu"), __file__)["device"]
    assert facts["limits"] == {name: value} and facts["native_bf16"] is LIMITS[name][value]


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("content", ["missing", "empty", "cut", "words", "list", "tensor", "pickle"])
def test_a_checkpoint_that_is_none_says_why(content, tmp_path):
    path, weights = tmp_path / "last.pt", torch.nn.Linear(2, 2).state_dict()
    if content in ("list", "tensor", "pickle"):
        torch.save({"list": [1], "tensor": torch.ones(2), "pickle": argparse.Namespace(a=1)}[content], path)
    elif content != "missing":
        torch.save({"model": weights}, path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[:500], "words": b"hello"}[content])
    code, message = failure(run.read_checkpoint, path)
    assert code == 1 and one_line(message) and str(path) in message
    said = {"missing": "is missing", "list": "holds a list", "tensor": "holds a Tensor", "pickle": "holds more than"}
    assert said.get(content, "damaged or cut short") in message


def test_a_checkpoint_that_lacks_a_key_names_it(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "best.pt")
    code, message = failure(lambda: run.read_checkpoint(tmp_path / "best.pt").load_into(model=torch.nn.Linear(2, 2)))
    assert code == 1 and one_line(message) and "'model'" in message and "best.pt" in message


# --------------------------------------------------------------------------------------------------------- studies


@pytest.fixture
def trainer(tmp_path):
    """A module `train` whose runs end as --end says."""
    file = tmp_path / "code" / "train.py"
    file.parent.mkdir()
    file.write_text(f"""
import sys, time
from dataclasses import dataclass
sys.path.insert(0, {str(ROOT)!r})
from common import run
from common.options import option

@dataclass(kw_only=True)
class Options(run.RunOptions):
    end: str = option("done", "how the run ends", choices=["done", "diverged", "failed"])
    wait: float = option(0.0, "seconds", at_least=0)

def parse(argv=None):
    return run.parse_options(__file__, Options, argv)

def main(argv=None):
    args = parse(argv)
    with run.Run(args, __file__, "x") as r:
        r.log({{"epoch": 1, "val_loss": 0.5}})
        time.sleep(args.wait)
        if args.end == "diverged":
            raise run.Diverged(5)
        if args.end == "failed":
            raise run.UserError("the disk is on fire")
        r.finish("over", val_loss=0.5)

if __name__ == "__main__":
    run.cli(main)
""")
    prepare()
    sys.path.insert(0, str(file.parent))
    try:
        sys.modules.pop("train", None)
        import train

        yield train
    finally:
        sys.path.remove(str(file.parent))
        sys.modules.pop("train", None)


ONE_JOB = argparse.Namespace(jobs=1, list=False)


def job(out, end, *more):
    """A run of the study in `out` that ends as `end` says."""
    return study.Job(out / end, ["--end", end, *more])


def run_here(trainer, out, end):
    """The same run in this process. Returns its run.json."""
    with contextlib.suppress(run.UserError):
        trainer.main(["--end", end, "--out", str(out / end)])
    return out / end / "run.json"


def test_a_study_reads_how_its_runs_ended_from_their_records(trainer, tmp_path):
    jobs = [job(tmp_path, end) for end in ("done", "diverged")]
    assert study.run_jobs(trainer, jobs, argparse.Namespace(jobs=2, list=False))
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["diverged", "diverged"], ["done", "done"]]
    assert "val_loss 0.5000" in lines[1]


@pytest.mark.slow
def test_a_study_starts_its_runs_as_commands(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "start", study.start.__wrapped__)  # tests fork them otherwise
    assert study.run_jobs(trainer, [job(tmp_path, "done")], argparse.Namespace(jobs=2, list=False))
    record = json.loads((tmp_path / "done" / "run.json").read_text())
    assert record["state"] == "done" and record["device"]["threads"] == max(1, usable_cores() // 2)


def test_the_row_of_a_run_has_its_arguments_and_curves(trainer, tmp_path):
    run_here(trainer, tmp_path, "done")
    row = study.row("s", "name", 0, tmp_path / "done", curve="val_loss", later="val_of_a_later_version")
    assert "later" not in row
    assert row["state"] == "done" and row["curve"] == [0.5] and row["args"]["end"] == "done"


@pytest.fixture
def curves(monkeypatch):
    """curves(rows, ...): the panels of the figure that draw_curves makes of them."""
    from common import curves as module

    figures = []
    monkeypatch.setattr(module, "write_figure", lambda path, figure: figures.append(figure))

    def draw(rows, **options):
        module.draw_curves(rows, "curves.png", "cnn on mnist, recipe best, seed 0", **options)
        return figures[-1]

    return draw


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.draws
def test_curves_have_whole_epochs_a_title_and_the_best_epoch(curves):
    rows = [{"epoch": n, "train_loss": 2.0 / n, "val_loss": 3.0 / n, "lr": 0.1} for n in (1, 2, 3)]
    figure = curves(rows, best=2)
    (axes,) = figure.axes
    assert figure.get_suptitle() == "cnn on mnist, recipe best, seed 0"
    assert all(tick == int(tick) for tick in axes.get_xticks()) and axes.get_yscale() == "linear"
    assert labels(axes) == ["train", "val", "best.pt: epoch 2"] and list(axes.lines[2].get_xdata()) == [2, 2]


@pytest.mark.draws
def test_curves_of_an_explosion_can_be_read(curves):
    rows = [{"epoch": n, "train_loss": loss, "val_loss": loss} for n, loss in enumerate([2.3, 1.9, 1e30, math.inf], 1)]
    explosion = [{"step": step, "loss": loss} for step, loss in enumerate([-2.0, 1.0, -1e20, math.nan], 40)]
    by_epoch, by_step = curves(rows, explosion=explosion).axes
    assert by_epoch.get_yscale() == "log" and by_step.get_yscale() == "symlog"
    assert by_step.get_ylim()[0] <= -1e20 and "not finite at step 43" in labels(by_step)
    assert len(curves([], explosion=explosion).axes) == 1  # in the first epoch there is no row yet


@pytest.mark.draws
@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_an_explosion_of_any_size_is_drawn(sign, tmp_path):
    """Without a warning, up to the largest numbers."""
    from common.curves import draw_curves

    for decades in (20, 100, 240, 308):
        explosion = [{"step": i, "loss": sign * 10.0 ** (decades * i / 40)} for i in range(-5, 41)]
        rows = [{"epoch": i, "train_loss": row["loss"]} for i, row in enumerate(explosion)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_curves(rows, tmp_path / "curves.png", "title", explosion=explosion)


def test_the_title_of_a_run_says_what_is_trained_on_what():
    record = {"experiment": "lstm_imdb", "args": {"recipe": "best", "seed": 1}, "dataset": {"name": "imdb"}}
    assert run.run_title(record) == "lstm_imdb on imdb, recipe best, seed 1"
    record["args"] |= {"model": "smollm2", "method": "lora"}
    assert run.run_title(record | {"dataset": None}) == "smollm2 lora, recipe best, seed 1"


def test_a_study_that_is_given_again_leaves_finished_runs_alone(trainer, tmp_path):
    ends = ("done", "diverged")
    before = [run_here(trainer, tmp_path, end).read_bytes() for end in ends]
    assert study.run_jobs(trainer, [job(tmp_path, end) for end in ends], ONE_JOB)
    assert before == [(tmp_path / end / "run.json").read_bytes() for end in ends]


def test_a_run_that_fails_ends_the_study(trainer, tmp_path):
    code, message = failure(study.run_jobs, trainer, [job(tmp_path, "failed")], ONE_JOB)
    assert code == 1 and "the run failed (the disk is on fire)" in message
    assert (tmp_path / "results.txt").read_text().split() == ["failed", "failed"]


@pytest.mark.parametrize("alive, state", [(True, "running"), (False, "failed")])
def test_a_run_that_nobody_runs_any_more_has_failed(alive, state, trainer, tmp_path):
    file = run_here(trainer, tmp_path, "done")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "running"}))
    study.list_results(tmp_path, [file.parent] if alive else [])
    assert (tmp_path / "results.txt").read_text().split() == ["done", state]


def test_a_study_does_not_take_a_run_with_other_arguments(trainer, tmp_path):
    run_here(trainer, tmp_path, "done")
    code, message = failure(study.run_jobs, trainer, [job(tmp_path, "done", "--seed", "5")], ONE_JOB)
    assert code == 1 and "--seed" in message


def test_a_study_names_a_damaged_record(trainer, tmp_path):
    run_here(trainer, tmp_path, "done").write_text("{")
    code, message = failure(study.run_jobs, trainer, [job(tmp_path, "done")], ONE_JOB)
    assert code == 1 and one_line(message) and "run.json" in message


def test_a_study_lists_commands_that_another_engine_can_run(trainer, tmp_path, capsys):
    jobs = [study.Job(tmp_path / f"run{i}", ["--seed", str(i)]) for i in range(3)]
    assert not study.run_jobs(trainer, jobs, argparse.Namespace(jobs=1, list=True))
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 3 and not list(tmp_path.glob("run*"))
    for _ in range(2):  # a requeued job is the same command
        process = processes.start(*commands[1].split()[1:])
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert json.loads((tmp_path / "run1" / "run.json").read_text())["args"]["seed"] == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("what", ["lost", "another error", "user error"])
def test_an_interrupt_that_a_library_loses_still_ends_the_run(trainer, tmp_path, what):
    """Destructors drop KeyboardInterrupt, and extension modules may turn it into an error of their own."""
    with (
        pytest.raises((SystemExit, run.UserError)) as end,
        run.Run(trainer.parse(["--out", str(tmp_path / "o")]), trainer.__file__, "x") as r,
    ):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        if what != "lost":
            raise ImportError("initialization failed") if what == "another error" else run.UserError("disk full")
        r.log({"epoch": 1, "val_loss": 0.5})
    if what == "user error":
        assert str(end.value) == "disk full" and r.record["state"] == "failed"
    else:
        assert end.value.code == 143 and r.record["state"] == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_study_told_to_stop_ends_its_runs_in_order(trainer, tmp_path):
    jobs = [study.Job(tmp_path / f"run{i}", ["--seed", str(i), "--wait", "600"]) for i in range(3)]

    def stop():
        rows = [tmp_path / f"run{i}" / "metrics.csv" for i in range(2)]
        processes.wait_for(lambda: all(file.exists() for file in rows), "the rows of two runs")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, message = failure(study.run_jobs, trainer, jobs, argparse.Namespace(jobs=2, list=False))
    assert code == 1 and "continues where it was" in message
    states = [json.loads(file.read_text())["state"] for file in tmp_path.glob("run*/run.json")]
    assert states == ["interrupted"] * 2, "the third never began"


def test_data_on_another_drive_has_its_name_alone_in_the_record(monkeypatch):
    def relpath(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert arguments.path_for_record("/pictures/leaves") == "./leaves"


# -------------------------------------------------------------------------------------------------------- downloads


class Host(http.server.BaseHTTPRequestHandler):
    """A mirror on localhost that misbehaves as its path says. The time of its server passes while it sends slowly."""

    CONTENT = bytes(range(256)) * 2000

    def do_GET(self):
        way, body = self.path.split("/")[1], self.CONTENT
        if way == "down":
            return self.send_error(503)
        if way == "silent":
            return self.server.closing.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if way == "wrong":
                body = body[::-1]
            if way == "cut":
                return self.wfile.write(body[: len(body) // 2])
            for i in range(0, len(body), 5000):
                self.server.seconds += way == "slow"
                self.wfile.write(body[i : i + 5000])

    def log_message(self, *args):
        pass


class Downloader(pooch.HTTPDownloader):
    """pooch's, whose patience depends on the host alone: a busy machine may make any host wait."""

    def __call__(self, url, *args, **kwargs):
        self.kwargs["timeout"] = 0.2 if "silent" in url else processes.PATIENCE
        return super().__call__(url, *args, **kwargs)


@pytest.fixture
def host(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.seconds, server.closing = 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pooch, "HTTPDownloader", Downloader)
    monkeypatch.setattr(fetch, "time", types.SimpleNamespace(monotonic=lambda: server.seconds))
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.closing.set()
    server.shutdown()
    server.server_close()


MD5 = "md5:" + hashlib.md5(Host.CONTENT).hexdigest()


@pytest.mark.parametrize("way", ["down", "silent", "wrong", "cut", "slow", "nobody"])
def test_a_bad_mirror_is_skipped(way, host, tmp_path):
    bad = "http://127.0.0.1:9/file" if way == "nobody" else f"{host}/{way}/file"
    path = tmp_path / "sub" / "file"
    received = fetch.download([bad, f"{host}/good/file"], path, MD5)
    assert received == path and path.read_bytes() == Host.CONTENT
    path.unlink()
    path.parent.rmdir()
    code, message = failure(lambda: fetch.download([bad], path, MD5))
    assert code == 1 and one_line(message) and "127.0.0.1" in message
    assert not list(tmp_path.iterdir()), "neither a half file nor an empty folder is left behind"


def test_a_patient_download_takes_a_slow_host(host, tmp_path):
    fetch.download([f"{host}/slow/file"], tmp_path / "file", MD5, min_rate=0)
    assert (tmp_path / "file").read_bytes() == Host.CONTENT


def test_mnist_named_waits_for_a_slow_mirror_and_auto_does_not(host, tmp_path, monkeypatch):
    monkeypatch.setitem(images.MNIST, "mirrors", [f"{host}/slow/"])
    monkeypatch.setitem(images.MNIST, "files", {"a.gz": MD5, "b.gz": MD5})
    with pytest.raises(fetch.Unreachable):
        images.prepare("mnist", tmp_path, patient=False)
    place = images.prepare("mnist", tmp_path)
    assert sorted(file.name for file in place.iterdir()) == ["a.gz", "b.gz"]


def test_a_download_waits_for_an_answer_as_long_as_it_says(host, tmp_path, monkeypatch):
    timeouts = []
    monkeypatch.setattr(
        pooch, "HTTPDownloader", lambda timeout, **options: timeouts.append(timeout) or Downloader(**options)
    )
    fetch.download([f"{host}/good/file"], tmp_path / "file", MD5, patience=7)
    assert timeouts == [7]


def test_a_file_already_there_is_verified(tmp_path):
    (tmp_path / "file").write_bytes(Host.CONTENT)
    assert fetch.download([], tmp_path / "file", MD5) == tmp_path / "file"
    (tmp_path / "file").write_bytes(b"rubbish")
    code, message = failure(lambda: fetch.download([], tmp_path / "file", MD5))
    assert code == 1 and one_line(message) and str(tmp_path / "file") in message
    assert (tmp_path / "file").read_bytes() == b"rubbish", "what the user had is the user's"


@pytest.mark.parametrize("name", ["../escaped", "{tmp_path}/escaped", "link/escaped"])
def test_a_tar_that_would_escape(name, tmp_path):
    name = name.format(tmp_path=tmp_path)
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        if name.startswith("link"):
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path.parent)
            tar.addfile(link)
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    (tmp_path / "in").mkdir()
    code, message = failure(lambda: fetch.extract(tmp_path / "bad.tar.gz", tmp_path / "in" / "folder"))
    assert code == 1 and one_line(message) and "bad.tar.gz" in message
    assert not list((tmp_path / "in").iterdir())
    assert not [folder for folder in (tmp_path, tmp_path.parent) if (folder / "escaped").exists()]


def test_a_truncated_archive(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(os.urandom(100_000))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "folder", "folder")
    shutil.rmtree(tmp_path / "folder")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[:50_000])
    code, message = failure(lambda: fetch.extract(tmp_path / "a.tar.gz", tmp_path / "folder"))
    assert code == 1 and one_line(message) and not (tmp_path / "folder").exists()
    (tmp_path / "a.tar.gz").write_bytes(whole)
    assert (fetch.extract(tmp_path / "a.tar.gz", tmp_path / "folder") / "file").stat().st_size == 100_000


# ----------------------------------------------------------------------------------------------------------- images


@pytest.mark.slow
@pytest.mark.parametrize("name, classes, one", [("cifar10", 10, "airplane"), ("cifar100", 100, "bear")])
def test_the_real_cifar(name, classes, one, data_dir):
    data = images.load(name, data_dir(images.CIFAR[name]["folder"]))
    assert [len(labels) for _, labels in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    for pixels, labels in (data.train, data.val, data.test):
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (3, 32, 32)
        assert np.bincount(labels).tolist() == [len(labels) // classes] * classes, "stratified"
    assert len(data.classes) == classes and one in data.classes


@pytest.mark.slow
def test_pixels_and_labels_are_torchvisions(data_dir):
    torchvision = pytest.importorskip("torchvision")
    folder = data_dir("cifar-10-batches-py")
    theirs = torchvision.datasets.CIFAR10(folder, train=False)
    ((pixels, labels),), _ = images.in_order([(theirs.data.transpose(0, 3, 1, 2), np.array(theirs.targets))])
    ours = images.load("cifar10", folder)
    assert np.array_equal(ours.test[0], pixels) and np.array_equal(ours.test[1], labels)
    assert ours.classes == theirs.classes


@pytest.mark.slow
def test_channel_statistics_are_the_published_ones(data_dir):
    """(0.5071, 0.4867, 0.4408) is what everybody normalizes CIFAR-100 with: the mean over its 50,000 images."""
    parts, _ = images.read_batches("cifar100", data_dir("cifar-100-python") / "cifar-100-python")
    mean, std = images.statistics(parts[0][0])
    assert (mean / 255).tolist() == pytest.approx([0.5071, 0.4865, 0.4409], abs=3e-4)
    assert (std / 255).tolist() == pytest.approx([0.2673, 0.2564, 0.2762], abs=3e-4)


def test_row_order_does_not_matter():
    (pixels, labels), _ = shapes.draw_builtin()[0]
    shuffled = np.random.default_rng(1).permutation(len(labels))
    (a,), digest_a = images.in_order([(pixels, labels)])
    (b,), digest_b = images.in_order([(pixels[shuffled], labels[shuffled])])
    assert digest_a == digest_b and np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    pixels, labels = pixels.copy(), labels.copy()
    pixels[17, 0, 0, 0] ^= 1
    digest_c = images.in_order([(pixels, labels)])[1]
    labels[17] ^= 1
    assert len({digest_a, digest_c, images.in_order([(pixels, labels)])[1]}) == 3, "one bit is another dataset"


def test_the_parts_do_not_overlap():
    data = images.load("builtin", by_colour=True)
    rows = [{row.tobytes() for row in pixels} for pixels, _ in (data.train, data.val, data.test)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert [len(row) for row in rows] == [4500, 500, 1000]
    assert np.bincount(data.val[1]).tolist() == [5] * 100
    part = images.load("builtin", limit=100, by_colour=True)
    assert np.array_equal(part.train[0], data.train[0][:100]) and len(set(part.train[1])) > 40
    half = images.load("builtin", fraction=0.5)
    assert len(half.train[1]) == len(half.val[1]) == 2500


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small dataset in the published layout, with what is published of CIFAR-10 adapted to it: (folder, spec)."""
    rng = np.random.default_rng(0)
    spec = images.CIFAR["cifar10"] | dict(
        mirrors=[], origin="http://127.0.0.1:9/x", digest="?", parquet=("http://127.0.0.1:9/{}", "label")
    )
    folder, parts = tmp_path / "data" / spec["folder"], []
    folder.mkdir(parents=True)
    for names in spec["parts"]:
        pixels, labels = [], []
        for name in names:
            batch = {"data": rng.integers(0, 256, (100, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(100)]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            pixels.append(batch["data"].reshape(-1, 3, 32, 32))
            labels.append(batch["labels"])
        parts.append((np.concatenate(pixels), np.concatenate(labels)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))
    spec["digest"] = images.in_order(parts)[1]
    monkeypatch.setitem(images.CIFAR, "cifar10", spec)
    return folder, spec


def sizes(data):
    return [len(labels) for _, labels in (data.train, data.val, data.test)]


def test_a_local_copy_is_used_as_it_is(published):
    assert sizes(images.load("cifar10", published[0].parent)) == [450, 50, 100]
    assert sizes(images.load("auto", published[0].parent, auto="cifar10")) == [450, 50, 100]


@pytest.mark.parametrize("damage", ["truncated", "one pixel", "missing", "code", "no batch", "labels", "huge label"])
@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_corrupt_local_file_is_named_and_never_replaced(damage, name, published):
    folder, _ = published
    file = folder / "data_batch_3"
    whole = file.read_bytes()
    batch = pickle.loads(whole)
    batch["data"][7, 7] ^= 1
    content = {
        "truncated": whole[: len(whole) // 2],
        "one pixel": pickle.dumps(batch, protocol=2),
        "missing": None,
        "code": pickle.dumps(argparse.Namespace()),
        "no batch": pickle.dumps([1, 2]),
        "labels": pickle.dumps(batch | {"labels": batch["labels"][:50]}, protocol=2),
        "huge label": pickle.dumps(batch | {"labels": [2**70] * 100}, protocol=2),
    }[damage]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    code, message = failure(lambda: images.load(name, folder.parent, auto="cifar10"))
    assert code == 1 and one_line(message)
    assert (str(folder) if damage == "one pixel" else "data_batch_3") in message


def test_the_unpickler_calls_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    (tmp_path / "file").write_bytes(pickle.dumps(Evil()))
    code, message = failure(images.read_pickle, tmp_path / "file")
    assert code == 1 and "not an array" in message and not (tmp_path / "evil").exists()


def test_a_local_archive_is_verified_and_unpacked(published, monkeypatch):
    folder, spec = published
    archive = folder.parent / spec["archive"]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    code, message = failure(lambda: images.load("cifar10", folder.parent))
    assert code == 1 and spec["archive"] in message and "checksum" in message
    monkeypatch.setitem(spec, "md5", "md5:" + hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(images.load("cifar10", folder.parent).train[1]) == 450 and folder.is_dir()


def test_auto_falls_back_loudly_and_a_name_never(published, capsys):
    folder, _ = published
    shutil.rmtree(folder.parent)
    assert images.load("auto", folder.parent, limit=50, auto="cifar10").name == "builtin"
    assert "BUILT-IN" in capsys.readouterr().err
    code, message = failure(lambda: images.load("cifar10", folder.parent))
    assert code == 1 and "cifar10 could not be fetched" in message
    assert str(folder.parent) in message and folder.name in message, "where it looked, and for what"
    assert not folder.parent.exists(), "an empty folder is not left behind"


@pytest.mark.parametrize("honest", [True, False])
def test_the_hubs_parquet_is_the_same_dataset(honest, published, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, spec = published
    before = images.load("cifar10", folder.parent)
    parts, classes = images.read_batches("cifar10", folder)
    shutil.rmtree(folder)

    def download(urls, path, *args):
        pixels, labels = parts["test" in urls[0]]
        cells = []
        for image in pixels[::-1]:  # another row order
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        names = {"info": {"features": {"label": {"names": classes}}}}
        table = pyarrow.table({"img": cells, "label": labels[::-1] if honest else labels})
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
        return path

    monkeypatch.setattr(fetch, "download", download)
    if honest:
        packed = images.fetch_parquet("cifar10", folder.parent / "cifar10.npz")
        assert packed.exists()
        after = images.load("cifar10", folder.parent)
        assert np.array_equal(before.train[0], after.train[0]) and before.classes == after.classes
    else:
        with pytest.raises(fetch.Unreachable, match="other images"):
            images.fetch_parquet("cifar10", folder.parent / "cifar10.npz")
        assert not list(folder.parent.iterdir())


# --------------------------------------------------------------------------------------------- images of one's own


@pytest.mark.parametrize(
    "parts, counts",
    [
        ({"": 20}, [32, 4, 4]),
        ({"train": 20, "test": 5}, [36, 4, 10]),
        ({"train": 20, "val": 5}, [36, 10, 4]),
        ({"train": 20, "val": 5, "test": 3}, [40, 10, 6]),
    ],
)
@pytest.mark.parametrize("shape", [(3, 32), (1, 28)])
def test_one_layout_for_every_folder_of_images(parts, counts, shape, tmp_path):
    data = images.load(str(make_images(tmp_path, parts)), shape=shape)
    assert sizes(data) == counts and data.classes == ["cats", "dogs"]
    assert data.train[0].shape[1:] == (shape[0], shape[1], shape[1]) and data.train[0].flags["C_CONTIGUOUS"]
    train, test = ({row.tobytes() for row in part[0]} for part in (data.train, data.test))
    assert not train & test


def test_an_image_is_cropped_square_and_upright(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 18:42, 0] = 200  # red in the middle
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (image_files.read_image(tmp_path / "a.png", 3, 8)[0] > 190).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(pixels).save(tmp_path / "b.jpg", exif=exif)
    assert image_files.open_image(tmp_path / "b.jpg").size == (20, 60)


def test_what_is_no_image_is_skipped_and_counted(tmp_path, capsys):
    make_images(tmp_path, {"train": 4, "val": 2})
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / "train" / "cats" / name).write_bytes(b"x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "empty").mkdir()
    make_images(tmp_path, {"val": 1}, classes=["birds"])
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "train" / "cats" / "x.png")  # would wait for ever
        (tmp_path / "train" / "cats" / "y.png").symlink_to(tmp_path / "nowhere")
    data = images.load(str(tmp_path))
    assert sizes(data) == [6, 4, 2] and data.classes == ["cats", "dogs"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "Thumbs.db" in lines[0] and "empty" in lines[1] and "birds" in lines[2]
    assert lines[0].split(": ")[1].startswith("5 files" if hasattr(os, "mkfifo") else "3 files")


def test_only_the_parts_that_are_wanted_are_read_and_only_one_process_says_what_is_skipped(
    tmp_path, monkeypatch, capsys
):
    make_images(tmp_path, {"train": 3, "val": 2, "test": 2})
    (tmp_path / "train" / "notes.txt").write_text("x")
    (tmp_path / "train" / "cats" / "notes.txt").write_text("x")
    found = image_files.find(tmp_path, parts=("train", "val"))
    assert len(found.val) == 4 and found.test is None
    assert capsys.readouterr().err.count("notes.txt") == 1
    monkeypatch.setenv("RANK", "1")
    assert len(image_files.find(tmp_path).test) == 4 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "case, said",
    [
        ("one class", "two folders"),
        ("few", "dogs (2)"),
        ("bad", "bad.png"),
        ("bomb", "bomb.png"),
        ("no such class", "no image of a class"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(case, said, tmp_path):
    make_images(tmp_path, {"train": 3}, classes=["cats"] if case == "one class" else ["cats", "dogs"])
    if case == "few":
        (tmp_path / "train" / "dogs" / "0.png").unlink()
    if case == "bad":
        (tmp_path / "train" / "dogs" / "bad.png").write_bytes(b"rubbish")
    if case == "bomb":
        (tmp_path / "train" / "dogs" / "bomb.png").write_bytes(b"P4\n30000 30000\n")  # Pillow reads the size first
    if case == "no such class":
        make_images(tmp_path, {"val": 1}, classes=["birds"])
    code, message = failure(lambda: images.load(str(tmp_path)))
    assert code == 1 and one_line(message) and said in message and str(tmp_path) in message


def test_a_folder_without_classes_is_taken_where_that_is_wanted(tmp_path):
    make_images(tmp_path, {"": 5}, classes=[""])
    found = image_files.find(tmp_path, classless=True)
    assert found.classes == ["images"] and len(found.train) == 5
    assert failure(image_files.find, tmp_path)[0] == 1
    assert image_files.find(make_images(tmp_path, {"": 4}), classless=True).classes == ["cats", "dogs"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_a_class_whose_name_is_not_utf8(tmp_path):
    make_images(tmp_path / "images", {"": 4}, classes=["cats", os.fsdecode(b"caf\xff")])
    process = start("cifar", "--data", "images", "--recipe", "tiny", "--out", "run", cwd=tmp_path, fresh=True)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "kind, classes",
    [
        ("mnist", "0123456789"),
        ("letters", "abcdefghijklmnopqrstuvwxyz"),
        ("balanced", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
    ],
)
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_drop_ins_for_mnist(kind, classes, suffix, tmp_path):
    """EMNIST's images are stored transposed, and its letters are labelled from 1."""
    data = images.load(str(write_drop_in(tmp_path / kind, kind, suffix, 141)), shape=(1, 28))
    assert "".join(data.classes) == classes and len(data.test[1]) == 141
    assert data.test[1].min() == 0 and data.test[1].max() == len(classes) - 1
    column = data.test[0][0, 0][5]
    assert (column == 5).all() if kind == "mnist" else column.tolist()[1:] == list(range(1, 28))
    code, message = failure(lambda: images.load(str(tmp_path / kind), shape=(3, 32)))
    assert code == 1 and one_line(message) and "28 x 28" in message


@pytest.mark.parametrize("damage", ["missing", "two", "cut", "labels", "not gzip", "magic", "fifo"])
def test_idx_files_that_cannot_be_used(damage, tmp_path):
    folder = write_drop_in(tmp_path / "x", "mnist")
    file = folder / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    if damage == "missing":
        (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    if damage == "two":
        write_drop_in(folder, "letters")
    if damage in ("cut", "magic"):
        file.write_bytes(gzip.compress(whole[:-5] if damage == "cut" else b"\0\0\x09\x03" + whole[4:]))
    if damage == "labels":
        write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(7))
    if damage == "not gzip":
        file.write_bytes(b"hello")
    if damage == "fifo":
        file.unlink()
        os.mkfifo(file)
    code, message = failure(lambda: images.load(str(folder), shape=(1, 28)))
    assert code == 1 and one_line(message) and str(folder) in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are POSIX's")
@pytest.mark.parametrize("reader", ["read_pickle", "read_packed"])
def test_a_fifo_in_place_of_cifar_is_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    code, message = failure(getattr(images, reader), tmp_path / "fifo")
    assert code == 1 and one_line(message) and "fifo: cannot be read (not a regular file)" in message


@pytest.mark.slow
def test_mnist_is_found_unpacked_and_in_other_folders(data_dir, tmp_path, monkeypatch):
    packed = data_dir("MNIST/raw") / "MNIST" / "raw"
    whole = images.load("mnist", data_dir("MNIST/raw"))
    assert sizes(whole) == [54_001, 5_999, 10_000]
    for i, place in enumerate(("MNIST/raw", "mnist", ".")):
        folder = tmp_path / str(i) / place
        folder.mkdir(parents=True)
        for name in images.MNIST["files"]:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress((packed / name).read_bytes()))
        again = images.load("mnist", tmp_path / str(i))
        assert again.digest == whole.digest
    file = folder / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    code, message = failure(lambda: images.load("mnist", folder))
    assert code == 1 and one_line(message) and "not mnist as published" in message
    monkeypatch.setitem(images.MNIST, "mirrors", [])
    code, message = failure(lambda: images.load("mnist", tmp_path / "nothing"))
    assert code == 1 and "train-images-idx3-ubyte.gz" in message and str(tmp_path / "nothing") in message
    assert not (tmp_path / "nothing").exists()


# ---------------------------------------------------------------------------------------------------------- fuzzing


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "idx", "idx.gz", "cifar", "npz"])
def test_fuzzed_image_files(kind, good_files):
    """A mutated file is read or refused in one line, within seconds, and stays as it is."""
    folder, file, read = good_files(kind)
    damaged = folder / f"damaged-{file.name}"
    for content in mutations(file.read_bytes(), random.Random(kind), 200):
        damaged.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(damaged)
        except run.UserError as error:
            assert one_line(f"error: {error}") and damaged.name.removesuffix(".gz") in str(error)
        assert damaged.read_bytes() == content


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """good_files(kind): (folder, a good file, the function that reads such a file)."""
    folder, pixels = tmp_path_factory.mktemp("fuzz"), np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)

    def make(kind):
        file = folder / f"good.{kind}"
        if kind in ("png", "jpg", "webp", "bmp"):
            Image.fromarray(pixels).save(file)
            return folder, file, lambda path: image_files.read_image(path, 3, 32)
        if kind.startswith("idx"):
            file = folder / ("train-images-idx3-ubyte" + kind[3:])
            write_idx(file, np.zeros((3, 28, 28)))
            return folder, file, lambda path: image_files.read_idx_file(folder, path.name.removesuffix(".gz"), 3)
        if kind == "npz":
            np.savez(
                file,
                classes=np.array(["a"]),
                train_images=pixels,
                train_labels=pixels,
                test_images=pixels,
                test_labels=pixels,
            )
            return folder, file, images.read_packed
        file.write_bytes(pickle.dumps({"data": pixels, "labels": [1, 2]}, protocol=2))
        return folder, file, images.read_pickle

    return make


# --------------------------------------------------------------------------------------------------------- calibration


def test_the_temperature_is_the_one_that_labels_were_drawn_at():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20_000, 5, generator=generator)
    labels = (logits / 2.5).softmax(1).multinomial(1, generator=generator)[:, 0]
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    losses = [torch.nn.functional.cross_entropy(logits / (temperature * f), labels) for f in (0.99, 1, 1.01)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_the_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    labels = torch.tensor([0, 1, 0, 1])
    assert calibration.calibration_error(probabilities, labels) == pytest.approx((0.1 + 2 * 0.1 + 0.2) / 4)
    shares = calibration.unsure_shares(probabilities, labels, 0.7)
    assert shares == {"all": pytest.approx(2 / 4), "right": pytest.approx(1 / 3), "wrong": 1.0}
    assert math.isnan(calibration.unsure_shares(probabilities[:1], labels[:1], 0.7)["wrong"])
