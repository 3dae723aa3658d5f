"""Who is answered: keys, hosts, web sites; and the ids of requests."""

import openai
import pytest

from atom_jax.errors import AtomError
from atom_jax.server.guard import access_log
from tests.atom_jax.server.fake import config, until


@pytest.fixture
def server(serve):
    return serve()


def complete(server, **changes):
    return server.client.completions.create(**{"model": "tiny", "prompt": [5, 6]} | changes)


class TestAccess:
    def test_keys(self, serve):
        server = serve(api_keys=("hunter2", "schlüssel"))
        assert complete(server).choices[0].text
        for key in ("Bearer hunter2", "bearer hunter2", "BEARER  hunter2", "Bearer schlüssel"):
            answer = server.http.get("/v1/models", headers={"Authorization": key.encode()})
            assert answer.status_code == 200
        for key in (
            None,
            "Bearer hunter3",
            "hunter2",
            "Basic hunter2",
            "Bearer",
            "Bearer é",
            "Bearer hunter2,",
        ):
            headers = {} if key is None else {"Authorization": key.encode()}
            for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/detokenize")):
                answer = server.http.request(method, path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert server.http.get("/health").status_code == 200

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("example.com", 200),
            ("EXAMPLE.com:8000", 200),
            ("a.b.example.org", 200),
            ("example.org", 421),
            ("badexample.com", 421),
            ("evil.test", 421),
            ("", 421),
            ("[::1]:80", 200),
        ],
    )
    def test_hosts(self, serve, host, status):
        server = serve(allowed_hosts=("example.com", "*.example.org", "[::1]"))
        for path in ("/health", "/v1/models", "/"):
            assert server.http.get(path, headers={"host": host}).status_code == status

    def test_origins(self, serve):
        server = serve(allowed_origins=("https://example.com",), api_keys=("hunter2",))
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (("https://example.com", "https://example.com"), ("https://evil.test", None)):
            answer = server.http.options("/v1/completions", headers={"Origin": origin, **asked})
            assert answer.headers.get("access-control-allow-origin") == allowed
            answer = server.http.post("/v1/completions", headers={"Origin": origin})
            assert answer.status_code == 401
            assert answer.headers.get("access-control-allow-origin") == allowed
        answer = serve().http.get("/v1/models", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in answer.headers

    def test_wrong_settings(self):
        for name, value in (
            ("api_keys", ("",)),
            ("allowed_hosts", ("a*.com",)),
            ("allowed_hosts", ("",)),
            ("allowed_origins", ("example.com",)),
            ("allowed_origins", ("https://example.com/",)),
            ("head_timeout", 0),
            ("max_connections", 0),
        ):
            with pytest.raises(AtomError):
                config(**{name: value})


class TestRequestIds:
    def test_they_are_echoed_or_made_and_logged(self, server, caplog, monkeypatch):
        monkeypatch.setattr(access_log, "propagate", True)
        caplog.set_level("INFO", access_log.name)
        answer = server.http.get("/health?a=%0Ab", headers={"X-Request-Id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        made = [server.http.get("/v1/none").headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2 and all(len(each) == 32 for each in made)
        until(lambda: any(made[1] in line for line in caplog.messages))
        first, second, _ = dict.fromkeys(caplog.messages)
        assert 'GET /health" 200' in first and first.endswith("request mine-1")
        assert '/v1/none" 404' in second and second.endswith(f"request {made[0]}")

    @pytest.mark.parametrize("bad", ["", "a b", "a" * 129, "é"])
    def test_what_is_no_id_is_not_repeated(self, server, bad):
        answer = server.http.get("/health", headers={"X-Request-Id": bad.encode()})
        assert len(answer.headers["x-request-id"]) == 32

    def test_the_client_sees_it_with_an_answer_an_error_and_a_stream(self, server):
        assert complete(server)._request_id
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, max_tokens=0)
        assert caught.value.request_id
        headers = {"X-Request-Id": "mine"}
        body = {"model": "tiny", "prompt": [1], "stream": True}
        assert (
            server.http.post("/v1/completions", json=body, headers=headers).headers["x-request-id"] == "mine"
        )


def test_only_files_of_the_page_are_served(serve):
    http = serve().http
    assert http.get("/static/page.js").headers["content-type"].startswith("text/javascript")
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/", "/static/none.js"):
        assert http.get(path).status_code in (404, 405), path
