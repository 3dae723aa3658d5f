"""The clients of ``bench.soak``, which send good and bad requests at random and check the responses."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

# The settings of the server that the clients expect.
_JSON = {"content-type": "application/json"}
MODEL_NAME = "soak"
MAX_MODEL_LEN = 256
MAX_BODY_KB = 64

# Beside greedy decoding as it is: fields that change which token is the best. Each prompt has one of them.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"repetition_penalty": 1.3, "logit_bias": {"5": -100, "20": 2}},
)
_SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["cat", "bird"]},
        "red": {"type": "boolean"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 12},
    },
    "required": ["animal", "red", "legs"],
    "additionalProperties": False,
}
# Short, because their description is part of the prompt.
_LEGS = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
_TOOLS = [{"type": "function", "function": {"name": name, "parameters": _LEGS}} for name in ("walk", "run")]

_WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "12", "red", "birds", "in", "one", "tree")


@dataclasses.dataclass(frozen=True)
class SoakCase:
    """A prompt, and its answer when the server has no other requests.

    Attributes:
      text: of the answer.
      tokens: number of tokens of the answer.
      max_tokens: the limit with which the answer was made.
      changes: fields of its requests beside the usual ones.
    """

    prompt: str
    text: str
    tokens: int
    max_tokens: int
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def body(self, max_tokens: int) -> dict[str, Any]:
        """A request for the answer, or for its beginning."""
        return greedy_body(self.prompt, max_tokens) | self.changes

    def holds(self, text: str, tokens: int, max_tokens: int) -> bool:
        """Whether ``text``, of ``tokens`` tokens, is the right answer for this limit ``max_tokens``."""
        if tokens != min(self.tokens, max_tokens):
            return False
        # A cut answer may end in the middle of a character.
        return text == self.text if tokens == self.tokens else self.text.startswith(text.rstrip("\ufffd"))


@dataclasses.dataclass
class Client:
    """Sends requests to one server and collects in ``wrong`` what was wrong with the responses."""

    http: httpx.AsyncClient
    cases: list[SoakCase]
    rng: random.Random
    wrong: list[str] = dataclasses.field(default_factory=list)

    def _body(self, **changes: Any) -> tuple[SoakCase, dict[str, Any]]:
        case = self.rng.choice(self.cases)
        return case, case.body(answer_length(self.rng, case.max_tokens)) | changes

    async def _post(self, **options: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", **options)

    def _expect(self, response: httpx.Response, status: int) -> None:
        if response.status_code != status or "message" not in response.json().get("error", {}):
            self.wrong.append(f"{status} expected, found {response.status_code} {response.text[:200]}")

    def _check(self, case: SoakCase, body: dict[str, Any], text: str, tokens: int) -> None:
        if not case.holds(text, tokens, body["max_tokens"]):
            self.wrong.append(f"{body}: {text!r} ({tokens} tokens), alone {case.text!r} ({case.tokens})")

    async def whole(self) -> None:
        case, body = self._body()
        response = await self._post(json=body)
        if response.status_code != 200:
            self.wrong.append(f"{response.status_code} {response.text[:200]}")
            return
        answer = response.json()
        self._check(case, body, answer["choices"][0]["text"], answer["usage"]["completion_tokens"])

    async def streamed(self) -> None:
        case, body = self._body(stream=True, stream_options={"include_usage": True})
        text, tokens = "", 0
        async for event in self._events(body):
            text += "".join(choice["text"] for choice in event["choices"])
            tokens = (event["usage"] or {}).get("completion_tokens", 0)
        self._check(case, body, text, tokens)

    async def structured(self) -> None:
        """JSON of a schema, drawn at random."""
        schema = {"name": "animal", "schema": _SCHEMA}
        message = await self._chat(response_format={"type": "json_schema", "json_schema": schema})
        if message is not None:
            animal = self._json(message["content"])
            if animal.get("animal") not in ("cat", "bird") or not 0 <= animal.get("legs", -1) <= 12:
                self.wrong.append(f"not of the schema: {message['content']!r}")

    async def called(self) -> None:
        """A tool that must be called."""
        message = await self._chat(tools=_TOOLS, tool_choice="required", parallel_tool_calls=False)
        for call in () if message is None else message["tool_calls"]:
            arguments = self._json(call["function"]["arguments"])
            if call["function"]["name"] not in ("walk", "run") or arguments.get("legs") not in (2, 4):
                self.wrong.append(f"not of the tools: {call}")

    async def _chat(self, **changes: Any) -> dict[str, Any] | None:
        """The message that answers a chat; None if it was cut off by its limit."""
        messages = [{"role": "user", "content": " ".join(self.rng.choices(_WORDS, k=4))}]
        body = {
            "model": MODEL_NAME,
            "messages": messages,
            "max_tokens": 40,
            "seed": self.rng.getrandbits(32),
        }
        response = await self.http.post("/v1/chat/completions", json=body | changes)
        if response.status_code != 200:
            self.wrong.append(f"{response.status_code} {response.text[:200]}")
            return None
        (choice,) = response.json()["choices"]
        return None if choice["finish_reason"] == "length" else choice["message"]

    def _json(self, text: str) -> dict[str, Any]:
        """The object that ``text`` is; an empty one if it is none."""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {}

    async def dropped(self) -> None:
        """Closes a stream after a few events."""
        case, body = self._body(stream=True)
        remaining = self.rng.randint(1, 6)
        text = ""
        async for event in self._events(body):
            text += event["choices"][0]["text"]
            remaining -= 1
            if not remaining:
                break
        if not case.text.startswith(text.rstrip("\ufffd")):
            self.wrong.append(f"{body}: {text!r}, alone {case.text!r}")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise httpx.HTTPError(event["error"]["message"])
                    yield event

    async def impatient(self) -> None:
        """Closes the connection before the response."""
        _, body = self._body()
        with contextlib.suppress(httpx.TimeoutException):
            await self._post(json=body, timeout=self.rng.uniform(0.001, 0.5))

    async def oversized(self) -> None:
        _, body = self._body(prompt="a" * (MAX_BODY_KB * 1024))
        self._expect(await self._post(json=body), 413)

    async def oversized_chunks(self) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(MAX_BODY_KB + 1):
                yield b" " * 1024

        self._expect(await self._post(content=chunks(), headers=_JSON), 413)

    async def malformed(self) -> None:
        content = self.rng.choice([b"", b"{", b"[]", b"\xff", b"[" * 50_000, b'{"model": "soak"}'])
        self._expect(await self._post(content=content, headers=_JSON), 400)

    async def refused(self) -> None:
        wrong = [
            {"suffix": "x"},
            {"temperature": -1},
            {"n": 0},
            {"prompt": "a b " * MAX_MODEL_LEN},
            {"seed": "x"},
        ]
        _, body = self._body(**self.rng.choice(wrong))
        self._expect(await self._post(json=body), 400)

    async def half_sent(self) -> None:
        """Announces a body, sends only its beginning and closes the connection."""
        url = self.http.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b'Content-Length: 1000\r\n\r\n{"model":')
        await writer.drain()
        await asyncio.sleep(self.rng.uniform(0, 0.1))
        writer.close()

    @property
    def kinds(self) -> dict[Callable[[], Awaitable[None]], int]:
        """The kinds of requests, and how many of a hundred have this kind."""
        return {
            self.whole: 32,
            self.streamed: 18,
            self.structured: 7,
            self.called: 5,
            self.dropped: 12,
            self.impatient: 10,
            self.oversized: 3,
            self.oversized_chunks: 3,
            self.malformed: 4,
            self.refused: 3,
            self.half_sent: 3,
        }


def greedy_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    """A request for a greedy answer."""
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}


def answer_length(rng: random.Random, longest: int) -> int:
    """A random limit of tokens: often small, sometimes as large as ``longest``."""
    return round(longest ** rng.random())


async def ask_alone(
    http: httpx.AsyncClient, rng: random.Random, count: int, max_words: int, max_tokens: int
) -> list[SoakCase]:
    """Sends ``count`` random prompts of different lengths, each while nothing else runs."""
    cases = []
    for number in range(count):
        prompt = f"{number} " + " ".join(rng.choices(_WORDS, k=rng.randint(1, max_words)))
        changes = _CHANGES[number % len(_CHANGES)]
        body = greedy_body(prompt, max_tokens) | changes
        response = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        tokens = response["usage"]["completion_tokens"]
        cases.append(SoakCase(prompt, response["choices"][0]["text"], tokens, max_tokens, changes))
    return cases


async def soak(
    url: str,
    *,
    requests: int,
    clients: int,
    prompts: int = 20,
    max_words: int = 100,
    max_tokens: int = 24,
    tools: bool = True,
    seed: int = 0,
    sample: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[SoakCase]]:
    """Sends the random mixture of requests to a server and waits until it is idle again.

    Args:
      url: of a server with the settings of this module.
      requests: number of requests.
      clients: number of clients that send them at the same time.
      prompts: number of different prompts.
      max_words: the most words of a prompt.
      max_tokens: the most tokens of an answer.
      tools: whether some requests have tools, whose description needs room in the context.
      seed: of the random choices.
      sample: called after each request with the number of requests done.

    Returns:
      What was sent, what was wrong and the free pages before and after; and the prompts with their answers.
    """
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        before = await metrics(http)
        client = Client(http, await ask_alone(http, rng, prompts, max_words, max_tokens), rng)
        kinds = {kind: share for kind, share in client.kinds.items() if tools or kind != client.called}
        todo = rng.choices(list(kinds), list(kinds.values()), k=requests)
        done: collections.Counter[str] = collections.Counter()
        started = time.perf_counter()

        async def work() -> None:
            while todo:
                act = todo.pop()
                try:
                    await act()
                except (httpx.HTTPError, OSError) as error:
                    client.wrong.append(f"{act.__name__}: {error!r}")
                done[act.__name__] += 1
                sample(done.total())

        await asyncio.gather(*(work() for _ in range(clients)))
        seconds = time.perf_counter() - started
        after = await _idle(http)
    pages = "atom_jax_free_pages"
    result = {
        "requests": dict(done),
        "clients": clients,
        "seconds": seconds,
        "wrong": client.wrong,
        "free_pages": [before[pages], after[pages]],
        "preemptions": after["atom_jax_preemptions_total"],
        "generated_tokens": after["atom_jax_generated_tokens_total"],
        "prefix_cache_hit_ratio": after["atom_jax_prefix_cache_hit_ratio"],
    }
    return result, client.cases


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics in /metrics, by name."""
    lines = (await http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def _idle(http: httpx.AsyncClient) -> dict[str, float]:
    """Waits until no request runs or waits; returns the metrics."""
    for _ in range(300):
        found = await metrics(http)
        if found["atom_jax_requests_running"] == found["atom_jax_requests_waiting"] == 0:
            return found
        await asyncio.sleep(0.1)
    raise SystemExit("the server has requests although all clients have left")
