"""A process that has imported PyTorch and forks a child per command, so that no command pays for that import.

    python tests/fork_server.py SOCKET         # serve commands until no test process is connected any more
    python tests/fork_server.py --once FILE    # run the command in a JSON file in this process, where there is no fork

The server imports modules and runs no tensor operation: after the first parallel one, a forked child would hang in its
first. A child runs a script as Python does when the script is its command: it is `__main__`, its folder is first on
sys.path, and none of its modules are imported yet. tests/processes.py is the other side.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import pickle
import re
import selectors
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import blank_figures

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


# {folder: function}: what makes the built-in data of a folder and takes seconds, or imports what does
BUILTIN_DATA = {"simplenn": "read_sklearn_digits", "s2vt": "builtin_part"}


def keep_results(module, function, folder):
    """Let a function of `module`, which makes built-in data, run once for all processes that name the same `folder`."""
    make = getattr(module, function)

    @functools.cache
    def kept(*args, **kwargs):
        name = re.sub(r"[^\w]+", "-", f"{args}{kwargs}")
        file = Path(folder) / f"{function}{name}.pickle"
        if not file.exists():
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(pickle.dumps(make(*args, **kwargs)))
            temporary.replace(file)
        return pickle.loads(file.read_bytes())

    setattr(module, function, kept)


# ------------------------------------------------------------------------------------------------------- the child


def run_script(command):
    """Run the script of `command` as `__main__`, with its directory, environment, streams and limits."""
    os.chdir(command["cwd"])
    os.environ.update(command["env"])
    for name in command["closed"]:  # as Python does where a stream is closed when it starts
        os.close(STREAMS[name])
        setattr(sys, name, None)
    for name, limit in command["limits"].items():
        import resource  # POSIX

        resource.setrlimit(getattr(resource, name), (limit, limit))
    script = Path(command["script"])
    sys.argv[:], sys.path[0] = [str(script), *command["argv"]], str(script.parent)
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    if (script.parent / "common.py").exists():
        keep_results(importlib.import_module("common.shapes"), "draw_builtin", command["cache"])
        if function := BUILTIN_DATA.get(script.parent.name):
            keep_results(importlib.import_module("data"), function, command["cache"])
    for event in command["events"]:
        act_at(**event)
    exec(compile(script.read_bytes(), script, "exec"), vars(main))


def run_and_leave(command):
    """Run the script, and end this process as Python would, but without taking down its modules, which takes longer
    than most of the scripts. An exception is left to Python."""
    status = None
    try:
        run_script(command)
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # wait for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # closed, or full: Python has an exit status for that
            sys.exit(status)
    os._exit(status if isinstance(status, int) else int(status is not None))


def act_at(function: str, call: int, before: bool, number: int | None, pause: str | None):
    """Send this process the signal `number`, or make it wait, before or after a call of `function`, "module:name" or
    "module:class.name".

    call: which one, from 1. pause: a file that says that the process waits, which it does until the file is removed.
    """
    module, _, path = function.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)

    def act():
        if number is not None:
            return os.kill(os.getpid(), number)
        Path(pause).touch()
        while Path(pause).exists():
            time.sleep(0.005)

    @functools.wraps(original)
    def counted(*args, **kwargs):
        due = next(calls) == call
        if due and before:
            act()
        result = original(*args, **kwargs)
        if due and not before:
            act()
        return result

    setattr(owner, name, counted)


# ------------------------------------------------------------------------------------------------------ the server


class Server:
    """Connections of test processes (leases), and one connection for each child that they asked for."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.children, self.connections = {}, {self.listener}
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        wake_up, self.wake_up = socket.socketpair()
        wake_up.setblocking(False)
        self.connections |= {wake_up, self.wake_up}
        self.selector.register(self.wake_up, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake_up.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self):
        """Serve until the last test process is gone (None), or return in a child with the command that it is to run."""
        used, parent = False, os.getppid()
        while len(self.connections) > 3 or not used and os.getppid() == parent:
            for key, _ in self.selector.select(timeout=60):
                if key.fileobj is self.listener:
                    used = True
                    connection = self.listener.accept()[0]
                    self.connections.add(connection)
                    self.selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj is self.wake_up:
                    self.wake_up.recv(4096)
                    self.report()
                elif command := self.receive(key.fileobj):
                    return command
        return None

    def receive(self, connection):
        """Handle what a test process sent. Returns the command in a forked child, and None in the server."""
        message, descriptors, _, _ = socket.recv_fds(connection, 1, 4)
        if not message:  # the test process is gone, or has what it wanted: so is the child
            self.selector.unregister(connection)
            self.connections.discard(connection)
            connection.close()
            for pid in [pid for pid, one in self.children.items() if one is connection]:
                os.kill(pid, signal.SIGKILL)
            return None
        with open(descriptors.pop(0), "rb") as file:
            command = json.load(file)
        for name in command["preload"]:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            self.become_child(descriptors)
            return command
        for descriptor in descriptors:
            os.close(descriptor)
        self.children[pid] = connection
        send(connection, {"pid": pid})
        return None

    def become_child(self, streams):
        atexit.register(gc.unfreeze)  # else some libraries report at exit what is never collected
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for connection in self.connections:
            connection.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        # new ones: those of the server know what its own files can do
        sys.stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
        for name in ("stdout", "stderr"):
            old = getattr(sys, name)
            options = dict(encoding=old.encoding, errors=old.errors, closefd=False)
            setattr(sys, name, open(STREAMS[name], "w", buffering=1 if name == "stderr" else -1, **options))

    def report(self):
        """Tell the test processes which of their children have ended."""
        for pid, connection in list(self.children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                send(connection, {"returncode": os.waitstatus_to_exitcode(status)})
                del self.children[pid]


def send(connection, message):
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(json.dumps(message).encode() + b"\n")


def main():
    if sys.argv[1] == "--once":
        return run_script(json.loads(Path(sys.argv[2]).read_bytes()))
    import matplotlib.font_manager  # noqa: F401
    import torch._dynamo  # noqa: F401, the first optimizer imports it, which takes two seconds
    import torch.distributed.nn.functional  # noqa: F401
    import torch.utils.data  # noqa: F401

    blank_figures.install(lambda: False)
    command = Server(sys.argv[1]).serve()
    if command:
        run_and_leave(command)


if __name__ == "__main__":
    main()
