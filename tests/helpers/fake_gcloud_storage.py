"""`gcloud storage` over a FakeBucket, as far as launch/ uses it, in the words of Google Cloud SDK 528.

A shell asks through a port of this machine, the number of words and then a word a line, and gets back shell code that
prints what gcloud prints and returns its exit code.
"""

import fnmatch
import shlex
import socketserver
import threading
from pathlib import Path
from typing import Any, NamedTuple

from fake_bucket import FakeBucket, Request

# of `buckets describe`, by the names that its --format has
BUCKET_FIELDS = {
    "location": lambda bucket: bucket["location"],
    "requester_pays": lambda bucket: str(bucket["billing"]["requesterPays"]),
    "versioning_enabled": lambda bucket: str(bucket["versioning"]["enabled"]),
    "soft_delete_policy.retentionDurationSeconds": lambda bucket: bucket["softDeletePolicy"][
        "retentionDurationSeconds"
    ],
    "lifecycle_config.rule.len()": lambda bucket: str(len(bucket["lifecycle"]["rule"])),
}


class Failed(Exception):
    """What gcloud prints after ``ERROR: (gcloud.storage.VERB)``."""


class Answer(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str = ""


def answer(storage: FakeBucket, words: list[str]) -> Answer:
    """The answer to ``gcloud storage WORD...``."""
    verb = ".".join(words[:2]) if words[0] == "buckets" else words[0]
    options = dict(word.split("=", 1) for word in words if word.startswith("--"))
    urls = [word for word in words[1 + verb.count(".") :] if not word.startswith("--")]
    out: list[str] = []
    try:
        with storage.lock:
            COMMANDS[verb](storage, urls, options, out)
    except Failed as failure:
        return Answer(1, "".join(out), f"ERROR: (gcloud.storage.{verb}) {failure}\n")
    return Answer(0, "".join(out))


def _split(storage: FakeBucket, url: str, kind: str) -> tuple[str, str]:
    """Bucket and name, if the bucket is there and no fault is planned for them."""
    bucket, _, name = url.removeprefix("gs://").partition("/")
    fault = storage.fault_of(Request("GET", bucket, name, kind, {}), after=False)
    if fault is not None and fault.status == 403 and kind != "read":
        what = f"[None] does not have permission to access b instance [{bucket}] (or it may not exist)"
        raise Failed(f"{what}: an injected fault.")
    if fault is not None:
        raise Failed(f"HTTPError {fault.status}: an injected fault.")
    if bucket not in storage.buckets:
        raise Failed(f"gs://{bucket} not found: 404.")
    return bucket, name


def _cat(storage: FakeBucket, urls: list[str], options: dict[str, str], out: list[str]) -> None:
    missing = []
    for url in urls:
        where = _split(storage, url, "read")
        if where in storage.objects:
            out.append(storage.data(*where)[int(options.get("--range", 0)) :].decode())
        else:
            missing.append(url)
    if missing:
        raise Failed("\n".join(["The following URLs matched no objects or files:", *missing]))


def _ls(storage: FakeBucket, urls: list[str], options: dict[str, str], out: list[str]) -> None:
    for url in urls:
        bucket, pattern = _split(storage, url, "list")
        depth = pattern.count("/")  # * stands for no more than one folder
        names = [name for name in storage.names(bucket) if name.count("/") == depth and fnmatch.fnmatch(name, pattern)]
        if not names:
            raise Failed("One or more URLs matched no objects.")
        out += [f"gs://{bucket}/{name}\n" for name in names]


def _describe(storage: FakeBucket, urls: list[str], options: dict[str, str], out: list[str]) -> None:
    bucket, _ = _split(storage, urls[0], "bucket")
    values = []
    for field in options["--format"].removeprefix("csv[no-heading](").removesuffix(")").split(","):
        try:
            values.append(BUCKET_FIELDS[field](storage.bucket_resource(bucket)))
        except KeyError:
            values.append("0" if "len()" in field else "")
    out.append(",".join(values) + "\n")


def _cp(storage: FakeBucket, urls: list[str], options: dict[str, str], out: list[str]) -> None:
    storage.put(*_split(storage, urls[1], "write"), Path(urls[0]).read_bytes())


def _rm(storage: FakeBucket, urls: list[str], options: dict[str, str], out: list[str]) -> None:
    del storage.objects[_split(storage, urls[0], "delete")]


COMMANDS: dict[str, Any] = {"cat": _cat, "ls": _ls, "buckets.describe": _describe, "cp": _cp, "rm": _rm}


class GcloudStorage:
    """The port at which shells ask; use it as a context manager."""

    def __init__(self, storage: FakeBucket):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                count = int(self.rfile.readline())
                code, out, err = answer(storage, [self.rfile.readline().decode().rstrip("\n") for _ in range(count)])
                text = f"printf %s {shlex.quote(out)}; printf %s {shlex.quote(err)} >&2; exit {code}\n"
                self.wfile.write(text.encode())

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> "GcloudStorage":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
