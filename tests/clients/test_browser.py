"""The page at / in headless Chromium."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from talks import SUM

pytestmark = pytest.mark.slow  # it fetches a browser, and starts it three times
BROWSER = Path(__file__).parent / "browser"


@pytest.fixture(scope="module")
def script():
    """Where npm has put a browser beside the script, once for all runs."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed: no browser to look at the page with")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsjax" / "browser"
    lock = BROWSER / "package-lock.json"
    done = cache / "done.json"
    if not done.is_file() or done.read_text() != lock.read_text():
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(BROWSER / name, cache)
        subprocess.run(["npm", "ci"], cwd=cache, check=True, capture_output=True, timeout=300)
        shutil.copy(lock, done)
    return shutil.copy(BROWSER / "talk.mjs", cache)


@pytest.mark.parametrize(
    ("width", "scheme", "background"),
    [(1280, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(24, 24, 24)"), (390, "dark", "rgb(24, 24, 24)")],
)
def test_the_page_shows_how_an_answer_is_made(script, url, tmp_path, width, scheme, background):
    picture = tmp_path / "page.png"
    asked = {"url": f"{url}/", "key": "key", "texts": ["Hello", SUM], "picture": str(picture)}
    command = ["node", str(script), json.dumps(asked | {"width": width, "scheme": scheme})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert not seen["errors"] and not seen["problems"]
    assert len(seen["requests"]) > 4 and all(request.startswith(f"{url}/") for request in seen["requests"])
    assert seen["answers"] == ["Hello there.", "It is 2."]
    assert any(0 < n < len("Hello there.") for n in seen["lengths"])  # it came in pieces
    assert seen["reasoning"] == [{"open": False, "text": "One and one are two.\n"}]
    for meta in seen["meta"]:
        assert re.fullmatch(r"\d+ tokens, \d+ a second, [1-9]\d* of \d+ drafts accepted.*", meta)
    assert json.loads(seen["token"]) == "." and json.loads(seen["first"]) == "Hello"
    chosen = seen["map"]["painted"] / (seen["map"]["width"] * seen["map"]["height"])
    assert seen["map"]["shown"] and 0.15 < chosen < 0.3  # 2 of 8 experts
    assert seen["overflow"] <= 0 and seen["background"] == background
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
