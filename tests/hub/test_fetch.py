"""A checkpoint's name is a folder, or a repository that is fetched once; what fails is said in one line."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from dsjax.hub import fetch
from dsjax.hub.fetch import resolve
from dsjax.hub.files import HubError

CLOSED = "http://127.0.0.1:9"  # nothing listens there
COMMIT = "0123456789" * 4
FILES = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_deepseek.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# Hello",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for: one repository, owner/name."""

    asked: list[str]

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif path == "/api/models/owner/name/revision/v9":
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            files = [{"type": "file", "path": n, "size": len(v), "oid": n[0] * 40} for n, v in FILES.items()]
            self.answer(json.dumps(files).encode())
        elif path.startswith(prefix := f"/owner/name/resolve/{COMMIT}/"):
            name = path.removeprefix(prefix)
            self.answer(FILES[name], 200, {"ETag": f'"{name[0] * 40}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/owner/gated"):
            self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/broken"):
            self.answer(b"", 500)
        elif path.startswith("/api/models/owner/silent"):
            time.sleep(3)
        else:
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The paths that were asked of a small Hub; its cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub, "model_info", huggingface_hub.HfApi(endpoint=address).model_info)
    yield Hub.asked
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)


def failure(source: str) -> str:
    with pytest.raises(HubError) as error:
        resolve(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(tmp_path, revision="main", files=("config.json",)):
    """A snapshot in the cache, as the library lays it out."""
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    for name in files:
        (snapshot / name).write_bytes(FILES[name])
    return snapshot


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setattr(fetch, "_fetch", None)
    assert resolve(tmp_path / "owner") == tmp_path / "owner"
    assert str(resolve("owner/name")) == "owner/name"  # before a repository of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


def test_a_repository_is_fetched_without_code_and_pickles_and_once(hub):
    folder = resolve("owner/name")
    assert sorted(path.name for path in folder.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not [path for path in hub if path.endswith((".py", ".bin", ".md"))]
    n = len([path for path in hub if "/resolve/" in path])
    assert n and resolve("owner/name@main") == folder
    assert len([path for path in hub if "/resolve/" in path]) == n


def test_what_was_fetched_needs_no_network(hub, monkeypatch):
    folder = resolve("owner/name")
    n = len(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name") == folder and len(hub) == n
    assert resolve(f"owner/name@{COMMIT}") == folder
    (folder / "model.safetensors").unlink()
    assert "owner/name: no such folder here, and from the Hub: not whole in the cache" in failure("owner/name")


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_repository_needs_no_network(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr(huggingface_hub, "model_info", huggingface_hub.HfApi(endpoint=CLOSED).model_info)
    snapshot = cached(tmp_path)
    assert resolve("owner/name") == snapshot
    text = failure("owner/other")
    assert ("HF_HUB_OFFLINE forbids to fetch it" if offline else "does not answer (ConnectError: ") in text


@pytest.mark.parametrize(
    "name, message",
    [
        ("owner/gated", r"/owner/gated is gated; ask for access on its page, then run `hf auth login`"),
        ("owner/none", r"/owner/none does not exist, or is private \(then run `hf auth login`\)"),
        ("owner/name@v9", r"/owner/name has no revision v9"),
        ("owner/broken", r"/owner/broken: Server error '500 Internal Server Error'"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, name, message):
    with pytest.raises(HubError, match=rf"{name}: no such folder here, and from the Hub: http://127.*{message}"):
        resolve(name)


def test_a_hub_that_is_silent_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    start = time.monotonic()
    assert "does not answer (ReadTimeout: timed out), and it is not whole in the cache" in failure("owner/silent")
    assert time.monotonic() - start < 2.5


def test_without_a_network_it_is_said_at_once(monkeypatch):
    start = time.monotonic()
    monkeypatch.setattr(huggingface_hub, "model_info", huggingface_hub.HfApi(endpoint=CLOSED).model_info)
    text = failure("deepseek-ai/DeepSeek-V3")
    assert text.startswith(
        "deepseek-ai/DeepSeek-V3: no such folder here, and from the Hub: https://huggingface.co does"
    )
    assert text.endswith("; check the network, or name a folder")
    assert time.monotonic() - start < 10


def raises(error):
    def function(*_, **__):
        raise error

    return function


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.GatedRepoError("403\nask", response=RESPONSE), "huggingface.co/owner/name is gated; ask for access"),
        (errors.RepositoryNotFoundError("401", response=RESPONSE), "huggingface.co/owner/name does not exist, or is"),
        (errors.HfHubHTTPError("429\ntoo many", response=RESPONSE), "huggingface.co/owner/name: 429 too many"),
        (
            OSError(28, "No space left on device"),
            r"fetching https:.* failed \(OSError: .*No space left on device\); try",
        ),
        (RuntimeError(), r"failed \(RuntimeError: no reason given\)"),
        (KeyboardInterrupt("stop"), "stop"),
    ],
)
def test_a_download_that_fails_is_said(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(error))
    with pytest.raises(HubError if isinstance(error, Exception) else KeyboardInterrupt, match=message):
        resolve("owner/name")


NEITHER = [
    "tiny",
    "./owner/name",
    "/a/b",
    "a/b/c",
    "owner/na me",
    "a--b/c",
    "a/b..c",
    "a/b.git",
    "a/b@",
    "a/b@../c/",
    "",
]
NEITHER += [" ", "x" * 5000, "a\0/b", "owner/name@a b", "-a/b", "a/ü", "~nobody/b", "https://huggingface.co/a/b"]


@pytest.mark.parametrize("source", NEITHER)
def test_what_is_neither_folder_nor_repository_is_said(monkeypatch, source):
    monkeypatch.setattr(fetch, "_fetch", None)
    assert "neither a folder here nor owner/name[@revision] of a Hub repository" in failure(source)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: a file; expected the checkpoint's folder, or owner/name" in failure("model.safetensors")


def test_the_nearest_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("runs/tiny", "DeepSeek-V3"):
        (tmp_path / name).mkdir(parents=True)
    assert "runs/tinny: no such folder here (did you mean runs/tiny?), and" in failure("runs/tinny")
    assert "(did you mean DeepSeek-V3?)" in failure("deepseek-ai/DeepSeek-V2")
    assert "(did you mean DeepSeek-V3?)" in failure("DeepSeekV3")
    assert "did you mean" not in failure("owner/else")
