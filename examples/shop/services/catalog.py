"""What is for sale."""

import os

from shop import serve

ITEMS = {
    "1": {"name": "a lantern", "price": 20, "stock": 7},
    "2": {"name": "a cloak", "price": 55, "stock": 3},
    "3": {"name": "a whistle", "price": 4, "stock": 40},
}


def items(request, item, _):
    if not item:
        request.answer(200, {"items": ITEMS, "served_by": os.environ.get("COUNTERSIGN_INSTANCE")})
    elif item in ITEMS:
        request.answer(200, ITEMS[item])
    else:
        request.answer(404, {"error": "no such item"})


def restock(request, item, body):
    if item not in ITEMS:
        return request.answer(404, {"error": "no such item"})
    ITEMS[item]["stock"] = int(body["stock"])
    request.answer(200, {**ITEMS[item], "restocked_by": request.caller()})


serve({("GET", "items"): items, ("PUT", "items"): restock})
