"""Real object stores on loopback for tests: gcp-storage-emulator or moto's server behind a proxy that counts, breaks
and kills.

    python -m tests.stores gs|s3        prints the port of the proxy and serves until its stdin ends

`Store` starts it in a process of its own. A fault is a dict: `match` (regular expression on "METHOD /path?query"),
`skip` (let so many matching requests pass first), `times` (then so many are hit, -1 for all), and what happens to them:
  status N           the server is not asked, the answer is N
  delay S            S seconds late
  drop               the connection ends without an answer
  write PATH, TEXT   a local file, for whoever waits for the fault
  kill PID, after    SIGKILL to that process group; with `after`, once the server has done what was asked
The proxy also keeps the promise of ifGenerationMatch, which real buckets keep and the emulator ignores.
"""

import collections
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = "bucket"


class Client:
    """Talks to the proxy of a store without any client library, so also in a process that is about to fork."""

    def __init__(self, scheme, endpoint):
        self.scheme, self.endpoint = scheme, endpoint
        self.url = f"{scheme}://{BUCKET}"
        gs = {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        s3 = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
              "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        self.env = {"gs": gs, "s3": s3}[scheme]  # what makes the libraries find the store

    def _get(self, path, value=None):
        data = None if value is None else json.dumps(value).encode()
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
        headers = signed if self.scheme == "s3" else {}
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{path}", data, headers)) as answer:
            return answer.read()

    def faults(self, *faults):
        """Replaces the faults; without any, all is well again."""
        self._get("_faults", faults)

    def counts(self):
        """{"GET": requests, ..., "sent": bytes to the store, "received": bytes from it, "faults": hit} since last
        asked."""
        return json.loads(self._get("_counts"))

    def requests(self):
        """"METHOD /path?query" of every request since last asked."""
        return json.loads(self._get("_requests"))

    def names(self, prefix=""):
        """Names of all objects that begin so."""
        quoted = urllib.parse.quote(prefix, safe="")
        if self.scheme == "s3":
            found = self._get(f"{BUCKET}?list-type=2&prefix={quoted}").decode()
            return re.findall("<Key>(.*?)</Key>", found)
        found = json.loads(self._get(f"storage/v1/b/{BUCKET}/o?prefix={quoted}"))
        return [item["name"] for item in found.get("items", [])]

    def read(self, name):
        """The content of an object."""
        quoted = urllib.parse.quote(name, safe="")
        gs = f"download/storage/v1/b/{BUCKET}/o/{quoted}?alt=media"
        return self._get(gs if self.scheme == "gs" else f"{BUCKET}/{urllib.parse.quote(name)}")

    def download(self, prefix, folder):
        """All objects below a prefix as files below a folder."""
        for name in self.names(prefix + "/"):
            path = folder / name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))


class Store(Client):
    """A store in a process of its own, as a context manager."""

    def __init__(self, scheme="gs"):
        self._process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "tests.stores", scheme], cwd=ROOT,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        super().__init__(scheme, f"http://127.0.0.1:{int(self._process.stdout.readline())}")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait()

    @contextlib.contextmanager
    def found(self):
        """Inside, the libraries of this process find the store."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            _forget_clients()
            try:
                yield self
            finally:
                _forget_clients()


def _forget_clients():
    """Clients of fsspec and epath are kept for ever, with the address that they found first."""
    import fsspec
    from etils.epath import backend

    for scheme in ("gs", "s3"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


class Proxy(http.server.BaseHTTPRequestHandler):
    """One request: faults, the precondition, the server's answer. `port` of the server behind is set on the class."""

    protocol_version = "HTTP/1.1"
    port, faults, lock, exclusive = 0, [], threading.Lock(), threading.Lock()
    counts, seen = collections.Counter(), []

    def _serve(self):
        body = self._body()
        if self.path.startswith("/_"):
            return self._reply(200, json.dumps(self._controlled(body)).encode())
        line = f"{self.command} {self.path}"
        with self.lock:
            self.seen.append(line)
            fault = next((f for f in self.faults if self._hits(f, line)), {})
            self.counts += collections.Counter({self.command: 1, "sent": len(body), "faults": bool(fault)})
        time.sleep(fault.get("delay", 0))
        if "write" in fault:
            pathlib.Path(fault["write"][0]).write_text(fault["write"][1])
        if "kill" in fault and not fault.get("after"):
            os.killpg(fault["kill"], signal.SIGKILL)
        if fault.get("drop") or ("kill" in fault and not fault.get("after")):
            self.close_connection = True
            return None
        if "status" in fault:
            return self._reply(fault["status"], b'{"error": {"code": %d, "message": "injected"}}' % fault["status"])
        status, headers, answer = self._forward(body)
        if "kill" in fault:
            os.killpg(fault["kill"], signal.SIGKILL)
        with self.lock:
            self.counts["received"] += len(answer)
        return self._reply(status, answer, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _serve

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    @staticmethod
    def _hits(fault, line):
        if not re.search(fault.get("match", ""), line):
            return False
        fault["skip"] = fault.get("skip", 0) - 1
        fault.setdefault("times", 1)
        if fault["skip"] >= 0 or fault["times"] == 0:
            return False
        fault["times"] -= 1
        return True

    def _controlled(self, body):
        with self.lock:
            if self.path == "/_faults":
                self.faults[:] = json.loads(body)
            answer = dict(self.counts) if self.path == "/_counts" else list(self.seen)
            (self.counts if self.path == "/_counts" else self.seen).clear()
        return answer

    def _forward(self, body):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if "ifGenerationMatch" not in query:
            return self._ask(self.command, self.path, body, self.headers)
        with self.exclusive:
            path = urllib.parse.urlsplit(self.path).path.removeprefix("/upload")
            if self.command == "POST":  # the name is in the query, or in the first part of the body
                named = query.get("name") or re.findall(r'"name": *"([^"]+)"', body[:2000].decode(errors="replace"))
                path += "/" + urllib.parse.quote(named[0], safe="")
            status, _, answer = self._ask("GET", path, b"", {})
            have = json.loads(answer)["generation"] if status == 200 else "0"
            if have != query["ifGenerationMatch"][0]:
                return 412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            return self._ask(self.command, self.path, body, self.headers)

    def _ask(self, method, path, body, headers):
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        left_out = ("connection", "transfer-encoding", "content-length")
        head = {k: v for k, v in headers.items() if k.lower() not in left_out}
        server.request(method, path, body, head | ({"Content-Length": str(len(body))} if body else {}))
        answer = server.getresponse()
        content = answer.read()
        server.close()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
        return answer.status, kept, content

    def _reply(self, status, content, headers=()):
        headers = {k: v for k, v in dict(headers).items() if k.lower() not in ("server", "date")}
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {k.lower() for k in headers}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client was killed
            self.close_connection = True


def start_gs():
    """The emulator, in memory, with the bucket; its port."""
    import logging

    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    for name in ("api.object", "api.bucket"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    return server._api._httpd.server_address[1]


def start_s3():
    """moto's server with the bucket; its port."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")).read()
    return port


def main(scheme):
    Proxy.port = {"gs": start_gs, "s3": start_s3}[scheme]()
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(proxy.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
