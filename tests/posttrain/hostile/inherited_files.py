import os

held = [n for n in range(3, 256) if os.path.exists(f"/proc/self/fd/{n}")]
kinds = {n: os.readlink(f"/proc/self/fd/{n}") for n in held}
print("escaped" if any(not k.startswith("/proc") for k in kinds.values()) else "refused", kinds)
