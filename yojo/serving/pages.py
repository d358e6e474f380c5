"""The page at `/`, the description at `/docs`, and what both load: files of the package, which ask nothing of any other host."""

import hashlib
from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
HTML, SCRIPT, STYLE = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8"
FILES = {
    "/": ("index.html", HTML),
    "/page.js": ("page.js", SCRIPT),
    "/mask.js": ("mask.js", SCRIPT),
    "/parts.js": ("parts.js", SCRIPT),
    "/theme.js": ("theme.js", SCRIPT),
    "/page.css": ("page.css", STYLE),
    "/docs": ("docs.html", HTML),
    "/docs.js": ("docs.js", SCRIPT),
}
# Nothing is loaded from elsewhere and nothing that stands in a page's text runs. Responses are shown as they are: with Trusted
# Types not even a mistake of ours could make markup of them.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag: a new version of the server is seen at once
}


def routes():
    """The pages' routes, for an application that has none of its own at these paths.

    FastAPI has one at `/docs`, which loads its scripts from another host: `FastAPI(docs_url=None, redoc_url=None)`.
    The pages find everything by relative addresses, so they work below a proxy's prefix, too.

    Returns:
        list of `starlette.routing.Route`, for GET and HEAD.
    """
    return [
        Route(path, _endpoint(FOLDER / name, kind), include_in_schema=False) for path, (name, kind) in FILES.items()
    ]


def _endpoint(path, kind):
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"Content-Type": kind, "ETag": tag}

    async def endpoint(request):
        # A proxy that compresses makes a weak tag of it.
        asked = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in asked or "*" in asked:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return endpoint
