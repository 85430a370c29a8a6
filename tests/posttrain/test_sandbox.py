"""Programs that want out, or more than they may have: each is contained, for root and for an ordinary user."""

import contextlib
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsjax.posttrain.rewards import sandbox
from dsjax.posttrain.rewards.sandbox import Bounds, SandboxError, run_python
from dsjax.posttrain.rewards.seccomp import ARCHITECTURES, REFUSED, filter_program

HERE = Path(__file__).parent / "hostile"
PROGRAMS = sorted(HERE.glob("*.py"))
BOUNDS = Bounds(seconds=2, memory_mib=300, processes=16, output_bytes=10_000)
TIME = {"endless_loop", "sleeps", "ignores_signals", "stops_itself", "closes_its_output", "fork_bomb"}
OTHER = {"output_flood": "output"}
SAYS = {"kills_others": "lived\n", "survives": "ended\n"}

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

# What runs the corpus as an ordinary user, if the tests run as root: it takes what it needs, and then drops all rights.
AS_NOBODY = """
import json, os, sys
from dataclasses import asdict
from dsjax.posttrain.rewards.sandbox import Bounds, run_python
programs, given, bounds = json.load(sys.stdin)
os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(json.dumps([asdict(run_python(p, given, Bounds(**bounds))) for p in programs]))
"""


@pytest.fixture(scope="module")
def given():
    """Where somebody listens on this machine, and the number of a process that anyone here may end."""
    as_nobody = {"user": 65534} if os.geteuid() == 0 else {}
    with (
        socket.socket() as server,
        socket.socket(socket.AF_INET6) as server6,
        socket.socket(socket.AF_UNIX) as other,
        subprocess.Popen(["sleep", "1000"], cwd="/", **as_nobody) as bystander,
    ):
        server.bind(("127.0.0.1", 0))
        server.listen()
        number = server.getsockname()[1]
        with contextlib.suppress(OSError):  # no IPv6 here
            server6.bind(("::1", number))
            server6.listen()
        other.bind(f"\0dsjax-test-{number}")
        other.listen()
        yield f"{number}\n{bystander.pid}\n"
        lives = bystander.poll() is None
        bystander.kill()
        assert lives


def run_as_nobody(programs: list[str], given: str) -> list[sandbox.Outcome]:
    asked = json.dumps([programs, given, vars(BOUNDS)])
    done = subprocess.run([sys.executable, "-c", AS_NOBODY], input=asked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [sandbox.Outcome(**outcome) for outcome in json.loads(done.stdout)]


@functools.cache
def outcome_of(name: str, user: str, given: str) -> sandbox.Outcome:
    program = (HERE / f"{name}.py").read_text()
    return run_python(program, given, BOUNDS) if user == "us" else run_as_nobody([program], given)[0]


@needs_bwrap
@pytest.mark.parametrize("user", ["us", "nobody"])
@pytest.mark.parametrize(
    "name", [pytest.param(p.stem, marks=[pytest.mark.slow] if p.stem in TIME else []) for p in PROGRAMS]
)
def test_a_hostile_program_is_contained(given, name, user):
    if user == "nobody" and os.geteuid() != 0:
        pytest.skip("these tests are run by an ordinary user")
    outcome = outcome_of(name, user, given)
    assert outcome.seconds < BOUNDS.seconds + sandbox._STARTING_S + 2
    assert len(outcome.output) <= BOUNDS.output_bytes and "escaped" not in outcome.output
    if name in TIME:
        assert outcome.reason == "time"
    elif name in OTHER:
        assert outcome.reason == OTHER[name]
    elif name in SAYS:
        assert (outcome.reason, outcome.output) == ("exit", SAYS[name])
    else:
        assert outcome.output.startswith("refused"), outcome


@needs_bwrap
def test_nothing_is_left_behind(given):
    assert outcome_of("survives", "us", given).output == "ended\n"

    def survivors():
        lines = (p / "cmdline" for p in Path("/proc").iterdir() if p.name.isdigit())
        return [line for line in lines if line.exists() and b"dsjax-survivor" in line.read_bytes()]

    end = time.monotonic() + 5
    while survivors() and time.monotonic() < end:
        time.sleep(0.05)
    assert not survivors()
    assert not Path("/tmp/dsjax-escaped").exists() and not list(Path("/usr").glob("escaped*"))


@needs_bwrap
def test_sandboxes_do_not_count_each_others_processes(given):
    """A program may have its threads while others have as many."""
    program = """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
print("done")
"""
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(run_python, [program] * 8))
    assert [outcome.output for outcome in outcomes] == ["done\n"] * 8


def run_filter(program: bytes, architecture: int, number: int) -> int:
    """What the kernel would do: the steps one by one."""
    steps, at, loaded = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, so, not_so, value = steps[at]
        match code:
            case 0x20:
                loaded = {0: number, 4: architecture}[value]
                at += 1
            case 0x06:
                return value
            case _:
                at += 1 + (so if (loaded == value if code == 0x15 else loaded >= value) else not_so)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_refuses_its_calls_and_no_others(machine):
    column, program = list(ARCHITECTURES).index(machine), filter_program(machine)
    refused = {of[column] for of in REFUSED.values()}
    assert len(refused) == len(REFUSED)
    for number in (*range(500), 0x40000000, 0x40000001, 0xFFFFFFFF):
        want = 0x00050001 if number in refused or number >= 500 else 0x7FFF0000
        assert run_filter(program, ARCHITECTURES[machine], number) == want
    assert run_filter(program, 0x40000003, 1) == 0x80000000  # i386


@needs_bwrap
def test_a_program_gets_its_input_and_its_output_is_read():
    many = " ".join(map(str, range(50_000)))
    outcome = run_python("print(sum(map(int, input().split())))", many + "\n")
    assert (outcome.reason, outcome.code, outcome.output) == ("exit", 0, f"{sum(range(50_000))}\n")
    assert run_python("raise SystemExit(3)").code == 3
    assert run_python("1/0").code == 1 and run_python("1 +").code == 1
    assert run_python("exit(4)").code == 4 and run_python("print(1); quit()").output == "1\n"
    assert run_python("print('\ud800')").output == "?\n" and run_python("print(input())", "\ud800").output == "?\n"
    ignored = run_python("print('é')", "x" * (1 << 22))
    assert (ignored.reason, ignored.output) == ("exit", "é\n")
    assert run_python("import sys; sys.stdout.buffer.write(b'\\xff')").output == "\ufffd"
    assert run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").reason == "signal"


@needs_bwrap
def test_what_is_open_is_closed_when_the_time_is_over():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert run_python("print('x' * 1000)", "y" * (1 << 22), Bounds(output_bytes=10)).reason == "output"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def fresh():
    """What is known of this machine is forgotten before and after."""
    for of in (sandbox.check, sandbox._interpreter):
        of.cache_clear()
    yield
    for of in (sandbox.check, sandbox._interpreter):
        of.cache_clear()


@needs_bwrap
def test_a_python_of_a_home_is_taken_where_the_system_has_none(fresh, monkeypatch, tmp_path):
    if sandbox._works(Path("/usr/bin/python3")):
        assert sandbox._interpreter() == (os.path.realpath("/usr/bin/python3"), None)
    home = Path("/home")
    monkeypatch.setattr(sandbox, "_interpreter", lambda: (os.path.realpath("/usr/bin/python3"), home))
    assert run_python("import os; print(os.path.exists('/home'))").output == "True\n"
    monkeypatch.setattr(sandbox, "_interpreter", lambda: (os.path.realpath("/usr/bin/python3"), Path("/etc")))
    sandbox.check.cache_clear()
    with pytest.raises(SandboxError, match=r"makes none here, with /usr/bin/python3.*: it sees the machine's files"):
        run_python("print(1)")


def test_a_machine_without_a_filter_has_no_sandbox(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="judged on x86_64 and aarch64 alone, and this is riscv64"):
        run_python("print(1)")


def test_without_a_sandbox_nothing_runs(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="install bubblewrap"):
        run_python("print(1)")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
    broken = ["/bin/sh", "-c", "echo no namespaces here >&2; exit 1"]
    monkeypatch.setattr(sandbox, "_command", lambda *_: broken)
    with pytest.raises(SandboxError, match=r"bwrap makes none here, with .*: no namespaces here"):
        run_python("print(1)")
