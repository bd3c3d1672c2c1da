"""Just enough HTTP/2, by hand, to be a client that no library would be."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header without compression or indexing."""
    parts = b""
    for text in (name.encode(), value.encode()):
        length = len(text)
        if length < 127:
            parts += bytes([length])
        else:
            parts += b"\x7f"
            length -= 127
            while length >= 128:
                parts += bytes([length % 128 + 128])
                length //= 128
            parts += bytes([length])
        parts += text
    return b"\x00" + parts


def request_headers(path: str, *more: tuple[str, str]) -> bytes:
    pairs = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    pairs += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return b"".join(literal(name, value) for name, value in pairs)


class Connection:
    """A plaintext connection."""

    def __init__(self, port: int, *, greet: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        if greet:
            self.send(PREFACE + frame(SETTINGS))

    def send(self, data: bytes) -> bool:
        """Sends; False once the server has closed the connection."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def frames_until_closed(self) -> list[tuple[int, bytes]]:
        """Kinds and payloads of everything the server sends before it closes the connection."""
        data = b""
        try:
            while chunk := self.socket.recv(65536):
                data += chunk
        except ConnectionError:
            pass
        found = []
        while len(data) >= 9:
            length = int.from_bytes(data[:3], "big")
            found.append((data[3], data[9 : 9 + length]))
            data = data[9 + length :]
        return found

    def close(self) -> None:
        self.socket.close()
