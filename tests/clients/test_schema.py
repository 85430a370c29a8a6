"""What schemathesis makes up from /openapi.json: right and wrong requests, none of which may break the server."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from talks import NAME

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode, checks  # noqa: E402

KEY = {"Authorization": "Bearer key"}
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/tokenizer_info", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
]


@pytest.fixture(scope="module")
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_schema_has_all_that_is_offered(api):
    assert {(op.ok().path, op.ok().method.upper()) for op in api.get_all_operations()} == {*OPERATIONS}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda x: x.strip("/"))
def test_no_request_breaks_the_server(api, path, method, mode):
    if mode is GenerationMode.NEGATIVE and method == "GET" and "{" not in path:
        pytest.skip("there is nothing to be wrong")
    n, answers = 120 if method == "POST" else 5, []

    @settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # every other name is only unknown
        answers.append(case.call_and_validate(headers=KEY, timeout=60, checks=CHECKS).status_code)

    check()
    if mode is GenerationMode.POSITIVE and "{" not in path:
        assert answers.count(200) >= len(answers) / 4, answers


def test_nothing_of_it_is_left_in_the_server(url):
    body = {"prompt": "a", "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=60).status_code == 200
    said = httpx.get(f"{url}/metrics", headers=KEY).text
    for line in ("dsjax_failed_steps_total 0.0", "dsjax_requests_running 0.0", "dsjax_cache_used_ratio 0.0"):
        assert line in said
