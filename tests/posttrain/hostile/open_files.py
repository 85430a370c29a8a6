files = []
try:
    while len(files) < 10000:
        files.append(open("/dev/null"))
    print("escaped")
except OSError:
    files.clear()
    print("refused")
