"""Running programs: a sandbox for generated code, a worker process for the solutions of our own generator.

The sandbox is made by `unshare` of util-linux (Linux only): user, network, pid, mount, ipc and uts namespaces of its
own; an unprivileged uid, also if the user is root; a root directory that holds Python and the system's libraries,
read-only, and an empty home; limits on CPU time, memory, file size, open files and processes for each program. No
network, no repository, no file to write, no System V shared memory, which would outlive a program and its limits.
`inside.py` is process 1 there, so no signal of a program reaches it, and it kills what a program leaves behind.

A program is given seconds of CPU time, so that the result does not depend on what else the machine does. Programs that
wait end after WALL times as many seconds by the clock.

Programs answer calls with values, and the results are compared outside the sandbox, so a program cannot fake a pass.
"""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from common import run
from common.run import UserError

from textbooks import inside

SOURCE = Path(inside.__file__).read_text(encoding="utf-8")
SECONDS = 5  # of CPU time, for a program and all its calls
WALL = 10  # by the clock, times as many
MEMORY = 512 * 2**20  # bytes of address space of each process
NOBODY = 65534
LIMITS = {"AS": MEMORY, "FSIZE": 2**20, "NOFILE": 32, "NPROC": 8, "CORE": 0}
# Makes the root directory of the sandbox below $1, then runs the rest of the arguments there. A process that is in a
# changed root directory cannot create user namespaces, so no program gets capabilities of its own. File descriptor 3 is
# the null device, for what programs print.
SETUP = """set -eu
top=$1; mask=$2; shift 2
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev none "$top"
cd "$top"
mkdir box box/home old proc
while [ "$1" != -- ]; do
    if [ -L "$1" ]; then ln -s "$(readlink "$1")" "box$1"
    elif [ -d "$1" ]; then
        mkdir -p "box$1"
        mount --bind "$1" "box$1"
        mount -o remount,bind,ro,nosuid,nodev "box$1"
    fi
    shift
done
shift
if [ -d "box$mask" ]; then mount -t tmpfs -o ro,size=4k none "box$mask"; fi
for path in box/*; do [ -e "${path#box/}" ] || ln -s "$path" "${path#box/}"; done
mount --rbind /proc proc
mount -o remount,bind,ro .
exec 3<>/dev/null
pivot_root . old
cd /
umount -l old
exec "$@"
"""


def command() -> list[str]:
    """The command that starts the supervisor in a sandbox."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    places = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"]
    places += [] if python.is_relative_to("/usr") else [str(Path(sys.base_prefix).resolve())]
    top = "/tmp"
    for folder in ("/mnt", "/srv", "/tmp"):
        if Path(folder).is_dir() and not any(Path(place).is_relative_to(folder) for place in places):
            top = folder
            break
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    outer = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    outer += [] if root else ["--user", "--map-root-user"]
    drop = ["setpriv", "--no-new-privs"]
    drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if root else []
    inner = ["unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--root=/box", "--wd=/home"]
    setup = ["sh", "-c", SETUP, "sandbox", top, str(run.ROOT), *places, "--"]
    return [*outer, *setup, *drop, *inner, str(python), "-I", "-S", "-c", SOURCE]


class Sandbox:
    """A sandbox that runs one program after another: `with Sandbox() as sandbox`. Raises UserError if the system
    cannot make one."""

    def __init__(self, seconds: int = SECONDS, wall: float | None = None):
        """seconds: of CPU time, for each process of a program. wall: by the clock; None: WALL times as many."""
        self.seconds = seconds
        self.wall = WALL * seconds if wall is None else wall
        self.process = None

    def __enter__(self):
        if not sys.platform.startswith("linux"):
            raise UserError(f"--execute: the sandbox exists on Linux alone, and this is {sys.platform}")
        self.start()
        self.ask({"program": "def f(): return 1", "calls": []})
        if self.process is None:
            raise UserError(f"--execute: no sandbox can be made here ({self.reason}); programs are not run without one")
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        words = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        try:
            self.process = subprocess.Popen(
                command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=words,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"--execute: needs the program unshare of util-linux ({error.strerror})") from error

    def stop(self):
        """End the sandbox and everything in it."""
        process, self.process = self.process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()  # the supervisor ends when its input does
            except OSError:
                pass
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()  # --kill-child: process 1 goes with it, and with that everything in the namespace
            process.wait()
        process.stderr.close()

    def ask(self, message: dict) -> dict:
        """The answer to a message, see inside.py. {"error": ...} if there is none."""
        if self.process is None:
            self.start()
        limits = LIMITS | {"CPU": self.seconds}
        line = json.dumps(message | {"seconds": self.wall, "limits": limits}).encode() + b"\n"
        deadline = time.monotonic() + self.wall + 60  # the supervisor keeps the limit; this ends a broken one
        content = b""
        out = self.process.stdout.fileno()
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            while not content.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([out], [], [], left)[0]:
                    raise OSError("the sandbox does not answer")
                content += (part := os.read(out, 65536))
                if not part:
                    raise OSError("the sandbox ended")
            done = json.loads(content)
            return done if isinstance(done, dict) else {"error": "the answer is malformed"}
        except (ValueError, RecursionError):
            return {"error": "the answer is malformed"}
        except OSError as error:
            if self.process.poll() is None:
                self.process.kill()
            reason = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            self.reason = reason[-1][:200] if reason else str(error)
            self.stop()
            return {"error": str(error)}

    def call(self, program: str, calls: list[tuple[str, tuple]]) -> list:
        """The result of each call (name of a function, its arguments) of `program`: a value, or a Failure."""
        return values(self.ask({"program": program, "calls": encoded(calls)}), len(calls))

    def again(self, calls: list[tuple[str, tuple]]) -> list:
        """Further calls of the program that runs."""
        return values(self.ask({"calls": encoded(calls)}), len(calls))


class Failure(Exception):
    """Why a call has no value."""

    def __eq__(self, other):
        return False

    __hash__ = None


def encoded(calls):
    return [[name, inside.encode(tuple(arguments))] for name, arguments in calls]


def values(done: dict, count: int) -> list:
    """The values, or Failures, in an answer, which a program may have forged."""
    results = done.get("results")
    if not isinstance(results, list) or len(results) != count:
        return [Failure(str(done.get("error", "the answer is malformed"))[:300])] * count
    found = []
    for result in results:
        try:
            found.append(inside.decode(result["value"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            why = result.get("error", "malformed") if isinstance(result, dict) else "malformed"
            found.append(Failure(str(why)[:300]))
    return found


def same(expected, got) -> bool:
    """Are two plain values equal, and of the same types throughout? True is not 1."""
    if type(expected) is not type(got):
        return False
    if isinstance(expected, list | tuple):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(same(value, got[key]) for key, value in expected.items())
    if isinstance(expected, float):
        return expected == got or abs(expected - got) <= 1e-9 * max(1.0, abs(expected))
    return expected == got


def work(jobs: list[tuple[str, list]], seconds: float = 1800.0) -> list[list]:
    """The results of the calls of each (program, calls), from a worker process: for solutions of our own generator.

    Raises UserError if it takes longer than `seconds`.
    """
    messages = json.dumps([{"program": program, "calls": encoded(calls)} for program, calls in jobs])
    words = [sys.executable, "-I", "-S", "-c", SOURCE, "work"]
    try:
        done = subprocess.run(words, input=messages + "\n", capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the solutions took longer than {seconds:.0f} seconds to check") from error
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return [values(answer, len(calls)) for answer, (_, calls) in zip(json.loads(done.stdout), jobs, strict=True)]
