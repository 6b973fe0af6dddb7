"""RemoteReward against the example's server, and against servers that misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from examples.reward_server import LONGEST_REQUEST, server
from examples.rewards import Colourfulness
from rsaft.errors import ConfigError, RewardError
from rsaft.rewards import RemoteReward

PROMPTS = ["a cat", "häuser", ""]


@contextmanager
def running(listening: HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def answering(*answers: tuple[int, bytes], seen: list[int] | None = None) -> HTTPServer:
    """A server that gives these answers in turn, the last one for ever; `seen` gets each request's length."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.rfile.read(length)
            if seen is not None:
                seen.append(length)
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    return HTTPServer(("127.0.0.1", 0), Handler)


def images(b: int = 3) -> torch.Tensor:
    return torch.rand(b, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def length_of_prompt(x: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return x.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


def test_raw_tensors_are_scored_as_here():
    with running(server(length_of_prompt, 0)) as url:
        scores = RemoteReward(url, encoding="raw")(images(), PROMPTS)
    assert torch.equal(scores, length_of_prompt(images(), PROMPTS))
    assert not scores.requires_grad


def test_png_is_scored_as_the_image_in_8_bits():
    rounded = (images() * 255).round() / 255
    with running(server(Colourfulness(), 0)) as url:
        scores = RemoteReward(url)(images(), PROMPTS)
    torch.testing.assert_close(scores, Colourfulness()(rounded, PROMPTS), rtol=1e-6, atol=0)
    assert not torch.equal(scores, Colourfulness()(images(), PROMPTS))


def test_values_outside_of_0_to_1_are_cut_off_in_png():
    with running(server(length_of_prompt, 0)) as url:
        scores = RemoteReward(url)(torch.full((1, 3, 4, 4), 1.7), [""])
    assert scores.tolist() == [1.0]


def test_more_than_fits_goes_in_several_requests_in_order():
    seen: list[int] = []
    one = 3 * 8 * 6 * 4 * 4 / 3 / 2**20
    with running(answering((200, b'{"scores": [1, 2]}'), (200, b'{"scores": [3]}'), seen=seen)) as url:
        scores = RemoteReward(url, encoding="raw", max_mib=2.5 * one)(images(), PROMPTS)
    assert scores.tolist() == [1, 2, 3]
    assert len(seen) == 2


def test_a_broken_or_busy_server_is_tried_again():
    with running(answering((503, b""), (429, b""), (200, b'{"scores": [0.5]}'))) as url:
        assert RemoteReward(url, retries=2, backoff=0.01)(images(1), [""]).tolist() == [0.5]


def test_after_the_last_try_the_error_says_what_was_wrong():
    with running(answering((500, b"out of memory"))) as url:
        with pytest.raises(RewardError, match=r"no answer in 2 tries, the last one: 500 .*: out of memory"):
            RemoteReward(url, retries=1, backoff=0.01)(images(1), [""])
    with pytest.raises(RewardError, match=r"no answer in 1 tries, .* is it running"):
        RemoteReward(url, retries=0)(images(1), [""])  # gone by now


def test_a_refused_request_is_not_sent_again():
    seen: list[int] = []
    with running(answering((400, b"no such prompt"), seen=seen)) as url:
        with pytest.raises(RewardError, match=r"refused the request, 400 .*: no such prompt"):
            RemoteReward(url)(images(1), [""])
    assert len(seen) == 1


class NoHTTP(BaseHTTPRequestHandler):
    """Reads the request, and answers something that is no HTTP."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"hello\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None: ...


def test_an_answer_that_is_no_http_is_one_sentence():
    with running(HTTPServer(("127.0.0.1", 0), NoHTTP)) as url:
        with pytest.raises(RewardError, match="no answer in 2 tries, the last one: hello"):
            RemoteReward(url, retries=1, backoff=0.0)(images(), PROMPTS)


def test_a_server_that_never_answers_is_given_up():
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            release.wait(10)

        def log_message(self, format: str, *args: object) -> None: ...

    with running(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        with pytest.raises(RewardError, match="timed out"):
            RemoteReward(url, timeout=0.2, retries=0)(images(1), [""])
        release.set()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"<html>", "answered b'<html>'"),
        (b'{"score": [1]}', "is asked for"),
        (b'{"scores": ["good"]}', "is asked for"),
        (b'{"scores": [1, 2]}', "gave 2 scores for 1 images"),
        (b" " * (2**20 + 65), "longer than 1048640 bytes"),
    ],
)
def test_an_answer_of_another_form_is_refused(answer: bytes, sentence: str):
    with running(answering((200, answer))) as url:
        with pytest.raises(RewardError, match=sentence):
            RemoteReward(url)(images(1), [""])


def test_scores_that_are_not_finite_come_through_to_be_masked():
    with running(answering((200, b'{"scores": [NaN, Infinity, 1]}'))) as url:
        assert RemoteReward(url)(images(), PROMPTS).isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"url": "ftp://host"}, "begins with http:// or https://; got 'ftp://host'"),
        ({"url": "http://host", "timeout": 0.0}, "timeout and max_mib are above 0"),
        ({"url": "http://host", "retries": -1}, "retries and backoff at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        RemoteReward(**settings)


def test_an_image_larger_than_a_request_may_be_is_refused_before_it_is_sent():
    with pytest.raises(ConfigError, match=r"max_mib: an image of .* raise max_mib"):
        RemoteReward("http://127.0.0.1:1", max_mib=1e-6)(images(1), [""])


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"prompts": ["a"]}', b'{"prompts": ["a"], "images": ["no base64"]}', b'{"prompts": [1], "images": 3}'],
)
def test_the_servers_own_refusal_says_why(body: bytes):
    import urllib.error
    import urllib.request

    with running(server(length_of_prompt, 0)) as url:
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(urllib.request.Request(url, body), timeout=10)
        assert raised.value.code == 400
        assert "cannot be read" in json.loads(raised.value.read())["error"]


def test_the_server_reads_no_request_without_bound():
    import http.client

    with running(server(length_of_prompt, 0)) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", str(LONGEST_REQUEST + 1))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
