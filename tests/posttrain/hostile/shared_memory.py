import ctypes

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype, libc.shmat.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
got = []
for _ in range(64):  # each is held when no process has it in its addresses any more
    segment = libc.shmget(0, 1 << 28, 0o1600)
    if segment < 0:
        break
    got.append(segment)
    address = libc.shmat(segment, None, 0)
    if address and address != ctypes.c_void_p(-1).value:
        ctypes.memset(address, 1, 1 << 28)
        libc.shmdt(ctypes.c_void_p(address))
if libc.semget(0, 1, 0o1600) >= 0 or libc.msgget(0, 0o1600) >= 0:
    got.append("queues")
print("escaped" if got else "refused", got)
