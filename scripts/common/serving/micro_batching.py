"""Scoring the texts of many concurrent requests together."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class TooBusy(Exception):
    """More texts wait than the limit allows."""


class MicroBatcher:
    """Collects texts from many requests and scores them together in one worker thread.

    score: list of texts -> list of results, in order. A result or an exception reaches the request that brought the
    text. most: texts scored together, 1 = one by one. wait: seconds that a single text waits for others; under load
    nothing waits for this, because the next batch fills while the model is busy. limit: texts in the queue. observe:
    called with the size of each batch.
    """

    def __init__(self, score: Callable, most: int, wait: float, limit: int, observe: Callable[[int], None]):
        self.score, self.most, self.wait, self.limit, self.observe = score, most, wait, limit, observe
        self.queue: asyncio.Queue = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.task = asyncio.create_task(self.run())

    async def submit(self, texts: list[str]) -> list:
        """The results of `texts`, in order. Raises TooBusy, and what `score` raised."""
        if self.queue.qsize() + len(texts) > self.limit:
            raise TooBusy
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in texts]
        for item in zip(texts, futures, strict=True):
            self.queue.put_nowait(item)
        return await asyncio.gather(*futures)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            if self.wait and self.most > 1 and self.queue.empty():
                await asyncio.sleep(self.wait)
            while len(batch) < self.most and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            self.observe(len(batch))
            try:
                results = await loop.run_in_executor(self.thread, self.score, [text for text, _ in batch])
            except Exception as error:  # the requests answer 500; the worker goes on
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.thread.shutdown()
