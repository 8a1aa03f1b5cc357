"""A stand-in for a model server, for tests of what manages one. Standard library alone.

Starts a child that leaves the session, as a daemon would, then answers /health after a delay.
Dies when /die is asked. With --stubborn neither of the two heeds SIGTERM; with --shared FILE it
holds shared memory, whose name is written there.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import sys
import time
from multiprocessing import shared_memory


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/die":
            os._exit(3)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids", required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail", default=None)
    parser.add_argument("--shared", default=None)
    parser.add_argument("--stubborn", action="store_true")
    options = parser.parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.shared is not None:
        memory = shared_memory.SharedMemory(create=True, size=4096)
        with open(options.shared, "w") as file:
            file.write(memory.name)
    print("\x1b[32mloading weights\x1b[0m", flush=True)
    grandchild = os.fork()
    if grandchild == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    with open(options.pids, "a") as file:
        file.write(f"{os.getpid()} {grandchild}\n")
    if options.fail is not None:
        print(options.fail, file=sys.stderr, flush=True)
        os._exit(1)
    time.sleep(options.delay)
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
