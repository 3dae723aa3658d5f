"""The OpenAPI schema, and what the server does with hundreds of requests made from it."""

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from atom_jax.server.app import create_app
from atom_jax.server.service import Service
from tests.atom_jax.server.fake import FakeEngine, config, running, served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/live"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def schema(tokenizer):
    with running(Service(config(), FakeEngine(num_pages=64), served(tokenizer))) as (url, _):
        document = httpx.get(f"{url}/openapi.json").json()
        for each in document["components"]["schemas"].values():
            if "model" in each["properties"]:  # otherwise most answers would be 404
                optional = "model" not in each.get("required", ())
                each["properties"]["model"] = {"enum": ["tiny", None] if optional else ["tiny"]}
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=url)
        yield schema


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_requests_made_from_the_schema(schema, method, path, mode):
    """Also such as the schema does not allow. Each response has a documented status and form."""
    operation = schema[path][method]
    if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("without a body there is nothing wrong to send")

    @hypothesis.settings(
        max_examples=60 if method == "POST" else 5,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        database=None,
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        checks = (
            [*CHECKS, negative_data_rejection] if mode is schemathesis.GenerationMode.NEGATIVE else CHECKS
        )
        case.call_and_validate(checks=checks)

    check()


def test_all_routes_are_tried(schema):
    assert {(r.ok().method.upper(), r.ok().path) for r in schema.get_all_operations()} == set(ROUTES)


def test_documented_errors(tokenizer):
    app = create_app(Service(config(), FakeEngine(), served(tokenizer)))
    document = app.openapi()
    for method, path in ROUTES:
        responses = document["paths"][path][method.lower()]["responses"]
        assert "422" not in responses
        if method == "POST":
            assert {"400", "401", "404", "408", "413", "415", "429", "503", "504"} <= responses.keys()
        for status, response in responses.items():
            if int(status) >= 400 and (path, status) not in {("/health", "503"), ("/live", "503")}:
                reference = response["content"]["application/json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/ApiErrorBody"
    assert document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False
