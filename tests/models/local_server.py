"""A server on this machine that speaks whatever a test tells it to."""

import contextlib
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def local_server():
    """Answer each request by the next of `replies` (status, body), the last again and again; remember requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append((self.path, body, dict(self.headers)))
            status, reply = found.replies.pop(0) if len(found.replies) > 1 else found.replies[0]
            told = reply(body) if callable(reply) else reply
            told = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = types.SimpleNamespace(requests=[], replies=[], url=f"http://127.0.0.1:{http.server_port}/v1")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield found
    http.shutdown()
    http.server_close()
