import glob
import os

seen = []
for place in (
    "/etc/passwd",
    "/etc/shadow",
    "/root/.ssh",
    "/home/*",
    "/srv/*",
    "/var/*",
    "/sys/*",
    "/run/*",
    "/mnt/*",
    "/opt/*",
):
    for path in glob.glob(place):
        try:
            os.listdir(path) if os.path.isdir(path) else open(path).read()
            seen.append(path)
        except OSError:
            pass
seen += [name for name in os.environ if name not in ("PATH", "HOME", "LANG", "LC_CTYPE", "PWD")]
seen += [name for name in ("/tmp", "/etc") if os.path.exists(name)]
for process in glob.glob("/proc/[0-9]*"):
    with open(f"{process}/cmdline", "rb") as file:
        line = file.read()
    if b"pytest" in line or b"sshd" in line:
        seen.append(process)
print("escaped" if seen else "refused", seen)
