"""A reward that runs elsewhere, asked over HTTP."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from hybrid_engine.errors import UserError
from hybrid_engine.rewards.sample import Sample, checked_scores

FIRST_WAIT = 0.5  # seconds before the first retry; doubled each time
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRANSIENT = (408, 429, 500, 502, 503, 504)


class HTTPReward:
    """POSTs ``{"prompts": [...], "completions": [...]}``; the answer is ``{"rewards": [...]}``,
    numbers or null.

    Lost connections, timeouts and the statuses that mean "try again" are retried with doubling
    waits; anything else is a UserError at once, with the URL, the status and the beginning of the
    body.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise UserError(f"reward {url!r} names no host; give http://HOST[:PORT]/PATH")
        self.name = parts.netloc.rpartition("@")[2] + parts.path.rstrip("/")
        self._url = url
        self._timeout = timeout
        self._retries = retries
        # A proxy cannot reach this machine's own loopback address.
        proxies = urllib.request.ProxyHandler({} if parts.hostname in LOOPBACK else None)
        self._opener = urllib.request.build_opener(proxies)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        body = {"prompts": [s.prompt for s in samples], "completions": [s.answer for s in samples]}
        answer = self._ask(json.dumps(body).encode())
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise UserError(
                f"reward {self._url} answered without 'rewards'; it must answer "
                f'{{"rewards": [...]}}'
            )
        return checked_scores(answer["rewards"], samples, self._url)

    def _ask(self, body: bytes) -> Any:
        request = urllib.request.Request(
            self._url, data=body, headers={"Content-Type": "application/json"}
        )
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=self._timeout) as response:
                    text = response.read().decode(errors="replace")
                    break
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(200).decode(errors='replace')}".rstrip(
                    ": "
                )
                if error.code not in TRANSIENT:
                    raise UserError(f"reward {self._url} answered with {problem}") from None
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
            except (OSError, HTTPException) as error:  # URLError is an OSError
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        else:
            raise UserError(
                f"reward {self._url} failed {self._retries + 1} times ({problem}); "
                "check that the server is up, or raise judge.http_timeout or judge.http_retries"
            )
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise UserError(f"reward {self._url} answered with no JSON but {text[:80]!r}") from None
