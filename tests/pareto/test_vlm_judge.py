"""VLMJudge against real servers on this machine: what it sends, what it reads, and that its key stays secret."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from rsaft.errors import ConfigError
from rsaft.metrics import image_grid
from rsaft.pareto import AgentState, Context, DecisionAgent, Verdict, VLMJudge
from rsaft.pareto.agent import audit_line
from rsaft.pareto.chat import LONGEST_ANSWER
from rsaft.pareto.context import JudgeError
from rsaft.pareto.vlm_judge import png, verdict_of

SECRET = "sk-a1b2c3d4e5f6g7h8"
ACTIVE = ("clip", "hpsv2", "ict")


def context(n: int = 4, side: int = 16) -> Context:
    generator = torch.Generator().manual_seed(0)
    now, base = torch.rand(2, n, 3, side, side, generator=generator)
    return Context(200, ACTIVE, removed=("hp",), prompts=("a cat",) * n, images=now, base_images=base)


def reply(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


GOOD = reply("All is well.\nAction: [Continue] Strategy: [Offline]")


@dataclass
class Server:
    """Gives the answers in turn, the last one for ever, and keeps what it was asked."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving(
    *answers: tuple[int, bytes], trickle: float = 0.0, headers: dict[str, str] | None = None
) -> Iterator[Server]:
    left, asked = list(answers), Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            asked.paths.append(self.path)
            asked.keys.append(self.headers["Authorization"])
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status, headers.get("reason") if headers else None)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                if not trickle:
                    self.wfile.write(body)
                    return
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    self.wfile.flush()
                    time.sleep(trickle)
            except OSError:  # the judge has hung up
                pass

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    asked.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def judge(server: Server, **settings: object) -> VLMJudge:
    return VLMJudge(server.url, "some-model", **{"retries": 1, "backoff": 0.01, "timeout": 5.0, **settings})


def decoded(part: dict) -> Image.Image:
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_one_request_holds_both_grids_the_signatures_and_where_the_run_stands():
    with serving((200, GOOD)) as server:
        verdict = judge(server, extra={"temperature": 0.0, "seed": 3})(context())
    assert verdict == Verdict(False, analysis="All is well.\nAction: [Continue] Strategy: [Offline]")
    assert server.paths == ["/v1/chat/completions"]
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["seed"]) == ("some-model", 0.0, 3)
    parts = body["messages"][0]["content"]
    pictures = [decoded(part) for part in parts if part["type"] == "image_url"]
    for picture, images in zip(pictures, (context().base_images, context().images), strict=True):
        grid = image_grid(images, columns=4)
        on_white = Image.alpha_composite(Image.new("RGBA", grid.size, "white"), grid).convert("RGB")
        assert picture.tobytes() == on_white.tobytes()
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    assert "Step 200. Strategy: offline.\nRemoved so far: hp." in text
    assert "- clip: texture pixelation" in text
    assert "- hpsv2: severe over-saturation" in text
    assert "edges" not in text  # the signature of hp, which is not in training


def test_templates_and_examples_are_the_users_own(tmp_path: Path):
    Image.new("RGB", (3000, 10), "red").save(tmp_path / "clip.png")
    Image.new("RGB", (10, 10), "blue").save(tmp_path / "hp.png")
    own = {"templates": {"CLIP": "all is red"}, "examples": {"clip": tmp_path / "clip.png", "hp": tmp_path / "hp.png"}}
    with serving((200, GOOD)) as server:
        judge(server, **own)(context())
    parts = server.bodies[0]["messages"][0]["content"]
    pictures = [decoded(part) for part in parts if part["type"] == "image_url"]
    assert [picture.getpixel((0, 0)) for picture in pictures].count((255, 0, 0)) == 1
    assert len(pictures) == 3  # hp is not in training
    assert pictures[1].size == (1024, 3)
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    assert "- clip: all is red\n- hpsv2: not known" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Action: [Remove hpsv2] Strategy: [Offline]", (True, "hpsv2", False)),
        ("Action: Remove hpsv2 Strategy: Offline", (True, "hpsv2", False)),
        ("**Action: [Remove HPSv2] Strategy: [Online]**", (True, "hpsv2", False)),
        ("Action: [Remove <clip>] Strategy: [Offline]", (True, "clip", False)),
        ("Action: [Remove nobody] Strategy: [Offline]", (True, "nobody", False)),
        ("Action: [Revert] Strategy: [Offline]", (True, None, False)),
        ("Action: [Continue] Strategy: [Offline]", (False, None, False)),
        ("  Action: [continue] Strategy: [online].", (False, None, True)),
        ("Action: [Continue] Strategy: [Offline]\r\nAction: [Continue] Strategy: [Offline]", (False, None, False)),
        ("Action: [Remove <name>|Revert|Continue] Strategy: [Offline|Online]", None),
        ("Action: [Explode] Strategy: [Offline]", None),
        ("Action: [Remove] Strategy: [Offline]", None),
        ("Action: [Remove clip and ict] Strategy: [Offline]", None),
        ("Action: [Continue] Strategy: [Sideways]", None),
        ("Action: [Continue]", None),
        ("I would say Action: [Continue] Strategy: [Offline]", None),
        ("Action: [Continue] Strategy: [Offline]\nAction: [Revert] Strategy: [Offline]", None),
        ("", None),
    ],
)
def test_only_one_unambiguous_line_of_the_form_is_an_answer(line: str, expected: tuple | None):
    verdict = verdict_of(f"I looked closely.\n{line}\n", ACTIVE)
    assert (verdict and (verdict.breakdown, verdict.reward, verdict.stagnant)) == expected


def test_reading_a_long_reply_takes_no_time():
    began = time.monotonic()
    assert verdict_of("* " * 500_000 + "\n" + "Action: " * 100_000, ACTIVE) is None
    assert time.monotonic() - began < 2


def test_an_unknown_reward_makes_the_agent_revert_and_remove_nothing():
    with serving((200, reply("Action: [Remove nobody] Strategy: [Offline]"))) as server:
        agent = DecisionAgent(judge(server), weak=("clip",))
        decision = agent.decide(AgentState(ACTIVE), context())
    assert (decision.action, decision.state.active) == ("revert", ACTIVE)
    assert "'nobody'" in decision.reason


@pytest.mark.parametrize(
    "unreadable",
    [
        reply("I cannot say."), reply("Action: [Explode] Strategy: [Offline]"), reply(None), reply(3), b"<html>", b"",
        b'{"choices": []}', b"[" * 50_000, b"\xff\xfe", GOOD + b" " * LONGEST_ANSWER,
    ],
    ids=["no line", "wrong action", "null", "number", "html", "empty", "no choice", "deep", "no utf-8", "huge"],
)  # fmt: skip
def test_a_reply_that_cannot_be_read_is_asked_for_once_more_and_then_the_check_passes(unreadable: bytes):
    with serving((200, unreadable)) as server:
        verdict = judge(server)(context())
    assert (verdict.breakdown, verdict.stagnant, verdict.confidence) == (False, False, 0.0)
    assert "No reply could be read" in verdict.analysis
    assert len(server.bodies) == 2
    first, second = (body["messages"][0]["content"] for body in server.bodies)
    assert second[:-1] == first
    assert "no line of this form" in second[-1]["text"]


def test_the_second_reply_counts_if_it_can_be_read():
    with serving((200, b"{"), (200, reply("Action: [Remove clip] Strategy: [Offline]"))) as server:
        assert judge(server)(context()).reward == "clip"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_tried_again(status: int):
    with serving((status, b"later"), (200, GOOD)) as server:
        assert not judge(server)(context()).breakdown
    assert len(server.bodies) == 2


def test_after_the_last_try_the_error_says_what_was_wrong():
    with serving((500, b"out of memory")) as server:
        with pytest.raises(
            JudgeError, match=r"no answer in 2 tries, the last one: 500 .*: out of memory; is it running"
        ):
            judge(server)(context())
        assert len(server.bodies) == 2
    with pytest.raises(JudgeError, match="no answer in 1 tries"):
        judge(server, retries=0)(context())  # gone by now


def test_a_refused_request_is_not_sent_again():
    with serving((400, b"no such model")) as server:
        with pytest.raises(JudgeError, match=r"refused the request, 400 .*no such model"):
            judge(server)(context())
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_sends_its_answer_byte_by_byte_is_given_up(status: int):
    began = time.monotonic()
    with serving((status, GOOD * 20), trickle=0.02) as server:
        with pytest.raises(JudgeError, match="no answer in 1 tries"):
            judge(server, timeout=0.3, retries=0)(context())
    assert time.monotonic() - began < 3


def test_a_server_that_never_answers_is_given_up():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match="timed out"):
            VLMJudge(url, "m", timeout=0.2, retries=0)(context())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"nonsense\r\n\r\n", "the last one: nonsense"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", "broke off"),
        (b"", "closed connection"),
    ],
)
def test_a_server_that_breaks_off_or_speaks_no_http_does_not_answer(line: bytes, sentence: str):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as broken:

        def speak() -> None:
            connection, _ = broken.accept()
            with connection:
                connection.settimeout(0.2)
                with suppress(TimeoutError):  # read it all: to hang up before would be a reset
                    while connection.recv(2**16):
                        pass
                connection.sendall(line)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{broken.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match=f"no answer in 1 tries, .*{sentence}"):
            VLMJudge(url, "m", timeout=2.0, retries=0)(context())
        thread.join()


def everything_said(call: Callable[[], object], caplog: pytest.LogCaptureFixture) -> str:
    """The result or the whole traceback with all chained errors and their locals, and all that was logged."""
    caplog.set_level(logging.DEBUG)
    try:
        said = repr(call())
    except Exception as error:
        chain, link = [], error
        while link is not None:
            chain.append(repr(vars(link)) + repr(link.args))
            link = link.__cause__ or link.__context__
        said = "".join(traceback.format_exception(error)) + "".join(chain)
    return said + caplog.text


ECHO = f"you sent Bearer {SECRET}".encode()


@pytest.mark.parametrize(
    "answers",
    [
        [(200, reply(f"Your key is {SECRET}.\nAction: [Remove {SECRET}] Strategy: [Offline]"))],
        [(200, reply(f"Your key is {SECRET}."))],
        [(401, ECHO)],
        [(401, b"x" * 158 + ECHO)],  # cut off in the middle of the key, where a message ends
        [(500, ECHO)],
        [(200, ECHO)],
    ],
)
def test_the_key_goes_to_the_server_and_nowhere_else(answers, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", f" {SECRET}\n")
    with serving(*answers) as server:
        asking = judge(server, key_variable="JUDGE_KEY")
        agent = DecisionAgent(asking, weak=ACTIVE)
        said = repr(asking) + everything_said(lambda: audit_line(agent.decide(AgentState(ACTIVE), context())), caplog)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    everything = said + "".join(capfd.readouterr())
    assert SECRET[:8] not in everything
    assert SECRET not in json.dumps(server.bodies)


def test_a_key_in_the_servers_reason_is_blotted_out(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with serving((403, b""), headers={"reason": f"no {SECRET}"}) as server:
        said = everything_said(lambda: judge(server, key_variable="JUDGE_KEY")(context()), caplog)
    assert "403 no ***" in said
    assert SECRET not in said


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_for_it_would_carry_the_key_elsewhere(status: int, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with serving((200, GOOD)) as elsewhere:
        with serving((status, b""), headers={"Location": f"{elsewhere.url}/chat/completions"}) as server:
            with pytest.raises(JudgeError, match=f"refused the request, {status}"):
                judge(server, key_variable="JUDGE_KEY")(context())
        assert elsewhere.bodies == []


@pytest.mark.parametrize("value", ["", "  ", "two words", "schlüssel", "a\nb", "a\x00b"])
def test_a_key_that_cannot_be_sent_is_refused_without_quoting_it(value: str, monkeypatch):
    if "\x00" in value:
        monkeypatch.setattr("os.environ", {"JUDGE_KEY": value})
    else:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="environment variable 'JUDGE_KEY'") as raised:
        VLMJudge("http://127.0.0.1:1", "m", key_variable="JUDGE_KEY")(context())
    assert not value.strip() or value not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1", "host/v2", "http://", "http://user:pw@host/v1", "http://host/v1?key=abc", "http://host/#abc",
        "http://host:port/v1", "http://ho st/v1", "http://host/v1\r\nX: y", "http://häuser/v1", "",
    ],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_quoting_it(url: str):
    with pytest.raises(ConfigError, match="url: ") as raised:
        VLMJudge(url, "m")
    assert not url or url not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_images": 0}, "max_images is at least 1"),
        ({"max_side": 63}, "max_side at least 64"),
        ({"timeout": 0.0}, "timeout above 0"),
        ({"retries": -1}, "retries and backoff are at least 0"),
        ({"examples": {"clip": Path("nowhere.png")}}, r"no file 'nowhere.png' \(clip\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        VLMJudge("http://host/v1", "m", **settings)


def test_what_it_cannot_look_at_is_refused(tmp_path: Path):
    broken = tmp_path / "clip.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="the context has none"):
        VLMJudge("http://host/v1", "m")(Context(100, ACTIVE))
    with pytest.raises(ConfigError, match="is no picture"):
        VLMJudge("http://host/v1", "m", examples={"clip": broken})(context())


def test_a_picture_is_scaled_down_until_it_fits():
    noise = Image.fromarray(torch.randint(256, (600, 900, 3), dtype=torch.uint8).numpy())
    sizes = {}
    for mib in (4.0, 0.3, 0.05):
        data = png(noise, 512, mib)
        assert len(data) <= mib * 2**20
        sizes[mib] = Image.open(io.BytesIO(data)).size
    assert sizes[4.0] == (512, 341)
    assert sizes[4.0] > sizes[0.3] > sizes[0.05]
    with pytest.raises(ConfigError, match="max_mib: a picture of"):
        png(noise, 512, 1e-4)


def test_only_the_first_images_are_sent():
    with serving((200, GOOD)) as server:
        judge(server, max_images=2)(context(n=9))
    pictures = [decoded(part) for part in server.bodies[0]["messages"][0]["content"] if part["type"] == "image_url"]
    assert [picture.size for picture in pictures] == [(34, 16)] * 2  # two tiles of 16, and a gap of 2
