import os
import time

n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        n += 1
except OSError:
    print("refused" if n < 64 else "escaped")
