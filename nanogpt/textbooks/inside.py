"""Runs programs for the process that started this one, over stdin and stdout. Standard library only, imports nothing
of this repository: sandbox.py passes the text of this file to an interpreter inside the sandbox.

Every line is a JSON message {"program": TEXT, "calls": [[NAME, ARGUMENTS], ...], "seconds": N, "limits": {...}}: a
program, which replaces the one before, and calls of its functions. The answer is a line as well: {"results": [...]},
each {"value": ...} or {"error": TEXT}, or {"error": TEXT} for the whole message. A message without a program calls
functions of the program before. Nothing that is expected ever comes here, so a program can forge only its own answer.

`supervise` is process 1 of the sandbox. Each program runs in a child process with limits of its own; when it has ended,
or its time is up, every process in the sandbox except the supervisor is killed. "seconds" are by the clock, the limit
CPU is of CPU time. `work`, for programs that are trusted, answers lists of messages in its own process.
"""

import json
import os
import select
import signal
import struct
import sys
import time

TYPES = (int, float, str, bool, list, tuple, set, dict)
MAX_ANSWER = 1 << 20  # bytes
KEEP = "math re collections itertools functools heapq string typing copy random datetime operator bisect".split()


def encode(value, depth=0):
    """A plain value as JSON that keeps its type. Raises TypeError for anything else."""
    if depth > 50:
        raise TypeError("a value nested too deeply")
    if value is None:
        return None
    for kind, plain in ((bool, bool), (float, float), (str, str.__str__)):
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, int):
        return {"int": hex(value)}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, depth + 1) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if any(value is kind for kind in TYPES):
        return {"type": value.__name__}
    raise TypeError(f"a value of the type {type(value).__name__}, which is none of Python's plain types")


def decode(value):
    """The value that `encode` encoded. Raises ValueError, KeyError or TypeError for any other text."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    if kind == "int":
        return int(content, 16)
    if kind == "type":
        return {plain.__name__: plain for plain in TYPES}[content]
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in content)


def answer(message, namespace):
    """Run the program and the calls of a message. Returns {"results": ...} or {"error": ...}."""
    try:
        if "program" in message:
            namespace.clear()
            namespace["__name__"] = "program"
            exec(compile(message["program"], "<program>", "exec"), namespace)
    except BaseException as error:  # SystemExit too: the program did not get to its end
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    results = []
    for name, arguments in message.get("calls", []):
        try:
            results.append({"value": encode(namespace[name](*decode(arguments)))})
        except BaseException as error:
            results.append({"error": f"{type(error).__name__}: {str(error)[:200]}"})
    return {"results": results}


def work():
    for line in sys.stdin:
        answers = [answer(message, {}) for message in json.loads(line)]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


# -------------------------------------------------------------------------------------------- process 1 of the sandbox


def child(read, write, limits):
    """The process that runs programs: limits first, then messages from `read` until it is closed."""
    import resource

    os.setsid()
    for name, value in limits.items():
        hard = value + 1 if name == "CPU" else value  # SIGXCPU first, which tells that the time was up
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
    for stream in (0, 1, 2):
        os.dup2(3, stream)  # the null device: neither the terminal nor the pipes of the supervisor
    os.closerange(3, min(read, write))
    os.closerange(min(read, write) + 1, max(read, write))
    os.closerange(max(read, write) + 1, 256)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    namespace = {}
    with open(read, "rb") as messages, open(write, "wb") as answers:
        for line in messages:
            content = json.dumps(answer(json.loads(line), namespace))
            if len(content) > MAX_ANSWER - 100:
                content = json.dumps({"error": "the answer is too large"})
            answers.write(content.encode() + b"\n")
            answers.flush()


def kill_everything():
    """Kill all processes in the sandbox but this one, also those that a program left behind. Returns the signals that
    had ended processes before."""
    signals = set()
    while True:
        try:
            os.kill(-1, signal.SIGKILL)  # as process 1 of a pid namespace: all others in it
        except ProcessLookupError:
            pass
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                signals.add(os.WTERMSIG(ended[1]))
        except ChildProcessError:
            return signals
        time.sleep(0.001)


def read_answer(pipe, deadline):
    """A line from a child, as bytes, or {"error": ...}."""
    content = b""
    while not content.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return {"error": "timeout"}
        part = os.read(pipe, 65536)
        content += part
        if not part:
            return {"error": "the program ended its process"}
        if len(content) > MAX_ANSWER:
            return {"error": "the answer is too large"}
    try:
        text = content[:-1].decode()
        if "\n" in text or not isinstance(json.loads(text), dict):
            raise ValueError
        return text
    except (ValueError, RecursionError):
        return {"error": "the answer is malformed"}


def send(pipe, content, deadline):
    while content and time.monotonic() < deadline:
        if select.select([], [pipe], [], max(0, deadline - time.monotonic()))[1]:
            content = content[os.write(pipe, content[:4096]) :]  # PIPE_BUF: never blocks


# The system calls shmget, semget and msgget of a machine, and the number by which its kernel knows the machine.
SYSTEM_V = {"x86_64": ((29, 64, 68), 0xC000003E), "aarch64": ((194, 190, 186), 0xC00000B7)}
SYSTEM_V["riscv64"] = (SYSTEM_V["aarch64"][0], 0xC00000F3)
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
JUMP_IF_AT_LEAST = 0x35
RETURN = 0x06  # instructions of a seccomp filter
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # REFUSE: the call fails with EPERM
FOREIGN = 0x40000000  # from here on, numbers of system calls are of another kind of program (x32)


def refuse_system_v(libc):
    """No process of the sandbox can create System V shared memory, semaphores or message queues, which would outlive
    its program, and whose memory no limit counts. Raises OSError if that is not possible."""
    import ctypes

    if os.uname().machine not in SYSTEM_V:
        raise OSError(f"the system calls of a {os.uname().machine} are not known")
    calls, machine = SYSTEM_V[os.uname().machine]
    end = 4 + len(calls)  # the place of ALLOW, before REFUSE: a jump of end - i at i goes to REFUSE
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_IF_EQUAL, 0, end - 1, machine),
        (LOAD, 0, 0, 0),
        (JUMP_IF_AT_LEAST, end - 3, 0, FOREIGN),
    ]
    for i, number in enumerate(calls, len(program)):
        program.append((JUMP_IF_EQUAL, end - i, 0, number))
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    content = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(content)))
    if libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(f"no system call can be refused (errno {ctypes.get_errno()})")


def supervise():
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: children of the same uid cannot trace this process
    refuse_system_v(libc)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python handles it, so it would reach process 1, too
    for name in KEEP:
        __import__(name)  # once, for all children
    to_child = from_child = None
    deadline = 0.0
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "program" in message or to_child is None:
            kill_everything()
            for pipe in (to_child, from_child):
                if pipe is not None:
                    os.close(pipe)
            their_end, to_child = os.pipe()
            from_child, other_end = os.pipe()
            deadline = time.monotonic() + message["seconds"]
            if os.fork() == 0:
                os.close(to_child)
                os.close(from_child)
                try:
                    child(their_end, other_end, message["limits"])
                finally:
                    os._exit(0)
            os.close(their_end)
            os.close(other_end)
        try:
            send(to_child, line, deadline)
            done = read_answer(from_child, deadline)
        except OSError as error:
            done = {"error": f"the program ended its process ({error.strerror})"}
        if not isinstance(done, str) and signal.SIGXCPU in kill_everything():
            done = {"error": "timeout"}
        text = done if isinstance(done, str) else json.dumps(done)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    kill_everything()


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        supervise()
