"""Envoy's configuration, made from `envoy.yaml` beside this file."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from chromarpc.compat.v1 import inference_service_pb2
from chromarpc_server.gateway import openapi

TEMPLATE = Path(__file__).with_name("envoy.yaml")
PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"html": "index.html", "js": "page.js", "css": "page.css", "icon": "icon.svg"}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Gateway:
    """Where Envoy listens, what it serves, and whom it stands before."""

    web_host: str
    web_port: int
    grpc_host: str
    grpc_port: int
    names: tuple[str, ...] = ("*",)
    """Host names that requests may be for, without ports; `*` is any."""
    origins: tuple[str, ...] = ()
    """Origins of other pages that may call, such as `https://studio.example.org`; `*` is any."""
    public_url: str | None = None
    """Where the gateway is reached from outside; None takes each request's own Host."""
    grpc_authority: Path | None = None
    """PEM file of the authority whose certificate the server shows; None where it speaks plain text."""
    grpc_name: str | None = None
    """Name to expect in that certificate."""


def envoy_yaml(gateway: Gateway, *, descriptor: Path, page: Path = PAGE, description: Path = openapi.FILE) -> str:
    """The configuration file's text.

    Args:
        gateway: see there.
        descriptor: file that holds `descriptor_set()`.
        page: folder of the page's files, as Envoy will find them. Their entity tags are those of the files beside
            this module, so they must be the same.
        description: `openapi.json`, likewise.
    """
    values: dict[str, object] = {
        "web_host": gateway.web_host,
        "web_port": gateway.web_port,
        "grpc_host": gateway.grpc_host,
        "grpc_port": gateway.grpc_port,
        "domains": list(gateway.names),
        "base_url": (gateway.public_url or "%REQ(X-FORWARDED-PROTO)%://%REQ(:AUTHORITY)%").rstrip("/"),
        "origins": [{"prefix": ""} if origin == "*" else {"exact": origin} for origin in gateway.origins],
        "descriptor": str(descriptor),
        "cluster_type": "STATIC" if _is_address(gateway.grpc_host) else "STRICT_DNS",
        **{f"page_{kind}": str(page / name) for kind, name in PAGE_FILES.items()},
        "openapi": str(description),
        **_tags(),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    filled = {name: json.dumps(value) for name, value in values.items()}
    if gateway.names == ("*",):
        # Every name is served, so there are no others.
        start, end = text.index("                    - name: others"), text.index("                http_filters:")
        text = text[:start] + text[end:]
    rendered = string.Template(_without_comment_placeholders(text)).substitute(
        filled, transport_socket=_transport_socket(gateway)
    )
    return rendered.rstrip() + "\n"


def _tags() -> dict[str, object]:
    """For each file its entity tag, and a pattern of `if-none-match` headers that name it.

    The tags are weak because answers are compressed on the way, which would void others.
    """
    files = {f"page_{kind}": PAGE / name for kind, name in PAGE_FILES.items()} | {"openapi": openapi.FILE}
    values: dict[str, object] = {}
    for name, file in files.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        values[f"{name}_tag"] = f'W/"{digest}"'
        values[f"{name}_known"] = rf'\*|.*"{digest}".*'
    return values


def descriptor_set() -> bytes:
    """The contract of the HTTP API with everything it imports, as Envoy's transcoder reads it."""
    files = FileDescriptorSet()
    for file in _with_imports(inference_service_pb2.DESCRIPTOR, set()):
        file.CopyToProto(files.file.add())
    return files.SerializeToString()


def _with_imports(file: FileDescriptor, seen: set[str]) -> Iterator[FileDescriptor]:
    if file.name in seen:
        return
    seen.add(file.name)
    for imported in file.dependencies:
        yield from _with_imports(imported, seen)
    yield file


def _without_comment_placeholders(text: str) -> str:
    """A `${…}` in the heading is about placeholders and is none."""
    return text.replace("${…}", "$${…}")


def _is_address(host: str) -> bool:
    return ":" in host or all(part.isdecimal() for part in host.split("."))


def _transport_socket(gateway: Gateway) -> str:
    if gateway.grpc_authority is None:
        return ""
    context: dict[str, object] = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {
            "validation_context": {
                "trusted_ca": {"filename": str(gateway.grpc_authority)},
                **(
                    {
                        "match_typed_subject_alt_names": [
                            {"san_type": "DNS", "matcher": {"exact": gateway.grpc_name}},
                        ]
                    }
                    if gateway.grpc_name
                    else {}
                ),
            }
        },
        **({"sni": gateway.grpc_name} if gateway.grpc_name else {}),
    }
    socket = {"name": "envoy.transport_sockets.tls", "typed_config": context}
    return f"      transport_socket: {json.dumps(socket)}"


def deployed_yaml() -> str:
    """What deploy/envoy.yaml holds: a server named `chromarpc`, and all files in /etc/chromarpc."""
    folder = Path("/etc/chromarpc")
    gateway = Gateway(web_host="0.0.0.0", web_port=8080, grpc_host="chromarpc", grpc_port=50051)  # noqa: S104
    return envoy_yaml(
        gateway,
        descriptor=folder / "chromarpc.v1.binpb",
        page=folder / "page",
        description=folder / openapi.FILE.name,
    )
