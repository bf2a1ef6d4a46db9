"""Google Cloud Storage's JSON API on a port of this machine, in this process, as far as this program's clients use it.

It keeps preconditions, generations and listings as the real one does, injects faults, and records its requests.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

OBJECT = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/(o|iam)(?:/(.+))?)?$")
QUANTUM = 256 * 1024  # of which all parts of a resumable upload but the last are multiples


class Refused(Exception):
    """A status other than success, with the reason that the API gives."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Object:
    """An object as it is stored."""

    data: bytes
    generation: int
    created: float
    updated: float
    metageneration: int = 1
    fields: dict[str, Any] = field(default_factory=dict)  # contentType, metadata, ...


@dataclass
class Request:
    """A request as the log has it."""

    method: str
    bucket: str
    name: str  # of the object, or of the prefix that is listed
    kind: str  # get, read, write, list, delete, bucket, ...
    params: dict[str, str]
    status: int = 0
    span: str | None = None  # the bytes that are asked for, as 0-7; None: all


@dataclass
class Fault:
    """What becomes of requests: answered with ``status``, dropped (0), or answered late; ``after`` they took effect."""

    matches: Callable[[Request], bool]
    status: int
    times: float  # so many requests
    until: float  # this monotonic time
    delay: float
    after: bool


class FakeBucket:
    """A storage with these buckets; use it as a context manager."""

    def __init__(self, *buckets: str, page_size: int = 1000):
        self.buckets, self.page_size = set(buckets), page_size
        self.objects: dict[tuple[str, str], Object] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.bucket_fields: dict[str, Any] = {}  # of all buckets, besides those that each one has
        self.clock_offset = 0.0  # seconds by which its clock is ahead
        self.lock = threading.RLock()
        self._generation = 1_700_000_000_000_000
        self._uploads: dict[str, tuple[dict[str, str], dict[str, Any], bytearray]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"storage": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeBucket":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """Variables that make every client of a process talk to it."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of a bucket's objects."""
        with self.lock:
            return sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))

    def data(self, bucket: str, name: str) -> bytes:
        """The bytes of an object."""
        return self.objects[bucket, name].data

    def put(self, bucket: str, name: str, data: bytes, **fields: Any) -> Object:
        """Store an object, as a client would."""
        with self.lock:
            self._generation += 1
            now = time.time() + self.clock_offset
            self.objects[bucket, name] = stored = Object(data, self._generation, now, now, fields=fields)
            return stored

    def fail(
        self,
        status: int = 503,
        *,
        kind: str = "",
        name: str = "",
        times: float = float("inf"),
        seconds: float = float("inf"),
        delay: float = 0.0,
        after: bool = False,
    ) -> Fault:
        """Give requests of a kind whose names match a pattern this fault, so many times or for so long."""
        matches = lambda r: (not kind or r.kind in kind.split()) and re.search(name, r.name) is not None  # noqa: E731
        fault = Fault(matches, status, times, time.monotonic() + seconds, delay, after)
        self.faults.append(fault)
        return fault

    def fault_of(self, request: Request, after: bool) -> Fault | None:
        """The fault that a request meets, if any."""
        with self.lock:
            for fault in self.faults:
                is_due = fault.times > 0 and time.monotonic() < fault.until
                if is_due and fault.after == after and fault.matches(request):
                    fault.times -= 1
                    return fault
        return None

    def bucket_resource(self, bucket: str) -> dict[str, Any]:
        """The JSON resource of a bucket."""
        fields = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US-CENTRAL1"}
        return fields | self.bucket_fields

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        """The JSON resource of an object."""
        stored = self.found(bucket, name)
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "bucket": bucket,
            "name": name,
            "generation": str(stored.generation),
            "metageneration": str(stored.metageneration),
            "size": str(len(stored.data)),
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "etag": str(stored.generation),
            "storageClass": "STANDARD",
            "timeCreated": _rfc3339(stored.created),
            "updated": _rfc3339(stored.updated),
            "contentType": "application/octet-stream",
            "mediaLink": f"{self.url}/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media",
            **stored.fields,
        }

    def found(self, bucket: str, name: str) -> Object:
        """An object that must exist."""
        if (bucket, name) not in self.objects:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return self.objects[bucket, name]

    def check(self, bucket: str, name: str, params: dict[str, str], prefix: str = "if") -> None:
        """Compare an object with a request's preconditions: 412, or 304 for a read of what has not changed."""
        stored = self.objects.get((bucket, name))
        for what in ("generation", "metageneration"):
            value = 0 if stored is None else getattr(stored, what)
            wanted = params.get(f"{prefix}{what.capitalize()}Match")
            unwanted = params.get(f"{prefix}{what.capitalize()}NotMatch")
            if wanted is not None and int(wanted) != value:
                raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
            if unwanted is not None and int(unwanted) == value:
                raise Refused(304, "Not Modified")
        wanted = params.get("generation") if prefix == "if" else None
        if wanted is not None and stored is not None and int(wanted) != stored.generation:
            raise Refused(404, f"No such object: {bucket}/{name}#{wanted}")

    def listing(self, bucket: str, params: dict[str, str]) -> dict[str, Any]:
        """A page of a bucket's names."""
        prefix, delimiter = params.get("prefix", ""), params.get("delimiter", "")
        entries: dict[str, bool] = {}  # name -> whether it is a prefix
        for name in self.names(bucket, prefix):
            if name < params.get("startOffset", "") or name >= params.get("endOffset", "\U0010ffff"):
                continue
            head, found, tail = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                entries[prefix + head + delimiter] = True
            if not found or (not tail and params.get("includeTrailingDelimiter") == "true"):
                entries[name] = False
        start = base64.b64decode(params.get("pageToken", "")).decode()
        rest = [entry for entry in sorted(entries.items()) if entry[0] > start]
        size = min(int(params.get("maxResults", self.page_size)), self.page_size)
        page = rest[:size]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if any(is_prefix for _, is_prefix in page):
            answer["prefixes"] = [name for name, is_prefix in page if is_prefix]
        if any(not is_prefix for _, is_prefix in page):
            answer["items"] = [self.resource(bucket, name) for name, is_prefix in page if not is_prefix]
        if len(rest) > size:
            answer["nextPageToken"] = base64.b64encode(page[-1][0].encode()).decode()
        return answer

    def begin_upload(self, bucket: str, params: dict[str, str], fields: dict[str, Any]) -> str:
        """Open a resumable upload, and return its id."""
        key = f"{bucket}-{len(self._uploads)}"
        self._uploads[key] = {**params, "bucket": bucket}, fields, bytearray()
        return key

    def continue_upload(self, key: str, span: str, data: bytes) -> tuple[dict[str, Any] | None, int]:
        """Take a part of a resumable upload: the object if that was the last one, and the bytes it has so far."""
        params, fields, received = self._uploads[key]
        bounds, _, total = span.removeprefix("bytes ").partition("/")
        if bounds != "*":
            start = int(bounds.partition("-")[0])
            if start > len(received):
                raise Refused(503, "a part is missing")
            if total == "*" and len(data) % QUANTUM:
                raise Refused(400, "a part that is not the last must be a multiple of 256 KiB")
            received[start:] = data
        if total == "*" or int(total) != len(received):
            return None, len(received)
        return self.write(params["bucket"], params, fields, bytes(received)), len(received)

    def write(self, bucket: str, params: dict[str, str], fields: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Store an object if its preconditions hold."""
        fields = dict(fields)
        name = params.get("name") or fields.pop("name")
        self.check(bucket, name, params)
        digest = fields.pop("md5Hash", None)
        if digest is not None and digest != base64.b64encode(hashlib.md5(data).digest()).decode():
            raise Refused(400, "Provided MD5 hash does not match")
        self.put(bucket, name, data, **{key: fields[key] for key in ("contentType", "metadata") if key in fields})
        return self.resource(bucket, name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    storage: FakeBucket

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def handle(self) -> None:
        with _disconnections():
            super().handle()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        if parts.path.startswith("/batch/"):
            return self._batch(body)
        status, headers, data = self.perform(self.command, self.path, dict(self.headers.items()), body)
        if status == 0:
            self.close_connection = True
            return None
        return self._send(status, headers, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status, "Resume Incomplete" if status == 308 else None)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def perform(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        """Do what a request asks, or what its fault says; a status of 0 drops the connection."""
        parts = urlsplit(target)
        params = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in headers.items()}
        request = _parse(method, parts.path, params, body, headers)
        request.span = headers.get("range", "").removeprefix("bytes=") or None
        self.storage.requests.append(request)
        if (fault := self.storage.fault_of(request, after=False)) is not None:
            time.sleep(fault.delay)
            if not (fault.delay and fault.status == 200):
                request.status = fault.status
                return fault.status, *_error(fault.status, "an injected fault")
        try:
            with self.storage.lock:
                status, answer_headers, data = self._do(request, parts.path, params, headers, body)
        except Refused as refusal:
            status, (answer_headers, data) = refusal.status, _error(refusal.status, refusal.reason)
        request.status = status
        if status < 300 and (fault := self.storage.fault_of(request, after=True)) is not None:
            return fault.status, *_error(fault.status, "an injected fault")
        return status, answer_headers, data

    def _do(self, request: Request, path: str, params: dict, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        storage, bucket, name = self.storage, request.bucket, request.name
        if bucket not in storage.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        if storage.bucket_fields.get("billing", {}).get("requesterPays") and "userProject" not in params:
            raise Refused(400, "Bucket is a requester pays bucket but no user project provided.")
        if request.kind == "bucket":
            return _json(storage.bucket_resource(bucket))
        if request.kind == "list":
            return _json(storage.listing(bucket, params))
        if request.kind == "write":
            return self._write(bucket, params, headers, body)
        if request.kind in ("copy", "move"):
            return self._copy(request, unquote(path.rpartition("/o/")[2]))
        if request.kind == "compose":
            wanted = json.loads(body)
            data = b"".join(storage.found(bucket, part["name"]).data for part in wanted["sourceObjects"])
            return _json(storage.write(bucket, {**params, "name": name}, wanted.get("destination", {}), data))
        storage.check(bucket, name, params)
        stored = storage.found(bucket, name)
        if request.kind == "delete":
            del storage.objects[bucket, name]
            return 204, {}, b""
        if request.kind == "read":
            return _content(stored, headers.get("range"))
        if request.kind == "update":
            stored.fields = {**stored.fields, **json.loads(body)}
            stored.metageneration += 1
            stored.updated = time.time() + storage.clock_offset
        return _json(storage.resource(bucket, name))

    def _write(self, bucket: str, params: dict, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        storage, kind = self.storage, params.get("uploadType")
        if "upload_id" in params:
            resource, received = storage.continue_upload(params["upload_id"], headers["content-range"], body)
            if resource is None:
                return 308, {"Range": f"bytes=0-{received - 1}"} if received else {}, b""
            return _json(resource)
        if kind == "resumable":
            key = storage.begin_upload(bucket, params, json.loads(body or b"{}"))
            target = f"{storage.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return 200, {"Location": target}, b""
        if kind == "multipart":
            (_, _, fields), (_, _, data) = _parts(headers["content-type"], body)
            return _json(storage.write(bucket, params, json.loads(fields), data))
        return _json(storage.write(bucket, params, {}, body))

    def _copy(self, request: Request, target: str) -> tuple[int, dict, bytes]:
        storage, bucket, params = self.storage, request.bucket, request.params
        storage.check(bucket, request.name, params, "ifSource")
        source = storage.found(bucket, request.name)
        resource = storage.write(bucket, {**params, "name": target}, source.fields, source.data)
        if request.kind == "move":
            del storage.objects[bucket, request.name]
            return _json(resource)
        size = str(len(source.data))
        done = {"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size}
        return _json({**done, "resource": resource})

    def _batch(self, body: bytes) -> None:
        answers = []
        for head, _, part in _parts(self.headers["Content-Type"], body):
            request_line, _, rest = part.partition(b"\r\n" if b"\r\n" in part else b"\n")
            method, target, _ = request_line.decode().split()
            status, _, data = self.perform(method, target, {}, rest.partition(b"\r\n\r\n")[2])
            content_id = head.get("content-id", "").strip("<>")
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{content_id}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                + data + b"\r\n"
            )  # fmt: skip
        self._send(200, {"Content-Type": "multipart/mixed; boundary=batch"}, b"".join(answers) + b"--batch--\r\n")


def _parse(method: str, path: str, params: dict[str, str], body: bytes, headers: dict[str, str]) -> Request:
    found = OBJECT.match(path)
    if found is None:
        return Request(method, "", path, "unknown", params)
    bucket, _, name = found.groups()
    name = name or ""
    for action, kind in (("rewriteTo", "copy"), ("copyTo", "copy"), ("moveTo", "move"), ("compose", "compose")):
        source, is_it, _ = name.partition(f"/{action}")
        if is_it and method == "POST":
            return Request(method, bucket, unquote(source), kind, params)
    if path.startswith("/upload"):
        target = params.get("name") or _name_in(body, headers)
        return Request(method, bucket, target, "write", params)
    if "/o" not in path.partition(f"/b/{bucket}")[2]:
        return Request(method, bucket, "", "bucket", params)
    if not name:
        return Request(method, bucket, params.get("prefix", ""), "list", params)
    kind = {"DELETE": "delete", "PATCH": "update", "PUT": "update"}.get(method)
    return Request(method, bucket, unquote(name), kind or ("read" if params.get("alt") == "media" else "get"), params)


def _name_in(body: bytes, headers: dict[str, str]) -> str:
    """The name that the JSON of an upload gives to its object."""
    text = body
    if headers.get("content-type", "").startswith("multipart"):
        text = _parts(headers["content-type"], body)[0][2]
    try:
        return str(json.loads(text).get("name", ""))
    except (ValueError, AttributeError):
        return ""  # a part of a resumable upload, whose beginning had the name


def _parts(content_type: str, body: bytes) -> list[tuple[dict[str, str], bytes, bytes]]:
    """The parts of a multipart body: headers, the bytes of them, and content."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    assert boundary is not None
    parts = []
    for part in re.split(rb"(?:^|\r?\n)--" + re.escape(boundary[1].encode()) + rb"(?:--)?[ \t]*\r?\n?", body):
        if part.strip():
            head, _, content = part.partition(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n")
            lines = [line.decode().partition(":") for line in head.splitlines() if b":" in line]
            parts.append(({name.lower(): value.strip() for name, _, value in lines}, head, content))
    return parts


def _content(stored: Object, span: str | None) -> tuple[int, dict, bytes]:
    size = len(stored.data)
    headers = {"x-goog-generation": str(stored.generation), "x-goog-stored-content-length": str(size),
               "x-goog-hash": "md5=" + base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
               "ETag": f'"{stored.generation}"', "Content-Type": "application/octet-stream"}  # fmt: skip
    if span is None:
        return 200, headers, stored.data
    first, _, last = span.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= size:
        raise Refused(416, "The requested range cannot be satisfied.")
    return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, stored.data[start:end]


def _json(content: dict[str, Any]) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(content).encode()


def _error(status: int, reason: str) -> tuple[dict, bytes]:
    if status in (0, 304):
        return {}, b""
    error = {"code": status, "message": reason, "errors": [{"message": reason, "reason": "injected"}]}
    return {"Content-Type": "application/json; charset=UTF-8"}, json.dumps({"error": error}).encode()


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _disconnections() -> Iterator[None]:
    """Clients may go at any time, as those that are killed do."""
    with suppress(ConnectionError, TimeoutError):
        yield
