"""Tests of downloads from a local server that fails in every way."""

import base64
import dataclasses
import hashlib
import http.server
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import save

import flaxvision as fv
from flaxvision.weights.convert import layout_of, shapes_of
from flaxvision.weights.download import cache_dir, fetch
from flaxvision.weights.slots import slots_of

BODY = np.random.default_rng(0).bytes(300_000)
SHA = f"sha256:{hashlib.sha256(BODY).hexdigest()}"
MD5 = hashlib.md5(BODY)


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY. `faults` lists what goes wrong, one entry per request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.etag, self.extra, self.body = [], [], '"v1"', {}, BODY

    def url(self, name="weights.pth"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else None
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if isinstance(fault, int):
            self.send_error(fault)
            return
        body, start = server.body, 0
        if wanted and fault != "no ranges" and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        for key, value in server.extra.items():
            self.send_header(key, value)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        if fault == "wrong bytes":
            body = bytes(len(body))
        self.wfile.write(body[: len(body) // 3] if fault == "drop" else body)
        self.wfile.flush()
        self.close_connection = True


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, cache, digest=SHA, **options):
    return fetch(server.url(), digest, directory=cache, pause=0.01, progress=False, **options)


def files(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_file_is_fetched_once(server, tmp_path):
    path = get(server, tmp_path)
    assert path.read_bytes() == BODY
    assert path.name == "weights.pth"
    assert path.is_relative_to(tmp_path)
    assert get(server, tmp_path) == path
    assert server.requests == [None]
    assert files(tmp_path) == ["weights.pth", "weights.pth.sha256"]


@pytest.mark.parametrize("digest", [SHA[:15], f"md5:{MD5.hexdigest()}", None])
def test_digests_of_every_kind(server, tmp_path, digest):
    assert get(server, tmp_path, digest).read_bytes() == BODY
    assert get(server, tmp_path, digest).read_bytes() == BODY
    assert len(server.requests) == 1


def test_a_dropped_connection_is_taken_up_again(server, tmp_path):
    server.faults = ["drop", "drop"]
    assert get(server, tmp_path).read_bytes() == BODY
    first = len(BODY) // 3
    second = first + (len(BODY) - first) // 3
    assert server.requests == [None, f"bytes={first}-", f"bytes={second}-"]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.faults = ["drop", "no ranges"]
    assert get(server, tmp_path).read_bytes() == BODY
    server.requests.clear()
    server.etag = None  # nothing promises that the rest belongs to the beginning
    server.faults = ["drop"]
    assert fetch(server.url("other"), SHA, directory=tmp_path, pause=0.01, progress=False).read_bytes() == BODY
    assert server.requests == [None, None]


def test_a_file_that_changes_between_two_attempts(server, tmp_path):
    """If-Range prevents a mixture of two files."""
    server.faults = ["drop"]
    other = bytes(len(BODY))
    answer = Handler.do_GET

    def change(self):
        answer(self)
        self.server.body, self.server.etag = other, '"v2"'

    server.RequestHandlerClass = type("Changing", (Handler,), {"do_GET": change})
    path = get(server, tmp_path, f"sha256:{hashlib.sha256(other).hexdigest()}")
    assert path.read_bytes() == other


def test_too_many_drops(server, tmp_path):
    server.faults = ["drop"] * 9
    with pytest.raises(ConnectionError, match=r"could not be downloaded in 3 attempts: .* dropped after \d+ of 300000"):
        get(server, tmp_path, retries=2)
    assert len(server.requests) == 3
    assert files(tmp_path) == []


def test_errors_of_the_server(server, tmp_path):
    server.faults = [503, 429, 500]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 4
    server.requests.clear()
    server.faults = [404]
    with pytest.raises(ConnectionError, match="was refused: HTTP 404"):
        fetch(server.url("missing"), SHA, directory=tmp_path, progress=False)
    assert len(server.requests) == 1


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(ConnectionError, match="could not be downloaded in 2 attempts"):
        fetch("http://127.0.0.1:9/x.pth", SHA, directory=tmp_path, retries=1, pause=0.01, progress=False)


def test_wrong_bytes_are_never_kept(server, tmp_path):
    server.faults = ["wrong bytes"]
    with pytest.raises(ValueError, match=r"must begin with .*; got sha256:[0-9a-f]{64}, and the file was not kept"):
        get(server, tmp_path)
    assert files(tmp_path) == []
    assert get(server, tmp_path).read_bytes() == BODY  # and the next attempt is not spoilt


def test_a_length_that_is_not_stated(server, tmp_path):
    server.faults = ["no length"]
    assert get(server, tmp_path).read_bytes() == BODY


def test_what_google_states_of_a_file(server, tmp_path):
    server.extra = {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(MD5.digest()).decode()}"}
    assert get(server, tmp_path, None).read_bytes() == BODY
    server.faults = ["wrong bytes"]
    with pytest.raises(ValueError, match=f"must begin with md5:{MD5.hexdigest()}; got md5:"):
        fetch(server.url("b"), None, directory=tmp_path, progress=False)


@pytest.mark.parametrize("digest", [SHA, None])
def test_a_cached_file_that_was_damaged_since(server, tmp_path, digest):
    path = get(server, tmp_path, digest)
    path.write_bytes(BODY[:1000])
    assert get(server, tmp_path, digest).read_bytes() == BODY
    assert len(server.requests) == 2


def test_without_a_digest_a_file_of_unknown_origin_is_not_trusted(server, tmp_path):
    path = get(server, tmp_path, None)
    path.with_name("weights.pth.sha256").unlink()
    path.write_bytes(b"something else")
    assert get(server, tmp_path, None).read_bytes() == BODY


def test_a_doubtful_file_stays_until_it_is_replaced(server, tmp_path):
    """Another process may have written the file and not yet its digest."""
    path = get(server, tmp_path, None)
    path.with_name("weights.pth.sha256").unlink()
    server.faults = [404]
    with pytest.raises(ConnectionError):
        get(server, tmp_path, None)
    assert path.read_bytes() == BODY


def test_a_stop_in_mid_download_leaves_nothing(server, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            get(server, tmp_path)
    assert files(tmp_path) == []


def test_leftovers_of_a_killed_process_are_swept(server, tmp_path):
    path = get(server, tmp_path)
    old, new = (path.with_name(f".weights.pth.{i}.partial") for i in range(2))
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    path.unlink()
    get(server, tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_many_at_once(server, tmp_path):
    server.faults = ["drop", None, "drop"]
    found = []
    threads = [threading.Thread(target=lambda: found.append(get(server, tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BODY] * 4
    assert files(tmp_path) == ["weights.pth", "weights.pth.sha256"]


def test_the_cache_lies_where_it_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXVISION_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("FLAXVISION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "flaxvision"


def test_arguments():
    with pytest.raises(ValueError, match="digest must be sha256:HEX or md5:HEX"):
        fetch("https://x.org/a", "sha256:abc")
    with pytest.raises(ValueError, match="url must begin with https://"):
        fetch("file:///etc/passwd")
    with pytest.raises(ValueError, match="url must be hf://OWNER/REPOSITORY/FILE"):
        fetch("hf://timm/resnet50.a1_in1k")


class Hub:
    """Replaces the hub's library, which names the blob of a large file by the SHA-256 that the hub states."""

    def __init__(self, body=BODY, name=None):
        self.body, self.name, self.calls = body, name or hashlib.sha256(BODY).hexdigest(), []

    def __call__(self, repository, file, *, revision, cache_dir, local_files_only=False, endpoint=None):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append((repository, file, revision, local_files_only))
        blob = cache_dir / "blobs" / self.name
        link = cache_dir / "snapshots" / file
        if not blob.exists():
            if local_files_only:
                raise LocalEntryNotFoundError("not there")
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(self.body)
            if not link.is_symlink():
                link.symlink_to(blob)
        return str(link)


def from_hub(monkeypatch, cache, hub, digest=None):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    url = "hf://timm/resnet50.a1_in1k/model.safetensors"
    return fetch(url, digest, revision="abc", directory=cache, progress=False)


def test_the_hub(monkeypatch, tmp_path):
    hub = Hub()
    path = from_hub(monkeypatch, tmp_path, hub)
    assert path.read_bytes() == BODY
    what = ("timm/resnet50.a1_in1k", "model.safetensors", "abc")
    assert hub.calls == [(*what, True), (*what, False)]
    hub.calls.clear()
    assert from_hub(monkeypatch, tmp_path, hub, SHA) == path
    assert hub.calls == [(*what, True)]
    path.resolve().write_bytes(b"damaged")
    assert from_hub(monkeypatch, tmp_path, hub).read_bytes() == BODY


@pytest.mark.parametrize(("name", "digest"), [(None, None), ("0" * 40, SHA)])
def test_wrong_bytes_from_the_hub(monkeypatch, tmp_path, name, digest):
    hub = Hub(b"wrong", name)
    with pytest.raises(ValueError, match=r"must begin with sha256:.*; got sha256:.*, and the file was not kept"):
        from_hub(monkeypatch, tmp_path, hub, digest)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    class Unreachable(Hub):
        def __call__(self, *arguments, local_files_only=False, **options):
            if not local_files_only:
                raise RuntimeError("no route")
            return super().__call__(*arguments, local_files_only=True, **options)

    with pytest.raises(ConnectionError, match="could not be downloaded: RuntimeError no route"):
        from_hub(monkeypatch, tmp_path, Unreachable())


def test_a_tag_is_fetched_and_loaded(server, tmp_path, monkeypatch):
    """Loads a tag from a local server instead of the publisher's."""
    shapes = shapes_of("squeezenet1_0", fv.create_model("squeezenet1_0"))
    slots = slots_of(layout_of("squeezenet1_0", "torchvision"), shapes)
    tensors = {slot.name: np.full(slot.shape, 0.5, np.float32) for slot in slots}
    server.body = save(tensors)
    real = fv.weights.tag_of("squeezenet1_0", "torchvision/IMAGENET1K_V1")
    local = dataclasses.replace(
        real,
        url=server.url("squeezenet.safetensors"),
        digest=f"sha256:{hashlib.sha256(server.body).hexdigest()[:8]}",
    )
    monkeypatch.setitem(fv.weights.load.__globals__, "tag_of", lambda name, tag: local)
    monkeypatch.setenv("FLAXVISION_CACHE", str(tmp_path))
    variables = fv.weights.load("squeezenet1_0", "torchvision/IMAGENET1K_V1")
    assert float(variables["params"]["backbone"]["stem_conv"]["kernel"].mean()) == 0.5
    assert "squeezenet.safetensors" in files(tmp_path)
    server.body, server.etag = bytes(100), '"v2"'
    monkeypatch.setenv("FLAXVISION_CACHE", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="the file was not kept"):
        fv.weights.load("squeezenet1_0", "torchvision/IMAGENET1K_V1")
