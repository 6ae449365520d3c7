"""From a Hub id, or a path, to a local folder."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import LoadError


def fetch(
    path: str | os.PathLike,
    names: Callable[[list[str]], list[str]],
    first: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    force_download: bool = False,
    use_auth_token: str | bool | None = None,
) -> Path:
    """The folder `path`, or the local copy of the Hub repository `path`, downloaded if need be.

    `names` picks, out of all the files of a repository, those that will be read: only they are downloaded.
    Offline (`local_files_only` or HF_HUB_OFFLINE=1) the copy in the cache is taken as it is, if it has `first`.

    Raises LoadError if there is no such folder and no such repository, TypeError if `path` isn't a path.
    """
    check_path(path, "pretrained_model_name_or_path", "a folder or a Hub id")
    folder = Path(path)
    if os.path.isdir(folder):  # which says False, unlike Path, where a name is too long
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)) or os.path.exists(folder):
        raise LoadError(f"{path}: there is no such folder, and it is no Hub id (as in org/name) either")

    from huggingface_hub import HfApi, constants, snapshot_download  # takes its time, and most folders are local

    token = use_auth_token if token is None else token  # the older name
    wanted, problem, offline = [first], None, local_files_only or constants.HF_HUB_OFFLINE
    if not offline:
        try:
            info = HfApi(token=token).model_info(str(path), revision=revision)
            wanted = names([file.rfilename for file in info.siblings])
        except Exception as error:  # no network, no such repository, no permission: the cache may have it all the same
            problem, offline = error, True
    if force_download and offline:
        asked = "local_files_only or HF_HUB_OFFLINE says not to ask"
        raise LoadError(f"{path}: force_download=True, but it is not to be had from the Hub: {problem or asked}")
    where = {"revision": revision, "cache_dir": cache_dir, "token": token, "force_download": force_download}
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, local_files_only=offline, **where))
    except Exception as error:  # requests', the cache's and the disk's: huggingface_hub has no one base for them
        raise LoadError(f"{path}: no such folder here, and not to be had from the Hub: {problem or error}") from error


def fetch_file(
    link: str | os.PathLike,
    *,
    revision: str | None = None,
    use_auth_token: str | bool | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    **where: Any,
) -> Path:
    """The file `link`, or the local copy of the Hub's file at that address, downloaded if need be.

    An address is that of the file's page, or of its download: https://huggingface.co/org/name/blob/main/x.safetensors.
    Keywords as those of `fetch`. Raises LoadError if there is no such file.
    """
    from huggingface_hub import constants, hf_hub_download

    check_path(link, "pretrained_model_link_or_path", "a file or its address on the Hub")
    if os.path.isfile(link):
        return Path(link)
    hosts = "|".join(map(re.escape, ("https://huggingface.co", "https://hf.co", constants.ENDPOINT)))
    match = re.fullmatch(rf"(?:{hosts})/([\w.-]+/[\w.-]+)/(?:blob|resolve)/([^/?]+)/([^?]+)(\?.*)?", str(link))
    if not match:
        kind = "a folder: from_pretrained reads it" if os.path.isdir(link) else "no file, and no address of one"
        raise LoadError(
            f"{link}: {kind}. On the Hub it is such as https://huggingface.co/org/name/blob/main/x.safetensors"
        )
    where |= {"revision": revision or match[2], "token": use_auth_token if token is None else token}
    try:
        return Path(hf_hub_download(match[1], match[3], local_files_only=bool(local_files_only), **where))
    except Exception as error:  # as in `fetch`
        raise LoadError(f"{link}: not to be had from the Hub: {error}") from error


def check_path(path: str | os.PathLike, argument: str, must: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be {must}, not {type(path).__name__}")
    if "\0" in os.fspath(path):
        raise LoadError(f"{argument}={path!r}: no path has a null character in it")
    if not os.fspath(path):
        raise LoadError(f"{argument} is empty: give {must}")
