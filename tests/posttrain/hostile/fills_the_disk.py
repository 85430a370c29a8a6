try:
    with open("/tmp/big", "wb") as file:
        for _ in range(1024):
            file.write(b"x" * (1 << 20))
    print("escaped")
except OSError:
    print("refused")
