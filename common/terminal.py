"""The screen: errors of one line, Ctrl-C, and output streams that may be closed, full or of another encoding.

Importing it first makes Ctrl-C, a closed pipe and a full disk end in one line instead of a traceback, in a script that
lies beside `common`. It does nothing in tests, notebooks and DataLoader workers.
"""

import ast
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

from common.cores import affinity_cores, usable_cores

# line ends and other control characters; the signs that change the direction of writing
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """An error that the user can fix; `cli` prints its message as one line and exits with 1."""


class Diverged(UserError):
    """The loss is no longer finite at `step`. figure: the file that shows how it exploded, once it is drawn."""

    def __init__(self, step):
        super().__init__(f"diverged: the loss is not finite at step {step}; a smaller --lr usually fixes it")
        self.step = step
        self.figure = None

    def __str__(self):
        shown = f"; {self.figure} shows how" if self.figure else ""
        return super().__str__() + shown


def cli(main):
    """Run a script's main() as a command: Ctrl-C, a UserError and a lack of memory are one line each. DEBUG=1 shows the
    traceback."""
    if is_main_script():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except UserError as error:
        if os.environ.get("DEBUG"):
            raise
        code, message = 1, f"error: {error_line(error)}"
    except Exception as error:
        if os.environ.get("DEBUG") or not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        code, message = 1, f"error: not enough memory ({reason}); choose a smaller model, batch or input"
    print(message, file=sys.stderr)
    if is_main_script() and hasattr(signal, "SIGCHLD"):  # PyTorch's handler reports workers that Python ends at exit
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise SystemExit(code)


def is_out_of_memory(error: Exception) -> bool:
    """Is it an allocation that failed, in Python or NumPy, or in PyTorch, which need not be imported?"""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def error_line(error: Exception) -> str:
    """The message of an error. PyTorch puts the whole traceback of a DataLoader worker into the message."""
    text = str(error).strip()
    text = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
    return printable(text)


def printable(text, keep: str = "") -> str:
    """A user's text, such as the name of a file, for the screen: what would end the line, move the cursor or turn the
    direction of writing is escaped, but the characters in `keep`."""

    def escape(match):
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return CONTROL.sub(escape, str(text))


class Stream:
    """A text stream that drops its output once it cannot be written (a closed pipe, a full disk)."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError):  # from now on its file descriptor leads to the null device
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def is_main_script() -> bool:
    """Is this process one of the scripts that lie beside `common`, started as a command?"""
    main, package = (getattr(sys.modules[name], "__file__", None) for name in ("__main__", "common"))
    if main is None or package is None or multiprocessing.parent_process() is not None:
        return False
    return Path(main).resolve().parent in Path(package).resolve().parents


def is_command(script: Path) -> bool:
    """Does a script do something when it is started? Else it is a module, which only defines what scripts import."""
    statements = ast.parse(script.read_bytes()).body
    calls = [one for one in statements if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call)]
    return bool(calls) or any(isinstance(one, ast.If | ast.For | ast.While | ast.With | ast.Try) for one in statements)


def refuse_module(script: Path):
    """Exit with 2 and one line if the script that was started is no command; it would end without a word."""
    if not script.is_file() or is_command(script):  # no file: standard input
        return
    names = [file.name for file in sorted(script.parent.glob("*.py")) if is_command(file) and file.name != "common.py"]
    message = f"error: {script.name} is a module that scripts import; the commands here are {', '.join(names)}"
    print(message, file=sys.stderr)
    raise SystemExit(2)


def exit_interrupted(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


def set_up_openmp():
    """Set what OpenMP reads when torch is imported. Variables of the user's own stay as they are.

    By default, threads of libgomp that wait for each other compute in a loop for milliseconds. Beside other programs, a
    training with two threads then takes many times as long as with one.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if usable_cores() < affinity_cores():  # a CPU quota, which OpenMP does not know
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def protect():
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed 0, 1 or 2 would be given to the next file
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream))
    set_up_openmp()
    signal.signal(signal.SIGINT, exit_interrupted)  # while modules are imported; `cli` restores Python's own


if is_main_script():
    refuse_module(Path(sys.modules["__main__"].__file__))
    protect()
