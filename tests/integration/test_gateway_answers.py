"""What the gateway says by itself: other protocols, unknown paths, wrong methods, files that are known already."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import chromarpc
from chromarpc.v1 import model_service_pb2, model_service_pb2_grpc
from chromarpc_server.gateway.configuration import PAGE, deployed_yaml
from tests.conftest import RunningServer
from tests.integration.gateway_stand import Web, gateway_to, wait_until_served

LIST_MODELS = "/chromarpc.v1.ModelService/ListModels"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[Web]:
    with gateway_to(server.port, origins=("https://studio.example.org",)) as running:
        wait_until_served(running)
        yield running


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/proto",
        "application/connect+json",
        "application/connect+proto",
        "application/grpc-web+json",
        "text/plain",
        "x" * 500,
    ],
    ids=lambda text: text[:30],
)
def test_other_protocols_are_told_what_is_spoken(web: Web, content_type: str) -> None:
    for path in (LIST_MODELS, "/grpc.health.v1.Health/Check", "/chromarpc.v1.GenerationService/Generate"):
        answer = web.ask(path, b"{}", content_type=content_type, connect_protocol_version="1")
        assert (answer.status, answer.error["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE"), path
        assert content_type[:100] in answer.error["message"]
        assert "application/grpc-web+proto" in answer.error["message"]
        assert "/v1/inference" in answer.error["message"]
        assert answer.error["details"]["http_api"] == "/openapi.json"
        for kind in answer.headers["accept-post"].split(", "):
            told = web.ask(LIST_MODELS, b"\0" * 5, content_type=kind, te="trailers").headers
            assert "not spoken" not in told.get("grpc-message", "")


def test_what_is_spoken_is_served(web: Web, server: RunningServer) -> None:
    empty = b"\0" * 5
    for kind in ("application/grpc-web", "application/grpc-web+proto"):
        answer = web.ask(LIST_MODELS, empty, content_type=kind)
        assert answer.status == 200
        assert b"chroma-mini" in answer.body
    for kind in ("application/grpc-web-text", "application/grpc-web-text+proto"):
        answer = web.ask(LIST_MODELS, base64.b64encode(empty), content_type=kind, accept=kind)
        assert b"chroma-mini" in base64.b64decode(answer.body.split(b"=")[0] + b"==")
    with chromarpc.Client(web.url.removeprefix("http://")) as client:
        assert "chroma-mini" in [model.id for model in client.list_models()]


def test_grpc_without_what_grpc_needs_is_not_told_that_the_server_is_down(web: Web) -> None:
    headers = web.ask(LIST_MODELS, b"\0" * 5, content_type="application/grpc").headers
    assert (headers["grpc-status"], "te: trailers" in headers["grpc-message"]) == ("2", True)


def test_a_grpc_caller_is_refused_in_a_sentence() -> None:
    with gateway_to(1) as web, grpc.insecure_channel(web.url.removeprefix("http://")) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert caught.value.details() == "the server is starting, stopping or down; try again soon"  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/inference/", "/v1/models/", "/v1/requests/a/status/", "/v1/requests/a/result/x", "/v1/nothing", "/v2",
        "/health/", "/page.js/", "/docs", "/chromarpc.compat.v1.InferenceService/SubmitInference", "/foo.Bar/Baz",
    ],
)  # fmt: skip
def test_a_path_that_is_not_there_is_told_as_it_was_asked(web: Web, method: str, path: str) -> None:
    answer = web.ask(path, b"{}" if method in ("POST", "PUT", "PATCH") else None, method=method)
    assert answer.status == 404
    if method != "HEAD":
        error = {"code": "NOT_FOUND", "message": f"there is nothing at {method} {path}", "details": {}}
        assert answer.json == {"detail": {"error": error}}


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/inference", "POST"),
        ("/v1/requests/a/status", "GET"),
        ("/v1/requests/a/result", "GET"),
        ("/v1/requests/a/images/0", "GET"),
        ("/v1/models", "GET"),
        ("/health", "GET"),
        ("/openapi.json", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/page.js", "GET, HEAD"),
        (LIST_MODELS, "POST"),
    ],
)
def test_a_wrong_method_is_told_which_is_right(web: Web, path: str, allowed: str) -> None:
    for method in set(METHODS) - set(allowed.split(", ")):
        answer = web.ask(path, b"{}" if method in ("POST", "PUT", "PATCH") else None, method=method)
        assert (answer.status, answer.headers.get("allow")) == (405, allowed), method
        if method != "HEAD":
            assert answer.error["code"] == "METHOD_NOT_ALLOWED"
            assert answer.error["message"] == f"{method} is not for {path}"


def test_a_query_chooses_nothing_and_breaks_nothing(web: Web) -> None:
    assert web.ask("/v1/models?colour=red").status == 200
    assert web.ask("/health?x").status == 200
    answer = web.ask("/v1/requests/mine/status?request_id=other&colour=red")
    assert (answer.status, answer.error["details"]) == (404, {"request_id": "mine"})
    assert web.ask("/v1/inference?body.data=x", {}).error["code"] == "INVALID_PARAMETER"


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/models", "/v1/requests/a/result", LIST_MODELS])
def test_pages_of_other_origins_may_call_everything(web: Web, path: str) -> None:
    def allowed(origin: str) -> str | None:
        asked = {"origin": origin, "access_control_request_method": "POST"}
        return web.ask(path, method="OPTIONS", **asked).headers.get("access-control-allow-origin")

    assert allowed("https://studio.example.org") == "https://studio.example.org"
    assert allowed("https://elsewhere.example.org") is None


FILES = {
    "/": "page/index.html",
    "/page.js": "page/page.js",
    "/page.css": "page/page.css",
    "/icon.svg": "page/icon.svg",
    "/openapi.json": "openapi.json",
}


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_known_already_is_not_sent_again(web: Web, path: str) -> None:
    first = web.ask(path)
    assert first.status == 200
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers.get("etag", "")
    assert hashlib.sha256(first.body).hexdigest().startswith(tag[3:-1] or "no tag"), "the tag is the content's"
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', f'{tag},"other"', "*"):
        again = web.ask(path, if_none_match=known)
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag), known
        assert again.headers["cache-control"] == "no-cache"
        assert "location" not in again.headers
    for other in ('"other"', f"W/{tag[3:]}", tag[:-2] + '"', ""):
        assert web.ask(path, if_none_match=other).status == 200, other
    head = web.ask(path, method="HEAD")
    assert (head.status, head.body, head.headers["etag"]) == (200, b"", tag)
    packed = web.ask(path, accept_encoding="gzip")
    assert packed.headers["etag"] == tag, "compression keeps it"
    plain = gzip.decompress(packed.body) if packed.headers.get("content-encoding") == "gzip" else packed.body
    assert plain == first.body


def test_the_deployed_configuration_knows_the_files_as_they_are() -> None:
    folder = PAGE.parent
    text = (Path(__file__).parents[2] / "deploy/envoy.yaml").read_text()
    for file in FILES.values():
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()[:32]
        assert text.count(digest) == 2, f"{file}: run `make page`"
    assert text == deployed_yaml()
