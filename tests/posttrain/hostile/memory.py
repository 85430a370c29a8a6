held = []
try:
    while True:
        held.append(bytearray(1 << 24))
        if len(held) > 64:
            print("escaped")
            break
except MemoryError:
    held.clear()
    print("refused")
