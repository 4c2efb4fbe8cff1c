"""A gentle, endless customer: looks twice a second, buys now and then. `/stats` says how it went."""

import random
import threading
import time

from shop import Refused, call, serve

STATS = {"looked": 0, "bought": 0, "refused": 0, "failed": 0}


def shop_forever():
    while True:
        try:
            call("GET", "http://web.mesh/")
            STATS["looked"] += 1
            if random.random() < 0.3:
                call("POST", f"http://web.mesh/buy/{random.randint(1, 3)}")
                STATS["bought"] += 1
        except Refused:
            STATS["refused"] += 1
        except OSError:
            STATS["failed"] += 1
        time.sleep(0.5)


threading.Thread(target=shop_forever, daemon=True).start()
serve({("GET", "stats"): lambda request, *_: request.answer(200, STATS)})
