import ctypes
import os

libc, got = ctypes.CDLL(None, use_errno=True), []
try:
    file = os.memfd_create("big")
    for _ in range(1024):
        os.write(file, b"x" * (1 << 20))
    got.append("memfd")
except OSError:
    pass
if libc.syscall(447, 0) >= 0:  # memfd_secret
    got.append("secret")
if libc.mq_open(b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
    got.append("queue")
try:
    os.truncate(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR), 1 << 30)
    got.append("nameless")
except OSError:
    pass
print("escaped" if got else "refused", got)
