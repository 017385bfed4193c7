"""The service under load on loopback: `python -m benchmarks.serve RUN`.

It compares the service with direct batches, checks every image against the model's own, and meets
the service with too many requests, slow clients, broken ones, and SIGTERM.
"""

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from diffusion.console import UserError, run, say
from students import load
from students.api import ImageModel

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Options:
    """Measure the service under load, beside direct batches of the same model."""

    checkpoint: Positional[Path]
    """The model: a run's folder or a .safetensors file."""
    steps: int = 1
    """Steps of each image."""
    num: int = 1
    """Images of each request."""
    clients: tuple[int, ...] = (1, 8, 64)
    """How many ask at once, each again as soon as it is answered."""
    requests: int = 10_000
    """Requests at the most clients; a tenth of it at fewer."""
    rounds: int = 3
    """How often direct batches and the service take turns."""


@dataclass
class Client:
    """One connection that is kept, as HTTP clients do."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def post(self, **asked: object) -> tuple[int, dict[str, str], bytes]:
        body = json.dumps(asked).encode()
        head = f"POST /images HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self.writer.drain()
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        content = await self.reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), headers, content


@asynccontextmanager
async def connected(port: int) -> AsyncGenerator[Client]:
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


@dataclass
class Load:
    """What came of some requests."""

    seconds: float
    latencies: list[float]
    statuses: Counter
    rounded: int
    """Answers with pixels that are a grey level off the model's own, as another batch rounds."""
    wrong: int
    """Answers of which some are further off."""


async def load_on(port: int, options: Options, clients: int, count: int, expected: dict) -> Load:
    """So many requests of distinct seeds by so many clients. expected: a seed's images."""
    seeds, latencies, statuses, off = iter(range(count)), [], Counter(), Counter()

    async def ask() -> None:
        async with connected(port) as client:
            for seed in seeds:
                begun = time.perf_counter()
                asked = {"seed": seed, "num": options.num, "steps": options.steps}
                status, _, content = await client.post(**asked, format="npz")
                latencies.append(time.perf_counter() - begun)
                statuses[status] += 1
                if status == 200:
                    images = np.load(io.BytesIO(content), allow_pickle=False)["images"]
                    levels = np.abs(images.astype(int) - expected[seed]).max()
                    off["rounded" if levels == 1 else "wrong"] += bool(levels)

    begun = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return Load(seconds, latencies, statuses, off["rounded"], off["wrong"])


def direct(maker: ImageModel, options: Options, size: int, count: int) -> float:
    """Images a second in batches of that size, without a service."""
    plan = maker.plan(options.steps)
    begun = time.perf_counter()
    for _ in maker.batches(plan, 0, range(count), None, size):
        pass
    return count / (time.perf_counter() - begun)


def images_of(maker: ImageModel, options: Options, count: int, size: int) -> dict[int, np.ndarray]:
    """The images of each request by its seed, made in batches of requests."""
    plan, num, expected = maker.plan(options.steps), options.num, {}
    per = max(1, size // num)
    for start in range(0, count, per):
        seeds = range(start, min(start + per, count))
        rows = torch.tensor([seed for seed in seeds for _ in range(num)])
        numbers = torch.arange(num).repeat(len(seeds))
        images = maker.make(plan, rows, numbers, {}).permute(0, 2, 3, 1).numpy()
        expected |= dict(zip(seeds, images.reshape(len(seeds), num, *maker.shape), strict=True))
    return expected


@asynccontextmanager
async def serving(
    options: Options, *flags: str
) -> AsyncGenerator[tuple[subprocess.Popen, int, int]]:
    """(the service's process, its port, its batch size)."""
    command = [sys.executable, "-P", "-m", "students.serve", str(options.checkpoint)]
    command += ["--precision", "fp32", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if "serving" not in line:
            raise UserError(f"the service did not start: {line}")
        words = line.split()
        yield process, int(words[3].rstrip(",").rsplit(":", 1)[1]), int(words[4])
    finally:
        process.kill()
        process.wait()


async def throughput(options: Options, maker: ImageModel) -> None:
    room = ["--queue", str(2 * options.num * max(256, *options.clients))]
    async with serving(options, *room) as (_, port, size):
        expected = images_of(maker, options, options.requests, size)
        async with connected(port) as client:
            await client.post(num=1, steps=options.steps)
        for clients in options.clients:
            many = clients == max(options.clients)
            count = options.requests if many else options.requests // 10
            ratios, loads = [], []
            for _ in range(options.rounds):
                pace = direct(maker, options, size, max(size, count * options.num // 4))
                loads.append(await load_on(port, options, clients, count, expected))
                made = loads[-1].statuses[200] * options.num
                ratios.append(made / loads[-1].seconds / pace)
            ms = np.quantile([1000 * x for load in loads for x in load.latencies], (0.5, 0.99))
            statuses = sum((load.statuses for load in loads), Counter())
            say(
                f"{clients:3d} clients, {options.num} images a request in {options.steps} steps: "
                f"p50 {ms[0]:.1f} ms, p99 {ms[1]:.1f} ms, "
                f"{median(load.statuses[200] * options.num / load.seconds for load in loads):,.0f} "
                f"images/s, "
                f"{median(ratios):.0%} of direct batches of {size} "
                f"({min(ratios):.0%} to {max(ratios):.0%}), answers {dict(statuses)}, "
                f"a grey level off {sum(load.rounded for load in loads)}, "
                f"wrong {sum(load.wrong for load in loads)}"
            )


async def trouble(options: Options) -> None:
    """Overload, slow and broken clients, and SIGTERM with requests under way."""
    flags = ["--queue", "64", "--max-images", "64", "--batch-size", "16", "--max-steps", "1000"]
    async with serving(options, *flags) as (process, port, _):

        async def one(seed: int, steps: int = 60) -> int:
            async with connected(port) as client:
                status, headers, _ = await client.post(seed=seed, num=16, steps=steps)
                if status == 429 and int(headers["retry-after"]) < 1:
                    raise UserError("a 429 without Retry-After")
                return status

        statuses = Counter(await asyncio.gather(*(one(seed) for seed in range(64))))
        say(f"overload, 64 x 16 images with --queue 64: {dict(statuses)}")
        slow = [await asyncio.open_connection(HOST, port) for _ in range(50)]
        for _, writer in slow:
            writer.write(b"POST /images HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        broken = [await asyncio.open_connection(HOST, port) for _ in range(50)]
        body = json.dumps({"num": 1, "steps": 60}).encode()
        for i, (_, writer) in enumerate(broken):
            head = b"POST /images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
            writer.write((whole, b"\x00\xff garbage\r\n\r\n", whole[:40])[i % 3])
            await writer.drain()
            writer.transport.abort()
        begun = time.perf_counter()
        status = await one(1, steps=1)
        say(
            f"beside 50 slow and 50 broken clients: {status} after "
            f"{time.perf_counter() - begun:.2f} s"
        )
        answers = await asyncio.gather(*(reader.read(20) for reader, _ in slow))
        say(f"the slow ones were answered {Counter(a[9:12].decode() for a in answers)}")
        under_way = [asyncio.create_task(one(seed, 200)) for seed in range(4)]
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        finished = Counter(await asyncio.gather(*under_way))
        code = await asyncio.to_thread(process.wait, 30)
        say(f"SIGTERM with 4 requests under way: answers {dict(finished)}, then exit {code}")


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.serve")
    maker = load(options.checkpoint, precision="fp32")
    asyncio.run(throughput(options, maker))
    asyncio.run(trouble(options))


if __name__ == "__main__":
    run(main)
