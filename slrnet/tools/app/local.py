"""Serves a page of NiceGUI on this machine alone."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import app, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from slrnet.tools.app.guard import Guard

__all__ = ["MAX_BYTES", "serve_page"]

MAX_BYTES = 50_000_000
"""Of an uploaded file."""


def serve_page(build: Callable[[], None], *, title: str, port: int) -> None:
    """Serves a page, built anew for each visitor, on 127.0.0.1 until Ctrl-C."""
    # Another site's page must not reach this one under a name of its own.
    app.add_middleware(Guard, most_bytes=MAX_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    ui.page("/")(build)
    ui.run(host="127.0.0.1", port=port, title=title, dark=None, reload=False, show=False)
