"""What is wrong with an adapter's URL, judged by its text alone: before it is stored, repeated or fetched."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

USERINFO = "the URL may not hold a user name or password: send hf_token, or a URL that needs neither"
_AUTHORITY = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_HUGGING_FACE = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_FILES = frozenset({"resolve", "blob", "raw"})
_PAGES = frozenset({"tree", "commits", "commit", "discussions", "blame", "edit", "settings"})
"""What follows a repository's name in the address of a file, and in that of a page."""
_CIVITAI = frozenset({"civitai.com", "www.civitai.com", "civitai.green", "civitai.red"})
_GITHUB = frozenset({"github.com", "www.github.com"})


def is_url(path: str) -> bool:
    """Whether what a request names is to be fetched."""
    return path.lower().startswith(("http://", "https://"))


def url_problem(url: str) -> str | None:
    """Why an http(s) URL cannot be an adapter's, in a sentence that repeats nothing of it; None if it may be."""
    authority = _AUTHORITY.match(url)
    if authority is not None and "@" in authority[1].replace("%40", "@"):
        return USERINFO
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removesuffix(".")
    except ValueError:
        return "this is not a URL that can be fetched"
    names = [name for name in parts.path.split("/") if name]
    if host in _HUGGING_FACE and _is_hugging_face_page(names):
        return (
            "the URL is that of a folder or page of Hugging Face, not of a file: give the file's, "
            "https://huggingface.co/OWNER/REPOSITORY/resolve/REVISION/FILE.safetensors"
        )
    if host in _CIVITAI and (not names or names[0] != "api"):
        return (
            "the URL is that of a page of Civitai, not of a file: give the download's, "
            "https://civitai.com/api/download/models/VERSION"
        )
    if host in _GITHUB and (len(names) <= 2 or names[2] in {"blob", "tree"}):
        return (
            "the URL is that of a page of GitHub, not of a file: give the file's, "
            "https://github.com/OWNER/REPOSITORY/raw/REVISION/FILE.safetensors"
        )
    return None


def _is_hugging_face_page(names: list[str]) -> bool:
    """Whether a path leads to an account, a repository, or a page of one, rather than to a file of one."""
    if names[:1] in (["datasets"], ["spaces"]):
        names = names[1:]
    # Old repositories have no owner: /gpt2/resolve/main/model.safetensors.
    follows = set(names[1:3])
    return len(names) <= 2 or (follows.isdisjoint(_FILES) and not follows.isdisjoint(_PAGES))
