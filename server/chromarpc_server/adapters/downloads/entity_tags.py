"""What each URL gave last, so that its host can say that it is still the same (RFC 9110, section 8.8.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx2

MAX_REMEMBERED_URLS = 4096

_STRONG_ETAG = re.compile(r'"[!#-~]*"')


@dataclass(frozen=True)
class TaggedFile:
    """The file that a URL gave last."""

    etag: str
    """A strong entity tag, with its quotes."""
    sha256: str


class EntityTags:
    """The last `MAX_REMEMBERED_URLS` URLs with a strong entity tag, in memory."""

    def __init__(self) -> None:
        self._files: dict[httpx2.URL, TaggedFile] = {}

    def get(self, url: httpx2.URL) -> TaggedFile | None:
        """What the URL gave last; None where that is not known, or had no strong entity tag."""
        return self._files.get(url)

    def remember(self, url: httpx2.URL, etag: str, sha256: str) -> None:
        """Notes what the URL gave; `etag` as the answer has it, empty for none."""
        self._files.pop(url, None)
        if _STRONG_ETAG.fullmatch(etag):
            self._files[url] = TaggedFile(etag, sha256)
        if len(self._files) > MAX_REMEMBERED_URLS:
            del self._files[next(iter(self._files))]
