"""The web server that the proxy tests run inside a sandbox: `python3 web_server.py PORT`. Standard library only.

    *    /echo            what was asked, as JSON; the body as its length and SHA-256
    GET  /events          server-sent events; the next one is sent when somebody asks for /continue
    GET  /continue        lets one event go
    GET  /bytes?count=N   that many bytes
    GET  /status?code=N   an empty answer with that status
    GET  /cookies         two Set-Cookie headers
    GET  /forever         a body that never ends
    GET  /websocket       echoes messages until the client closes
"""

import base64
import hashlib
import json
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

WEBSOCKET_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10

events = threading.Semaphore(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_any(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        route = getattr(self, "serve_" + url.path.strip("/"), None)
        if route is None:
            self.answer(404, b"the guest has no such page", "text/plain")
        else:
            route()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_any

    def answer(self, status, body, content_type, *headers):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self):
        digest, length = hashlib.sha256(), 0
        for piece in self.body_pieces():
            digest.update(piece)
            length += len(piece)
        return length, digest.hexdigest()

    def body_pieces(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, 65536))
            left -= len(piece)
            yield piece

    def serve_echo(self):
        length, digest = self.read_body()
        seen = {
            "method": self.command,
            "path": self.path,
            "headers": [[name.lower(), value] for name, value in self.headers.items()],
            "body_length": length,
            "body_sha256": digest,
        }
        self.answer(200, json.dumps(seen).encode(), "application/json", ("X-From-Guest", "yes"))

    def serve_bytes(self):
        self.answer(200, bytes(int(self.query["count"])), "application/octet-stream")

    def serve_status(self):
        self.answer(int(self.query["code"]), b"", "text/plain")

    def serve_cookies(self):
        self.answer(200, b"", "text/plain", ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))

    def serve_continue(self):
        events.release()
        self.answer(204, b"", "text/plain")

    def start_stream(self, content_type):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def serve_events(self):
        self.start_stream("text/event-stream")
        for number in range(int(self.query["count"])):
            self.wfile.write(b"data: %d\n\n" % number)
            events.acquire()

    def serve_forever(self):
        self.start_stream("text/plain")
        while True:
            self.wfile.write(b"tick\n")
            time.sleep(0.1)

    def serve_websocket(self):
        accept = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + WEBSOCKET_MAGIC).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accept).decode())
        self.end_headers()
        self.close_connection = True
        message = b""
        while True:
            final, opcode, payload = self.read_frame()
            if opcode == PING:
                self.write_frame(PONG, payload)
            elif opcode == CLOSE:
                return self.write_frame(CLOSE, payload)
            elif opcode != PONG:
                kind = opcode or kind  # a continuation has the kind of the message's first frame
                message += payload
                if final:
                    self.write_frame(kind, message)
                    message = b""

    def read_frame(self):
        first, second = self.rfile.read(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self.rfile.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.rfile.read(8))
        mask = self.rfile.read(4)
        payload = self.rfile.read(length)
        key = int.from_bytes((mask * (length // 4 + 1))[:length], "big")
        return first & 0x80, first & 0x0F, (int.from_bytes(payload, "big") ^ key).to_bytes(length, "big")

    def write_frame(self, opcode, payload):
        length = len(payload)
        if length < 126:
            size = bytes([length])
        elif length < 65536:
            size = b"\x7e" + struct.pack(">H", length)
        else:
            size = b"\x7f" + struct.pack(">Q", length)
        self.wfile.write(bytes([0x80 | opcode]) + size + payload)

    def log_message(self, format, *arguments):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


Server(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
