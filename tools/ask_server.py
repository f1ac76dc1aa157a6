"""Ask a served model the same question about a long document twice, and show what was reused.

    python tools/ask_server.py URL DOCUMENT [--question Q] [--wait SECONDS]

For vLLM's OpenAI-compatible server; VLLM_SERVER_DEV_MODE=1 lets this empty vLLM's own prefix cache
between both, so that what is reused comes from tierkv. It prints the time to the first token, the
tokens that vLLM's counter of external hits rose by, and the answer. Ends with 1 if the second
answer differs or reuses nothing, with 2 if the server does not answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

COUNTER: Final = "vllm:external_prefix_cache_hits_total"
_CHARACTERS: Final = 12_000


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="where the server is, as http://127.0.0.1:8077")
    parser.add_argument("document", type=Path, help="a text file; its first 12,000 characters")
    parser.add_argument("--question", default="In one sentence, what is this text about?")
    parser.add_argument("--wait", type=float, default=600, help="seconds to wait for the server")
    options = parser.parse_args()
    text = options.document.read_text(encoding="utf-8")[:_CHARACTERS]
    prompt = f"{text}\n\nQuestion: {options.question}\nAnswer:"
    try:
        wait_for(options.url, options.wait)
        answers, reused = [], 0.0
        for number in range(2):
            if number:
                call(f"{options.url}/reset_prefix_cache", {})
            before = hits(options.url)
            seconds, answer = ask(options.url, prompt)
            reused = hits(options.url) - before
            answers.append(answer)
            print(
                f"first token after {seconds:6.2f} s, {reused:5,.0f} tokens from tierkv: {answer!r}"
            )
    except (OSError, TimeoutError) as error:
        print(f"{options.url}: {error}; cure: is the server running? see its log", file=sys.stderr)
        return 2
    if answers[0] != answers[1]:
        print("the answers differ", file=sys.stderr)
    if not reused:
        print("nothing was reused", file=sys.stderr)
    return int(answers[0] != answers[1] or not reused)


def call(url: str, body: object | None = None) -> bytes:
    """A request, and its answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310 the user's own URL
        found: bytes = answer.read()
    return found


def wait_for(url: str, seconds: float) -> None:
    """Return when the server is healthy."""
    ends = time.monotonic() + seconds
    while True:
        try:
            call(f"{url}/health")
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)
        else:
            return


def hits(url: str) -> float:
    """The tokens that vLLM counted as from outside of it."""
    lines = call(f"{url}/metrics").decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(COUNTER))


def ask(url: str, prompt: str) -> tuple[float, str]:
    """Seconds to the first token, and the answer."""
    model = json.loads(call(f"{url}/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 24, "stream": True}
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, first, answer = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(request, timeout=300) as lines:  # noqa: S310
        for line in lines:
            text = line.decode().strip().removeprefix("data: ")
            if text and text != "[DONE]":
                first = first or time.perf_counter() - start
                answer += json.loads(text)["choices"][0]["text"]
    return first, answer


if __name__ == "__main__":
    raise SystemExit(main())
