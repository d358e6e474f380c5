"""schemathesis over the OpenAPI description: whatever fits it or nearly does, no reply is a 5xx and every one is as described."""

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.serving.serving_cases import READY, engine_of, listening
from yojo.rewards.openrlhf_server import Queries
from yojo.serving.app import create_app
from yojo.serving.settings import Limits, Settings

# A group that does not become whole ends soon: nobody sends the rest of it.
SETTINGS = Settings(group_size=1, group_deadline=0.05, limits=Limits(url_seconds=1.0))
SCHEMA = schemathesis.openapi.from_dict(create_app(engine_of(SETTINGS), SETTINGS).openapi())
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
QUICK = hypothesis.settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def url():
    """Address of a server whose workers are threads of this process."""
    with listening(engine_of(SETTINGS), policy=Queries(eos=["</s>"], prompt="text")) as server:
        yield server.url


def check(case, url):
    """Send a case and look at its reply. Of JSON that does not fit the description none is accepted; in a form all is text."""
    refused = [] if case.media_type == "multipart/form-data" else [checks.negative_data_rejection]
    case.validate_response(case.call(base_url=url, timeout=READY), checks=CHECKS + refused)


@SCHEMA.parametrize()
@QUICK
def test_every_reply_is_as_described(case, url):
    check(case, url)


@pytest.mark.soak
@SCHEMA.parametrize()
@hypothesis.settings(QUICK, max_examples=500)
def test_every_reply_is_as_described_at_length(case, url):
    check(case, url)
