import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in (0, 1, 2):
            os.close(n)
        os.execv("/usr/bin/sleep", [input.__name__ + "-dsjax-survivor", "1000"])
    os._exit(0)
time.sleep(0.2)
print("ended")
