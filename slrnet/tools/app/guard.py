"""What the app's server refuses before the page sees it: too large uploads, too many at a time, other sites' pages."""

from __future__ import annotations

from typing import Any

__all__ = ["Guard", "TooLarge"]

MOST_UPLOADS = 2
"""Uploads that are read at a time."""
_ENVELOPE = 2**16
"""Bytes of an upload besides those of its file."""
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws://127.0.0.1:* "
    "ws://localhost:*; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class TooLarge(Exception):
    """An upload has more bytes than it may."""


class Guard:
    """ASGI middleware around the app.

    Args:
        app: the ASGI application.
        most_bytes: of an uploaded file.
    """

    def __init__(self, app: Any, *, most_bytes: int) -> None:
        self.app, self.most_bytes, self._uploads = app, most_bytes + _ENVELOPE, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request or a page's socket."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif _is_foreign(headers):
            await _refuse(scope, send, 403, "pages of other sites may not use this one")
        elif scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            await self._upload(scope, receive, send, headers)
        else:
            await self.app(scope, receive, _with_headers(send))

    async def _upload(self, scope: Any, receive: Any, send: Any, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
            await _refuse(scope, send, 413, f"an upload of up to {self.most_bytes - _ENVELOPE:,} bytes is taken")
            return
        if self._uploads >= MOST_UPLOADS:
            await _refuse(scope, send, 429, "other uploads are being read; try again")
            return
        started = False

        async def note(message: Any) -> None:
            nonlocal started
            started = True
            await _with_headers(send)(message)

        self._uploads += 1
        try:
            await self.app(scope, self._counted(receive), note)
        except TooLarge:
            if not started:
                await _refuse(scope, send, 413, f"an upload of up to {self.most_bytes - _ENVELOPE:,} bytes is taken")
        finally:
            self._uploads -= 1

    def _counted(self, receive: Any) -> Any:
        """Also an upload that does not say how long it is ends at the limit."""
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_bytes:
                raise TooLarge
            return message

        return counted


def _is_foreign(headers: dict[str, str]) -> bool:
    """Whether a page of another site asks; browsers say so, for sockets and uploads at least."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = message | {"headers": [*message.get("headers", ()), *own]}
        await send(message)

    return sending


async def _refuse(scope: Any, send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    head = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
    await _with_headers(send)(head)
    await send({"type": "http.response.body", "body": reason.encode()})
