import socket

port, opened = int(input()), []
for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))):
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(2)
            s.connect(address)
            opened.append(address)
    except OSError:
        pass
try:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(f"\0dsjax-test-{port}")
        opened.append("unix")
except OSError:
    pass
try:
    socket.getaddrinfo("example.com", 80)
    opened.append("names")
except OSError:
    pass
print("escaped" if opened else "refused", opened)
