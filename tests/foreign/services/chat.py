"""A WebSocket server by the `websockets` library: echoes, and says "tick" now and then."""

import asyncio
import os

from websockets.asyncio.server import serve


async def chat(socket):
    async def tick():
        while True:
            await asyncio.sleep(0.1)
            await socket.send("tick")

    ticking = asyncio.create_task(tick())
    try:
        async for message in socket:
            await socket.send(message)
    finally:
        ticking.cancel()


async def main():
    async with serve(chat, "127.0.0.1", int(os.environ["PORT"])) as server:
        await server.serve_forever()


asyncio.run(main())
