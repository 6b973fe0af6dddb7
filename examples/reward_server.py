"""A reward over HTTP, for `rsaft.rewards.RemoteReward`: run it in the environment that the reward needs.

    python -m examples.reward_server examples.rewards:Colourfulness --port 8700

    rewards:
      colour: {type: remote, url: "http://127.0.0.1:8700"}

It listens on this machine's own address alone and knows no passwords: for another machine, tunnel the port.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LONGEST_REQUEST = 256 * 2**20  # bytes


def server(reward: Callable[[Tensor, Sequence[str]], Tensor], port: int) -> HTTPServer:
    """A server for one reward, one request at a time; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if length > LONGEST_REQUEST:
                return self.answer(413, {"error": f"{length} bytes, and {LONGEST_REQUEST} are allowed"})
            try:
                images, prompts = read(json.loads(self.rfile.read(length)))
            except (ValueError, KeyError, TypeError, OSError) as error:
                return self.answer(400, {"error": f"the request cannot be read: {error}"})
            with torch.no_grad():
                scores = reward(images, prompts)
            self.answer(200, {"scores": scores.tolist()})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


def read(request: dict[str, Any]) -> tuple[Tensor, list[str]]:
    """Images (b, 3, h, w) in [0, 1] and prompts of a request."""
    images, prompts = request["images"], [str(prompt) for prompt in request["prompts"]]
    if isinstance(images, str):
        values = np.frombuffer(base64.b64decode(images), dtype="<f4").reshape(request["shape"])
        return torch.from_numpy(values.astype(np.float32)), prompts
    files = [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in images]
    return torch.stack([torch.from_numpy(np.array(f)).permute(2, 0, 1) / 255 for f in files]), prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", help="MODULE:NAME; a class is made without arguments")
    parser.add_argument("--port", type=int, default=8700)
    args = parser.parse_args()
    module, _, name = args.reward.partition(":")
    reward = getattr(importlib.import_module(module), name)
    listening = server(reward() if isinstance(reward, type) else reward, args.port)
    print(f"{args.reward} at http://127.0.0.1:{listening.server_address[1]}", flush=True)
    listening.serve_forever()


if __name__ == "__main__":
    main()
