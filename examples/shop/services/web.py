"""The storefront."""

from shop import call, serve


def front(request, *_):
    request.answer(200, {"welcome": "to the shop", "for_sale": call("GET", "http://catalog.mesh/items")})


def buy(request, item, _):
    request.answer(201, call("POST", "http://orders.mesh/orders", {"item": item}))


serve({("GET", ""): front, ("POST", "buy"): buy})
