import ctypes
import os

libc, got = ctypes.CDLL(None, use_errno=True), []


def attempt(name, do):
    try:
        if do() in (0, None):
            got.append(name)
    except (OSError, ValueError):
        pass


attempt("setuid", lambda: os.setuid(0))
attempt("setgid", lambda: os.setgid(0))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
attempt("unshare", lambda: libc.unshare(0x10000000))
attempt("nice", lambda: libc.setpriority(0, 0, -5))
attempt("limits", lambda: __import__("resource").setrlimit(9, (-1, -1)))
attempt("hostname", lambda: libc.sethostname(b"x", 1))
attempt("mknod", lambda: os.mknod("/tmp/sda", 0o60600, os.makedev(8, 0)))
print("escaped" if got else "refused", got)
