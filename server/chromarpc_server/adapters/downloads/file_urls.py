"""Which URL a file is fetched from, given the one that a client sends."""

from __future__ import annotations

import re

import httpx2

from chromarpc_server.domain.errors import InvalidParameter

_FILE_PAGE = re.compile(rb"^(/(?:datasets/|spaces/)?[^/?]+(?:/[^/?]+)?)/blob/")


def file_url(text: str) -> httpx2.URL:
    """The URL of the file that a client means: a Hugging Face page of a file stands for the file.

    Raises:
        InvalidParameter: this is no URL.
    """
    try:
        url = httpx2.URL(text).copy_with(fragment=None)
        url = url.copy_with(host=url.host.removesuffix("."))
        if url.host == "hf.co":
            url = url.copy_with(host="huggingface.co")
        if is_hugging_face(url.host):
            url = url.copy_with(raw_path=_FILE_PAGE.sub(rb"\1/resolve/", url.raw_path))
    except (httpx2.InvalidURL, ValueError):
        raise InvalidParameter("this is not a URL that can be fetched") from None
    return url


def is_hugging_face(host: str) -> bool:
    """Whether a host is Hugging Face's, and may be sent a Hugging Face token."""
    return host == "huggingface.co" or host.endswith(".huggingface.co")
