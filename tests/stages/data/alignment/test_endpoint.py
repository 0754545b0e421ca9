import time

import pytest

from ropewalk.stages.data.alignment.endpoint import CallFailedError, Endpoint, EndpointSettings, Tally

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.0, "max_tokens": 5}


@pytest.fixture
def endpoint(server):
    def build(**settings):
        values = {"url": server.url, "backoff_seconds": 0.01, "timeout_seconds": 5, "num_attempts": 4, **settings}
        return Endpoint(EndpointSettings(**values), Tally())

    return build


def test_a_request_is_sent_as_it_is_and_answered(endpoint, server):
    client = endpoint(key="s3cret")
    completion = client.complete(REQUEST)
    assert completion.model_dump() == {
        "text": "answer 5", "finish_reason": "stop", "num_prompt_tokens": 7, "num_completion_tokens": 3,
    }  # fmt: skip
    assert server.bodies == [REQUEST]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert client._tally.counts["num_requests"] == 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (429, "status_429"),
        (500, "status_5xx"),
        (503, "status_5xx"),
        (408, "status_408"),
        ("garbage", "garbage"),
        ("no_choice", "garbage"),
        ("hang_up", "no_connection"),
        ("slow", "timeout"),
    ],
)
def test_failures_that_pass_are_tried_again_and_counted(endpoint, server, fault, cause):
    server.faults = [fault, fault]
    client = endpoint(timeout_seconds=0.2)
    assert client.complete(REQUEST).text == "answer 5"
    assert client._tally.counts[f"num_retries_{cause}"] == 2
    assert client._tally.counts["num_requests"] == server.num_requests == 3


def test_tries_are_bounded(endpoint, server):
    server.faults = [500] * 10
    with pytest.raises(CallFailedError, match="status_5xx after 4 attempts"):
        endpoint().complete(REQUEST)
    assert server.num_requests == 4


def test_nobody_at_home_fails_the_call_after_its_tries():
    client = Endpoint(EndpointSettings(url="http://127.0.0.1:9/v1", backoff_seconds=0.001, num_attempts=3), Tally())
    with pytest.raises(CallFailedError, match="no_connection after 3 attempts"):
        client.complete(REQUEST)


def test_the_server_may_ask_for_more_patience_than_the_backoff(endpoint, server):
    server.faults = [(429, "0.4"), (503, "nonsense")]
    started = time.perf_counter()
    endpoint().complete(REQUEST)
    assert 0.4 <= time.perf_counter() - started < 2


def test_the_backoff_doubles(endpoint, server):
    server.faults = [500] * 3
    started = time.perf_counter()
    endpoint(backoff_seconds=0.05).complete(REQUEST)
    assert 0.35 <= time.perf_counter() - started < 2


def test_a_bad_request_fails_its_call_at_once(endpoint, server):
    server.faults = [400]
    with pytest.raises(CallFailedError, match="answers 400"):
        endpoint().complete(REQUEST)
    assert server.num_requests == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_would_fail_every_call_stops_the_step_and_gives_nothing_away(endpoint, server, status):
    server.faults = [status]
    with pytest.raises(ValueError, match=f"answers {status}: check ROPEWALK_CHAT_") as error:
        endpoint(key="s3cret").complete(REQUEST)
    assert not any(secret in str(error.value) for secret in ("s3cret", "127.0.0.1", "secret-host"))


def test_closing_ends_the_wait_for_another_try(endpoint, server):
    import threading

    server.faults = [(429, "100")]
    client = endpoint()
    threading.Timer(0.2, client.close).start()
    started = time.perf_counter()
    with pytest.raises(CallFailedError, match="stopped"):
        client.complete(REQUEST)
    assert time.perf_counter() - started < 5


def test_settings_come_from_the_environment(monkeypatch):
    with pytest.raises(ValueError, match="set ROPEWALK_CHAT_URL"):
        EndpointSettings.from_environment()
    monkeypatch.setenv("ROPEWALK_CHAT_URL", "http://host/v1/")
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "3")
    monkeypatch.setenv("ROPEWALK_CHAT_TIMEOUT_SECONDS", "2.5")
    settings = EndpointSettings.from_environment()
    assert settings == EndpointSettings("http://host/v1", None, 3, 2.5, 6, 0.01)
    for name, value in [("THREADS", "0.5"), ("ATTEMPTS", "x"), ("BACKOFF_SECONDS", "-1"), ("TIMEOUT_SECONDS", "nan")]:
        with monkeypatch.context() as patch:
            patch.setenv(f"ROPEWALK_CHAT_{name}", value)
            with pytest.raises(ValueError, match=f"ROPEWALK_CHAT_{name} must be a positive number"):
                EndpointSettings.from_environment()
