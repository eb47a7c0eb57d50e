"""Groq's SDK, which stands on classic httpx."""

from __future__ import annotations

from sdks.promises import AsyncPromises, Promises
from support.sdks import GROQ


class TestSync(Promises):
    sdk = GROQ


class TestAsync(AsyncPromises):
    sdk = GROQ
