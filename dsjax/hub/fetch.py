"""A checkpoint by its name: a folder here, or a repository of the Hub, fetched into huggingface_hub's cache.

resolve("deepseek-ai/DeepSeek-V2-Lite")          # ~/.cache/huggingface/hub/models--deepseek-ai--.../snapshots/...
resolve("deepseek-ai/DeepSeek-V2-Lite@85864749")  # a commit, a branch or a tag
"""

import difflib
import re
from pathlib import Path

from dsjax.config import show
from dsjax.hub.files import HubError

PATTERNS = ("*.safetensors", "*.json", "*.jinja")  # no code, and no pickles, which are code
TIMEOUT_S = 10
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


def resolve(source: Path | str) -> Path:
    """The folder of a checkpoint: `source` itself, or where the files of the repository owner/name[@revision] are.

    What is in the cache is taken without a network. Raises HubError where there is neither folder nor repository.
    """
    try:
        path = Path(source).expanduser()
        if str(source) and path.is_dir():
            return path
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, no home
        path, exists = Path(), False
    if exists:
        raise HubError(f"{path}: a file; expected the checkpoint's folder, or owner/name of a Hub repository")
    name = _NAME.fullmatch(str(source))
    if not name or re.search(r"--|\.\.|\.git(@|$)", str(source)):
        raise HubError(
            f"{show(str(source))}: neither a folder here nor owner/name[@revision] of a Hub repository{_nearest(path)}"
        )
    try:
        return _fetch(name[1], name[2])
    except HubError as error:
        raise HubError(f"{source}: no such folder here{_nearest(path)}, and from the Hub: {error}") from None


def _fetch(repository: str, revision: str | None) -> Path:
    import huggingface_hub as hub  # takes a while
    from huggingface_hub import constants, errors

    options = {"revision": revision, "allow_patterns": list(PATTERNS), "etag_timeout": TIMEOUT_S}
    unreached = None
    try:
        try:
            # snapshot_download has no limit on the wait for an answer.
            hub.model_info(repository, revision=revision, timeout=TIMEOUT_S)
        except errors.RevisionNotFoundError:
            raise
        except Exception as error:  # of the network, the server or the library: the cache may do
            unreached = error
        return Path(hub.snapshot_download(repository, local_files_only=unreached is not None, **options))
    except Exception as error:
        failure = unreached or error
    where = f"{constants.ENDPOINT}/{repository}"
    match failure:
        case errors.GatedRepoError():
            reason = f"{where} is gated; ask for access on its page, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            reason = f"{where} does not exist, or is private (then run `hf auth login`)"
        case errors.RevisionNotFoundError():
            reason = f"{where} has no revision {revision}"
        case errors.OfflineModeIsEnabled():
            reason = f"not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it"
        case errors.HfHubHTTPError():
            reason = f"{where}: {_line(failure)}"
        case _ if unreached is not None:
            reason = (
                f"{constants.ENDPOINT} does not answer ({type(failure).__name__}: {_line(failure)}), and it is not "
                f"whole in the cache {constants.HF_HUB_CACHE}; check the network, or name a folder"
            )
        case _:
            reason = f"fetching {where} failed ({type(failure).__name__}: {_line(failure)}); try again, it goes on"
    raise HubError(reason)


def _nearest(path: Path) -> str:
    """A folder that may have been meant."""
    for parent in (path.parent, Path()):
        try:
            folders = [entry.name for entry in parent.iterdir() if entry.is_dir()] if path.name else []
        except (OSError, ValueError):
            continue
        if close := difflib.get_close_matches(path.name, folders, n=1):
            return f" (did you mean {parent / close[0]}?)"
    return ""


def _line(error: Exception) -> str:
    return show(" ".join(str(error).split()), quote=False) or "no reason given"
