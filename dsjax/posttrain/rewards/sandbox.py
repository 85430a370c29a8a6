"""Runs a program that nobody has read: in bubblewrap's namespaces, without network, files and rights, within bounds.

It sees an interpreter and the system's libraries, read-only, and has no place to write. Its processes end with the
sandbox, whatever they do: they are those of a namespace whose first process is killed. As root, rights are dropped
before the sandbox begins, so that a way out of it would lead to the user `nobody`. System calls that hold memory
outside of the bounds, or that it does not need, are refused (`seccomp`). Against an unknown hole of the kernel, run it
in a virtual machine.
"""

import functools
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.posttrain.rewards.seccomp import ARCHITECTURES, filter_program

_NOBODY = 65534
_STARTING_S = 5.0  # more than a program's own time, for the sandbox to begin


@dataclass(frozen=True)
class Bounds:
    """What a program may take: of memory, at most processes * memory_mib."""

    seconds: float = 10.0  # of a processor, each process; by the clock, 5 more for the sandbox to begin
    memory_mib: int = 512  # of addresses, each process
    processes: int = 4  # and threads; one of them is the sandbox's own
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended. Reasons: "exit", "time", "output", and "signal"."""

    reason: str
    code: int | None  # of its exit, if it had one
    output: str  # of its standard output, what is not UTF-8 replaced
    seconds: float


class SandboxError(ConfigError):
    """There is no sandbox here."""


def run_python(program: str, given: str = "", bounds: Bounds = Bounds()) -> Outcome:
    """Runs a Python program on `given` as standard input. Raises SandboxError where no sandbox can be made."""
    check()
    interpreter, *_ = _interpreter()
    source = program.encode("utf-8", "replace")
    given = given.encode("utf-8", "replace")
    return _run([interpreter, "-I", "-S", "-c", _LOADER, str(len(source))], source + given, bounds)


# The program comes before its input: a command line is seen by all processes, and is short.
_LOADER = """
import sys
source = sys.stdin.buffer.raw.read
n, parts = int(sys.argv[1]), []
while n:
    part = source(n)
    if not part:
        break
    parts.append(part)
    n -= len(part)
sys.argv = ["program.py"]
names = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}  # which -S leaves out
exec(compile(b"".join(parts), "program.py", "exec"), names)
"""

# What a sandbox must not let a program do; nothing if it contains it.
_PROBE = """
import os
wrong = {
    "it runs as root": os.getuid() == 0,
    "it sees the machine's files": os.path.exists("/etc/passwd") or os.path.exists("/sys"),
    "it can write": any(os.access(place, os.W_OK) for place in ("/", "/usr", "/dev", "/dev/shm")),
    "it has open files": len(os.listdir("/proc/self/fd")) > 8,
    "it sees other processes": os.getpid() > 8,
    "it has a network": len(open("/proc/net/route").readlines()) > 1,
    "its system calls are not filtered": "Seccomp:\\t2" not in open("/proc/self/status").read(),
}
print(*(name for name, so in wrong.items() if so), sep=", ", end=".")
"""


@functools.cache
def check() -> None:
    """Raises SandboxError where no sandbox can be made, or one that lets a program reach what it must not."""
    if shutil.which("bwrap") is None:
        raise SandboxError(
            "code is judged in a sandbox alone, and bwrap is not here: install bubblewrap (apt install bubblewrap)"
        )
    if platform.machine() not in ARCHITECTURES:
        raise SandboxError(f"code is judged on {' and '.join(ARCHITECTURES)} alone, and this is {platform.machine()}")
    interpreter, *_ = _interpreter()
    outcome = _run([interpreter, "-I", "-S", "-c", _PROBE], b"", Bounds(), errors=(said := []))
    if (outcome.reason, outcome.code, outcome.output) != ("exit", 0, "."):
        last = said[0].strip().splitlines()[-1:] if said else []
        why = outcome.output.strip(".") or (last[0] if last else f"{outcome.reason} {outcome.code}")
        raise SandboxError(f"code is judged in a sandbox alone, and bwrap makes none here, with {interpreter}: {why}")


@functools.cache
def _interpreter() -> tuple[str, Path | None]:
    """A Python that is seen inside, and its folder if that is not below /usr: the system's, or our own."""
    if system := _works(Path("/usr/bin/python3")):
        return str(system), None
    own = Path(os.path.realpath(sys.executable))
    prefix = Path(os.path.realpath(sys.base_prefix))
    if os.geteuid() == 0:
        readable = all(p.stat().st_mode & 0o005 == 0o005 for p in (prefix, *prefix.parents))
    else:
        readable = os.access(prefix, os.R_OK | os.X_OK)
    if readable and own.is_relative_to(prefix):
        return str(own), None if prefix.is_relative_to("/usr") else prefix
    raise SandboxError(f"the user nobody may not read {prefix}, and no /usr/bin/python3 works: no Python to judge code")


def _works(python: Path) -> Path | None:
    """Where a Python below /usr really is; None for one that does not run, or is elsewhere."""
    real = Path(os.path.realpath(python))
    if not real.is_relative_to("/usr") or not real.is_file():
        return None
    return real if subprocess.run([real, "-I", "-S", "-c", ""], capture_output=True).returncode == 0 else None


def _command(bounds: Bounds, seccomp: int) -> list[str]:
    _, prefix = _interpreter()
    command = [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox", "--clearenv",
        "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/", "--setenv", "LANG", "C.UTF-8",
        "--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--chdir", "/",
    ]  # fmt: skip
    for name in ("bin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    if prefix is not None:
        command += ["--ro-bind", str(prefix), str(prefix)]
    limits = {
        "as": bounds.memory_mib << 20, "nproc": bounds.processes, "cpu": max(1, round(bounds.seconds)), "core": 0,
        "fsize": 0, "nofile": 64,
    }  # fmt: skip
    return [
        *command,
        "--seccomp",
        str(seccomp),
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--",
        "/usr/bin/prlimit",
        *(f"--{k}={v}" for k, v in limits.items()),
    ]


def _run(command: list[str], given: bytes, bounds: Bounds, errors: list[str] | None = None) -> Outcome:
    dropped = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    began = time.monotonic()
    seccomp, written = os.pipe()
    try:
        with os.fdopen(written, "wb") as pipe:
            pipe.write(filter_program(platform.machine()))
        process = subprocess.Popen(
            [*_command(bounds, seccomp), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if errors is not None else subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            start_new_session=True,
            pass_fds=(seccomp,),
            **dropped,
        )
    finally:
        os.close(seccomp)
    try:
        end = began + bounds.seconds + _STARTING_S
        reason, output = _talk(process, given, bounds.output_bytes, end)
        if reason == "exit":
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                reason = "time"
    finally:
        if process.poll() is None:
            process.kill()  # and with it, by --die-with-parent, all in the sandbox
        if errors is not None:
            errors.append(process.stderr.read().decode("utf-8", "replace"))
            process.stderr.close()
        process.stdin.close()
        process.stdout.close()
        process.wait()
    seconds, code = time.monotonic() - began, process.returncode
    if reason == "exit" and code >= 128:  # as bwrap tells of a signal
        reason = "time" if code - 128 in (signal.SIGXCPU, signal.SIGKILL) and seconds >= bounds.seconds else "signal"
    text = output[: bounds.output_bytes].decode("utf-8", "replace")
    return Outcome(reason, code if reason == "exit" else None, text, seconds)


def _talk(process: subprocess.Popen, given: bytes, most: int, end: float) -> tuple[str, bytes]:
    """Gives a process its input and takes its output, until this ends, or is too much, or the time is over."""
    output, sent = bytearray(), 0
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while process.stdout in (key.fileobj for key in selector.get_map().values()):
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready:
                return "time", bytes(output)
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    try:
                        sent += os.write(process.stdin.fileno(), given[sent : sent + 65536])
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        sent = len(given)
                    if sent >= len(given):
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                part = os.read(process.stdout.fileno(), 65536)
                output += part
                if not part:
                    selector.unregister(process.stdout)
                if len(output) > most:
                    return "output", bytes(output)
    return "exit", bytes(output)
