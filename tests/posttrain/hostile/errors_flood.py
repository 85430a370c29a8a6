import sys

for _ in range(100000):
    sys.stderr.write("x" * 1000)
print("refused")
