"""What staff does: refunds, restocking."""

from shop import call, serve


def refund(request, amount, _):
    request.answer(201, call("POST", "http://payments.mesh/refunds", {"amount": int(amount)}))


def restock(request, item, _):
    request.answer(200, call("PUT", f"http://catalog.mesh/items/{item}", {"stock": 50}))


serve({("POST", "refund"): refund, ("POST", "restock"): restock})
