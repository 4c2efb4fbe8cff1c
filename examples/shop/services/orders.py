"""Takes an order: looks the item up, has it paid."""

import itertools

from shop import call, serve

numbers = itertools.count(1)


def order(request, _, body):
    item = call("GET", f"http://catalog.mesh/items/{body['item']}")
    paid = call("POST", "http://payments.mesh/charges", {"amount": item["price"]})
    request.answer(201, {"order": next(numbers), "item": item["name"], "paid": paid})


serve({("POST", "orders"): order})
