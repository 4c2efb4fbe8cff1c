"""Deployed this morning. It works; the mesh lets it do nothing until a policy names it."""

from shop import Refused, call, serve


def look(request, *_):
    try:
        request.answer(200, call("GET", "http://catalog.mesh/items"))
    except Refused as refused:
        request.answer(200, {"catalog_said": refused.status})


serve({("GET", ""): look})
