"""Commands in processes of their own, which tests kill, stop and limit: `start` is subprocess.Popen for a script of a
folder, without the seconds that importing PyTorch takes. tests/fork_server.py is the other side."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock

HERE = Path(__file__).resolve().parent
CAN_FORK = hasattr(os, "fork") and hasattr(socket, "send_fds")
PATIENCE = 600  # seconds that only a hang takes

# What the scripts of a folder import besides PyTorch, NumPy and matplotlib, and takes more than a moment; but not what
# starts threads when it is imported, as scikit-learn's datasets do.
PRELOAD = {
    "distilgpt2": ["transformers.models.gpt2.modeling_gpt2", "transformers.models.auto", "tokenizers.trainers", "peft"],
    "lms": ["scipy.linalg"],
    "s2vt": ["sacrebleu"],
}


def wait_for(condition, what="the event", process=None):
    """Wait until `condition()` is true and return its value; what: for the message where that never comes.

    process: one that has to live until then.
    """
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if process is not None and process.poll() is not None:
            if value := condition():
                return value
            raise AssertionError(f"the process ended before {what} came: {process.returncode}, {process.communicate()}")
        assert time.monotonic() < end, f"{what} has not come in {PATIENCE} seconds"
        time.sleep(0.005)
    return value


def signal_at(function: str, call: int, name: str, before: bool = False) -> dict:
    """An event for `start`: the process sends itself the signal `name` at a call of `function` ("common.run:Run.log"),
    counted from 1. So a test kills it at the same place on every machine."""
    return {"function": function, "call": call, "before": before, "number": int(getattr(signal, name)), "pause": None}


def pause_at(function: str, call: int, before: bool = False) -> dict:
    """An event for `start`: the process waits there until `go_on`; see Process.wait_for_pause."""
    return {"function": function, "call": call, "before": before, "number": None, "pause": "here"}


def start(
    script,
    *argv,
    fresh=False,
    folder=None,
    events=(),
    stdin=os.devnull,
    stdout=None,
    stderr=None,
    closed=(),
    cwd=None,
    env=None,
    limits=None,
):
    """Start the Python script at the path `script`. Returns a Process, or with `fresh` one that is not forked.

    folder: the experiment whose libraries the script imports (default: the script's own folder). events: of
    `signal_at` and `pause_at`. stdin: a file. stdout, stderr: files to write to, open ones or paths, in
    place of those that `communicate` reads. closed: names of streams that are closed when the script starts. env:
    variables more; those that libraries read when they are imported need `fresh`. limits: {"RLIMIT_FSIZE": bytes}.
    Figures of a forked process are blank.
    """
    command = {
        "script": str(Path(script).resolve()),
        "argv": [str(word) for word in argv],
        "events": [dict(event) for event in events],
        "closed": list(closed),
        "cwd": str(cwd or os.getcwd()),
        "env": env or {},
        "limits": limits or {},
        "cache": str(place()),
        "preload": PRELOAD.get(folder or Path(script).parent.name, []),
    }
    kind = Process if CAN_FORK and not fresh else FreshProcess
    return kind(command, stdin, stdout, stderr)


def torchrun(script, *argv, processes=2, **options):
    """Run `script` in several processes, as torchrun does. Returns them ended, in the order of their ranks."""
    import torch.distributed

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    env = options.pop("env", {}) | place | count
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [start(script, *argv, env=env | rank, **options) for rank in ranks]
    for process in started:
        process.wait()
    del store  # which they used until they ended
    return started


def assert_done(*started):
    """Each of these processes ends without an error."""
    for process in started:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors


class Process:
    """A forked process, with what subprocess.Popen offers."""

    def __init__(self, command, stdin, stdout, stderr):
        self.args = [command["script"], *command["argv"]]
        self.pid = None
        self.returncode = None
        self._command = tempfile.NamedTemporaryFile(delete=False)  # Windows: else nobody else can open it
        self._pauses = []
        for event in command["events"]:
            if event["pause"]:
                self._pauses.append(Path(f"{self._command.name}-pause{len(self._pauses)}"))
                event["pause"] = str(self._pauses[-1])
        self._command.write(json.dumps(command).encode())
        self._command.flush()
        self._command.seek(0)
        self._files = [open(stdin, "rb"), *map(open_output, (stdout, stderr))]
        self._start(command)

    def _start(self, command):
        self._connection, self._unread = connect(server()), b""
        descriptors = [file.fileno() for file in (self._command, *self._files)]
        socket.send_fds(self._connection, [b"x"], descriptors)
        while self.pid is None:
            self._receive(PATIENCE)

    def _receive(self, timeout):
        """Take note of what the server says of the process, waiting for it at most `timeout` seconds."""
        self._connection.settimeout(timeout)
        try:
            received = self._connection.recv(4096)
        except (TimeoutError, BlockingIOError):
            return
        assert received, f"the fork server is gone; its last words: {last_words()}"
        *lines, self._unread = (self._unread + received).split(b"\n")
        for message in map(json.loads, lines):
            self.pid = message.get("pid", self.pid)
            self.returncode = message.get("returncode", self.returncode)
        if self.returncode is not None:
            self._connection.close()

    def poll(self):
        if self.returncode is None:
            self._receive(0)
        return self.returncode

    def wait(self, timeout=PATIENCE):
        end = time.monotonic() + timeout
        while self.returncode is None:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._receive(left)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def output(self):
        """(stdout, stderr) so far, as text."""
        texts = []
        for file in self._files[1:]:
            size = os.fstat(file.fileno()).st_size
            texts.append(os.pread(file.fileno(), size, 0).decode(errors="replace") if file.readable() else "")
        return tuple(texts)

    def communicate(self, timeout=PATIENCE):
        """Wait for the end. Returns (stdout, stderr)."""
        self.wait(timeout)
        return self.output()

    def wait_for_pause(self, number=0):
        """Wait until the process itself waits, at the `pause_at` of this number among its events."""
        wait_for(self._pauses[number].exists, "the pause", self)

    def go_on(self, number=0):
        """End that pause."""
        self._pauses[number].unlink()

    def __del__(self):
        for file in (self._command.name, *self._pauses):
            Path(file).unlink(missing_ok=True)
        with contextlib.suppress(AttributeError):  # it never started
            self._connection.close()  # the server kills it if it is still there


def open_output(stream):
    """The file of a stream: `stream` itself, or the file at that path, or a temporary one for None."""
    if stream is None:
        return tempfile.TemporaryFile()
    return stream if hasattr(stream, "fileno") else open(stream, "wb")


class FreshProcess(Process):
    """The same in a new Python, which pays for its imports."""

    def _start(self, command):
        words = self.args
        if command["events"] or command["closed"] or command["limits"]:
            words = [str(HERE / "fork_server.py"), "--once", self._command.name]
        stdin, stdout, stderr = self._files
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=command["cwd"],
            env=os.environ | command["env"],
        )
        self.pid = self._process.pid

    def _receive(self, timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.returncode = self._process.returncode


# ------------------------------------------------------------------------------------------------------ the server


def place() -> Path:
    """The folder of the server's socket: one for all processes of a test session, which inherit the variable."""
    if "FORK_SERVER_DIR" not in os.environ:
        os.environ["FORK_SERVER_DIR"] = tempfile.mkdtemp(prefix="fork-server-")
    return Path(os.environ["FORK_SERVER_DIR"])


@functools.cache
def server() -> Path:
    """The socket of the server. It is started where there is none yet, and ends with the last process that uses it."""
    path = place() / "socket"
    with filelock.FileLock(path.with_name("lock")):
        try:
            lease = connect(path)
        except OSError:
            path.unlink(missing_ok=True)
            lease = wait_for(functools.partial(try_to_connect, path), "the fork server", start_server(path))
    atexit.register(lease.close)
    return path


def start_server(path):
    with open(path.with_name("log"), "ab") as log:
        words = [sys.executable, str(HERE / "fork_server.py"), str(path)]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def try_to_connect(path):
    with contextlib.suppress(OSError):
        return connect(path)


def connect(path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def last_words() -> str:
    log = place() / "log"
    return log.read_text()[-2000:] if log.exists() else "none"
