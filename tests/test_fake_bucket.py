"""The storage that tests of buckets talk to keeps the rules of the real one, as far as its clients rely on them."""

import http.client
import json
from urllib.parse import quote

import pytest
from fake_bucket import FakeBucket

DATA = bytes(range(100))
OBJECT = "/storage/v1/b/b/o/a%2Fx"
MEDIA = OBJECT + "?alt=media"


@pytest.fixture
def storage():
    with FakeBucket("b", page_size=3) as storage:
        storage.put("b", "a/x", DATA)
        yield storage


def asked(storage, method, target, body=b"", **headers):
    """Status, headers and body of what it answers."""
    connection = http.client.HTTPConnection(storage.url.removeprefix("http://"), timeout=10)
    connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def upload(name, condition=""):
    return f"/upload/storage/v1/b/b/o?uploadType=media&name={quote(name, safe='')}{condition}"


NOW = "GENERATION"  # of the object that there is
RULES = {
    "what is there is read": ("GET", MEDIA, {}, 200, DATA),
    "what is not there": ("GET", "/storage/v1/b/b/o/a?alt=media", {}, 404, None),
    "a bucket that is not there": ("GET", "/storage/v1/b/other/o", {}, 404, None),
    "nothing is written to a bucket that is not there": (
        "POST", "/upload/storage/v1/b/other/o?uploadType=media&name=x", {}, 404, None),
    "the bucket itself": ("GET", "/storage/v1/b/b", {}, 200, None),
    "a range": ("GET", MEDIA, {"Range": "bytes=10-19"}, 206, DATA[10:20]),
    "an open range": ("GET", MEDIA, {"Range": "bytes=90-"}, 206, DATA[90:]),
    "the last bytes": ("GET", MEDIA, {"Range": "bytes=-7"}, 206, DATA[-7:]),
    "a range that reaches beyond the end": ("GET", MEDIA, {"Range": "bytes=95-200"}, 206, DATA[95:]),
    "a range that starts beyond it": ("GET", MEDIA, {"Range": "bytes=100-200"}, 416, None),
    "read if it is this": ("GET", f"{MEDIA}&ifGenerationMatch={NOW}", {}, 200, DATA),
    "read if it is another": ("GET", f"{MEDIA}&ifGenerationMatch=7", {}, 412, None),
    "read if it changed": ("GET", f"{MEDIA}&ifGenerationNotMatch={NOW}", {}, 304, None),
    "created where there is none": ("POST", upload("a/y", "&ifGenerationMatch=0"), {}, 200, None),
    "not created where there is one": ("POST", upload("a/x", "&ifGenerationMatch=0"), {}, 412, None),
    "overwritten if it is this": ("POST", upload("a/x", f"&ifGenerationMatch={NOW}"), {}, 200, None),
    "not overwritten if it is another": ("POST", upload("a/x", "&ifGenerationMatch=7"), {}, 412, None),
    "changed fields, if they are these": ("PATCH", f"{OBJECT}?ifMetagenerationMatch=1", {}, 200, None),
    "not if they are others": ("PATCH", f"{OBJECT}?ifMetagenerationMatch=2", {}, 412, None),
    "deleted if it is this": ("DELETE", f"{OBJECT}?ifGenerationMatch={NOW}", {}, 204, None),
    "not deleted if it is another": ("DELETE", f"{OBJECT}?ifGenerationMatch=7", {}, 412, None),
    "copied": ("POST", f"{OBJECT}/rewriteTo/b/b/o/a%2Fz", {}, 200, None),
    "not copied onto one that is there": (
        "POST", f"{OBJECT}/rewriteTo/b/b/o/a%2Fx?ifGenerationMatch=0", {}, 412, None),
    "not copied if it is another": (
        "POST", f"{OBJECT}/rewriteTo/b/b/o/a%2Fz?ifSourceGenerationMatch=7", {}, 412, None),
    "moved": ("POST", f"{OBJECT}/moveTo/o/a%2Fz", {}, 200, None),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_preconditions_and_ranges(storage, rule):
    method, target, headers, status, content = RULES[rule]
    before = storage.objects["b", "a/x"]
    target = target.replace(NOW, str(before.generation))
    actual = asked(storage, method, target, b"{}" if method == "PATCH" else b"", **headers)
    assert actual[0] == status
    if content is not None:
        assert actual[2] == content
    if status >= 300:
        assert storage.objects == {("b", "a/x"): before}
    elif "overwritten" in rule:
        assert storage.objects["b", "a/x"].generation > before.generation
    elif method == "DELETE":
        assert not storage.objects
    elif rule in ("copied", "moved"):
        assert storage.data("b", "a/z") == DATA
        assert (("b", "a/x") in storage.objects) == (rule == "copied")


LISTINGS = {
    "": ["a/x", "b/1", "b/2/p", "b/2/q", "b/3", "c"],
    "&prefix=b/": ["b/1", "b/2/p", "b/2/q", "b/3"],
    "&delimiter=/": ["a/", "b/", "c"],
    "&prefix=b/&delimiter=/": ["b/1", "b/2/", "b/3"],
    "&prefix=b/2/&delimiter=/": ["b/2/p", "b/2/q"],
    "&startOffset=b/2/q&endOffset=c": ["b/2/q", "b/3"],
    "&maxResults=1&prefix=b/&delimiter=/": ["b/1", "b/2/", "b/3"],
    "&prefix=none": [],
}


@pytest.mark.parametrize("query", LISTINGS)
def test_listings_come_in_pages(storage, query):
    for name in ("c", "b/3", "b/2/q", "b/2/p", "b/1"):
        storage.put("b", name, b"")
    names, token = [], ""
    while True:
        page = json.loads(asked(storage, "GET", f"/storage/v1/b/b/o?pageToken={token}{query}")[2])
        names += [*page.get("prefixes", []), *(item["name"] for item in page.get("items", []))]
        token = page.get("nextPageToken", "")
        if not token:
            break
    assert sorted(names) == LISTINGS[query]


def test_an_upload_in_parts(storage):
    quantum = 256 * 1024
    data = bytes(quantum + 5)
    begin = "/upload/storage/v1/b/b/o?uploadType=resumable&ifGenerationMatch=0"
    status, headers, _ = asked(storage, "POST", begin, b'{"name": "big", "metadata": {"a": "1"}}')
    target = headers["Location"].removeprefix(storage.url)
    assert status == 200
    assert asked(storage, "PUT", target, data[:100], Content_Range="bytes 0-99/*")[0] == 400
    status, headers, _ = asked(storage, "PUT", target, data[:quantum], Content_Range=f"bytes 0-{quantum - 1}/*")
    assert (status, headers["Range"]) == (308, f"bytes=0-{quantum - 1}")
    assert asked(storage, "PUT", target, Content_Range="bytes */*")[0] == 308  # how far did it come?
    assert storage.names("b") == ["a/x"]
    last = f"bytes {quantum}-{len(data) - 1}/{len(data)}"
    status, _, answer = asked(storage, "PUT", target, data[quantum:], Content_Range=last)
    assert (status, json.loads(answer)["metadata"], storage.data("b", "big")) == (200, {"a": "1"}, data)


def test_a_batch_answers_each_part(storage):
    part = "--x\r\nContent-Type: application/http\r\nContent-ID: <{0}>\r\n\r\nDELETE {1} HTTP/1.1\r\n\r\n\r\n"
    body = part.format(1, OBJECT) + part.format(2, OBJECT) + "--x--\r\n"
    status, _, answer = asked(
        storage, "POST", "/batch/storage/v1", body.encode(), Content_Type='multipart/mixed; boundary="x"'
    )
    assert status == 200
    assert [line.split()[1] for line in answer.decode().splitlines() if line.startswith("HTTP/1.1")] == ["204", "404"]
    assert not storage.objects


def test_faults(storage):
    storage.fail(503, kind="read", name="x$", times=2)
    assert [asked(storage, "GET", MEDIA)[0] for _ in range(3)] == [503, 503, 200]
    storage.fail(403, kind="list")
    assert asked(storage, "GET", "/storage/v1/b/b/o")[0] == 403
    storage.faults.clear()
    storage.fail(0, times=1)  # dropped
    with pytest.raises(http.client.RemoteDisconnected):
        asked(storage, "GET", MEDIA)
    storage.fail(503, kind="write", times=1, after=True)  # it took effect, but nobody is told
    assert asked(storage, "POST", upload("new", "&ifGenerationMatch=0"), b"1")[0] == 503
    assert asked(storage, "POST", upload("new", "&ifGenerationMatch=0"), b"1")[0] == 412
    assert storage.data("b", "new") == b"1"
    assert [(r.method, r.kind, r.name, r.status) for r in storage.requests[-2:]] == [
        ("POST", "write", "new", 200), ("POST", "write", "new", 412)]  # fmt: skip
