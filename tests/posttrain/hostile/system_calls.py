import ctypes
import platform
import socket

libc, got = ctypes.CDLL(None, use_errno=True), []
column = ["x86_64", "aarch64"].index(platform.machine())
for name, numbers in {
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "setns": (308, 268), "mount": (165, 40), "ptrace": (101, 117), "syslog": (103, 116),
    "process_vm_readv": (310, 270), "x32 shmget": (0x40000000 + 29,) * 2, "x32 write": (0x40000001,) * 2,
}.items():  # fmt: skip
    ctypes.set_errno(0)
    libc.syscall(numbers[column], 0, 0, 0, 0, 0)
    if ctypes.get_errno() != 1:  # EPERM
        got.append(name)
for family in ("AF_INET", "AF_UNIX", "AF_VSOCK", "AF_ALG", "AF_NETLINK", "AF_PACKET"):
    try:
        socket.socket(getattr(socket, family), socket.SOCK_STREAM).close()
        got.append(family)
    except OSError:
        pass
print("escaped" if got else "refused", got)
