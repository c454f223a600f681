"""What is sent: equally long messages that differ from one to the next."""

from __future__ import annotations

import json
import random

_PROSE = """
the quick river holds seven bright stones and nobody counts them before winter comes so we walk
along its bank every morning with tea bread some letters from friends who moved far away last year
because work was there and the harbour had closed price order ticket update delivered pending failed
invoice customer account question answer meeting
"""
WORDS = _PROSE.split()


def text(size: int, count: int = 256) -> list[bytes]:
    """Return plain text messages. Each begins with its number."""
    return [f"{number:08d} ".encode().ljust(size, b"x")[:size] for number in range(count)]


def json_objects(size: int, count: int = 256, seed: int = 7) -> list[bytes]:
    """Return JSON objects as a chat or a ticker would send them, of exactly `size` bytes."""
    rng = random.Random(seed)
    return [_object(rng, number, size) for number in range(count)]


def _object(rng: random.Random, number: int, size: int) -> bytes:
    message = {"type": "update", "number": number, "items": [], "note": ""}
    while True:
        item = {
            "id": rng.getrandbits(48),
            "user": f"{rng.choice(WORDS)}{rng.randrange(1000)}",
            "at": f"2025-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}T"
            f"{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.random() * 60:06.3f}Z",
            "price": round(rng.random() * 1000, 2),
            "text": " ".join(rng.choices(WORDS, k=rng.randrange(4, 16))),
        }
        message["items"].append(item)
        if len(_dump(message)) > size:
            message["items"].pop()
            break
    while (missing := size - len(_dump(message))) > 0:
        word = rng.choice(WORDS) + " "
        message["note"] += word[:missing]
    return _dump(message)


def _dump(message: dict) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
