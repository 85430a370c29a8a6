import os

wrote = []
places = [
    "/escaped",
    "/usr/escaped",
    "/usr/bin/escaped",
    "/lib/escaped",
    "/proc/sys/kernel/hostname",
    "/dev/escaped",
    "/tmp/dsjax-escaped",
]
places += [os.path.dirname(os.__file__) + "/escaped.py"]
for place in places:
    try:
        with open(place, "w") as file:
            file.write("x")
        wrote.append(place)
    except OSError:
        pass
print("escaped" if wrote else "refused", wrote)
