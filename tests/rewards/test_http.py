"""The HTTP reward against a server on the loopback address."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hybrid_engine.config import JudgeConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rewards import Sample, build_rewards, http_reward

SAMPLES = [Sample(f"prompt {i}", "a" * i, [], [], True) for i in range(3)]


@pytest.fixture
def server(monkeypatch):
    """Answers each request with the next of ``server.answers`` (the last one for ever): (status,
    body).
    """
    monkeypatch.setattr(http_reward, "FIRST_WAIT", 0.0)
    monkeypatch.setenv(
        "http_proxy", "http://127.0.0.1:9"
    )  # must not be asked for a loopback address

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append(json.loads(body))
            status, answer = server.answers[min(len(server.requests), len(server.answers)) - 1]
            if status is None:  # hang up without an answer, or do not answer at all
                if answer is not None:
                    answer.wait()
                self.close_connection = True
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, timeout=30.0, retries=2):
    config = JudgeConfig(rewards=(f"{server.url}*2",), http_timeout=timeout, http_retries=retries)
    return build_rewards(config)(SAMPLES)


def test_prompts_and_completions_go_out_and_rewards_come_back(server):
    server.answers = [(200, '{"rewards": [1, 2.5, -1]}')]
    scores = ask(server)
    assert server.requests == [
        {"prompts": ["prompt 0", "prompt 1", "prompt 2"], "completions": ["", "a", "aa"]}
    ]
    assert scores.total == [2.0, 5.0, -2.0]
    assert list(scores.parts) == [server.url.removeprefix("http://")]


@pytest.mark.parametrize(
    "first", [(503, "busy"), (429, ""), (None, None)], ids=["503", "429", "hang up"]
)
def test_a_passing_failure_is_tried_again(server, first):
    server.answers = [first, first, (200, '{"rewards": [0, 0, 0]}')]
    assert ask(server).total == [0.0, 0.0, 0.0]
    assert len(server.requests) == 3


def test_a_lasting_failure_is_reported(server):
    server.answers = [(500, "out of memory")]
    with pytest.raises(UserError) as error:
        ask(server)
    assert str(error.value) == (
        f"reward {server.url} failed 3 times (status 500: out of memory); "
        "check that the server is up, or raise judge.http_timeout or judge.http_retries"
    )
    assert len(server.requests) == 3


def test_a_refusal_is_not_repeated(server):
    server.answers = [(404, "no such path")]
    with pytest.raises(UserError, match="answered with status 404: no such path"):
        ask(server)
    assert len(server.requests) == 1


def test_a_silent_server_times_out(server):
    release = threading.Event()
    server.answers = [(None, release)]
    try:
        with pytest.raises(
            UserError, match=r"failed 2 times \(.*(no answer within 0\.2 s|timed out)\)"
        ):
            ask(server, timeout=0.2, retries=1)
    finally:
        release.set()


def test_a_server_that_is_not_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"failed 1 times \(.*Connection refused\)"):
        ask(server, retries=0)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<html>", "answered with no JSON but '<html>'"),
        ("[1, 2, 3]", "answered without 'rewards'"),
        ('{"scores": []}', "answered without 'rewards'"),
        ('{"rewards": [1, 2]}', "returned 2 scores for 3 samples"),
        ('{"rewards": [1, NaN, 3]}', r"returned nan for sample 1 \(prompt: 'prompt 1'\)"),
        ('{"rewards": [1, "x", 3]}', r"returned a str \('x'\) for sample 1"),
        ('{"rewards": {}}', "returned dict; return a list"),
    ],
)
def test_answers_that_are_no_scores(server, body, problem):
    server.answers = [(200, body)]
    with pytest.raises(UserError, match=problem):
        ask(server)


def test_a_url_without_a_host():
    with pytest.raises(UserError, match="names no host"):
        build_rewards(JudgeConfig(rewards=("http:///score",)))
