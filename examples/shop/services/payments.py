"""Moves money, in memory only."""

import itertools

from shop import serve

LEDGER = []
numbers = itertools.count(1)


def charge(request, _, body):
    entry = {"charge": next(numbers), "amount": body["amount"], "for": request.caller()}
    LEDGER.append(entry)
    del LEDGER[:-1000]
    request.answer(201, entry)


def refund(request, _, body):
    entry = {"refund": next(numbers), "amount": body["amount"], "for": request.caller()}
    LEDGER.append(entry)
    del LEDGER[:-1000]
    request.answer(201, entry)


def charges(request, *_):
    request.answer(200, {"entries": LEDGER[-20:]})


serve({("POST", "charges"): charge, ("POST", "refunds"): refund, ("GET", "charges"): charges})
