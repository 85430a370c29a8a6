import threading
import time

n = 0
try:
    while n < 1000:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        n += 1
    print("escaped", flush=True)
except (RuntimeError, MemoryError):
    print("refused", flush=True)
