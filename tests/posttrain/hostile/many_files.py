import os

places, made = (
    {"/", "/tmp", "/dev", "/dev/shm", "/dev/pts", "/run", "/var/tmp", os.getcwd(), os.path.expanduser("~")},
    0,
)
with open("/proc/self/mounts") as mounts:
    places |= {line.split()[1] for line in mounts}
for top in list(places):
    for folder, _, _ in os.walk(top):
        if folder.count("/") > 4 or folder.startswith(("/proc", "/usr")):
            break
        places.add(folder)
for place in places:
    for n in range(1000):
        try:
            with open(f"{place}/{n}", "wb") as file:
                file.write(b"x" * (1 << 16))
            made += 1
        except OSError:
            break
print("escaped" if made else "refused", made)
