"""The service: the model's images, whoever asks beside; limits, a token, an orderly end."""

import asyncio
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from diffusion.console import UserError
from diffusion.plan import Plan
from students import filters, load, serve, web
from students.batcher import Batcher, Full, best_batch
from students.service import Service
from tests.browser import browser

ROOT = Path(__file__).parents[1]
OPTIONS = serve.Options(Path("run"), max_images=8, max_steps=8, queue=16, batch_size=4)


class Slow:
    """The model, which takes some time for a batch and writes down what each was."""

    def __init__(self, model, seconds: float = 0.0):
        self.model, self.seconds, self.batches = model, seconds, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def make(self, plan, seed, numbers, condition):
        self.batches.append(len(numbers))
        time.sleep(self.seconds)
        return self.model.make(plan, seed, numbers, condition)


@pytest.fixture(scope="module")
def model(student):
    return load(student, precision="fp32")


class Server:
    """A service in a thread, on a free port."""

    def __init__(self, maker, options=OPTIONS, screen=None):
        self.service = Service(maker, options, options.batch_size, screen)
        listens = serve.listening("127.0.0.1", 0)
        self.port = listens.getsockname()[1]
        config = uvicorn.Config(web.application(self.service), log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listens],), daemon=True)
        self.thread.start()

    def ask(self, path="/images", token=None, **asked):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if path == "/images":
            headers["Content-Type"] = "application/json"
            connection.request("POST", path, json.dumps(asked), headers)
        else:
            connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def images(self, **asked):
        status, _, content = self.ask(**asked, format="npz")
        assert status == 200, content
        return np.load(io.BytesIO(content), allow_pickle=False)["images"]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def server():
    """(maker, options, filter) -> a running service."""
    running = []

    def start(*arguments, **named):
        running.append(Server(*arguments, **named))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def test_the_service_makes_the_images_of_the_model_whatever_shares_the_batch(server, model):
    slow = Slow(model, 0.05)
    service = server(slow, replace(OPTIONS, queue=100, batch_size=16))
    asked = [{"seed": seed, "num": 1 + seed % 3, "first": seed % 2} for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: service.images(**each), asked))
    for each, images in zip(asked, answers, strict=True):
        num, first = each["num"], each["first"]
        assert (images == model(num + first, seed=each["seed"])[first:]).all()
    assert max(slow.batches) > 3  # more than any one request
    assert sum(slow.batches) == sum(each["num"] for each in asked)


def test_a_picture_says_how_it_was_made(server, model):
    service = server(model)
    status, headers, content = service.ask(seed=5)
    assert (status, headers["content-type"], headers["x-steps"]) == (200, "image/png", "4")
    picture = Image.open(io.BytesIO(content))
    assert (np.asarray(picture) == model(1, seed=5)[0, :, :, 0]).all()
    assert (picture.text["Seed"], picture.text["Model sha256"]) == ("5", model.sha256)
    status, _, content = service.ask(num=4)
    assert Image.open(io.BytesIO(content)).size == (124, 124)  # two rows of 56 pixels


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ({"num": 9}, 422, "num must be at most 8, got 9"),
        ({"steps": 9}, 422, "steps must be at most 8"),
        ({"steps": 3}, 422, "4 steps"),
        ({"num": 0}, 422, "greater than or equal to 1"),
        ({"seed": -1}, 422, "greater than or equal to 0"),
        ({"label": 1}, 422, "needs a model with classes"),
        ({"prompt": "a seven"}, 422, "needs a model of captions"),
        ({"form": "png"}, 422, "Extra inputs"),
        ({"format": "gif"}, 422, "'png' or 'npz'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_words(server, model, asked, status, words):
    answer = server(model).ask(**asked)
    assert answer[0] == status
    assert words in answer[2].decode()


def test_a_full_queue_answers_429_and_loses_nothing(server, model):
    service = server(Slow(model, 0.2))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: service.ask(num=4, seed=seed), range(12)))
    statuses = [status for status, _, _ in answers]
    assert {*statuses} == {200, 429}
    assert statuses.count(200) >= 4  # as many as may wait
    assert all(int(h["retry-after"]) >= 1 for status, h, _ in answers if status == 429)
    metrics = service.ask("/metrics")[2].decode()
    assert f'fewstep_requests_total{{status="429"}} {statuses.count(429)}.0' in metrics
    assert f"fewstep_images_total {4 * statuses.count(200)}.0" in metrics


def test_a_token_guards_images_and_metrics_alone(server, model):
    service = server(model, replace(OPTIONS, token="secret"))
    for path in ("/images", "/metrics", "/model"):
        assert [service.ask(path, token)[0] for token in (None, "other", "secret")] == [
            401,
            401,
            200,
        ]
    for path in ("/", "/health", "/openapi.json", "/docs", "/docs/files/swagger-ui-bundle.js"):
        status, _, content = service.ask(path)
        assert status == 200
        assert b"://cdn" not in content[:5000]  # the pages need no network


def test_large_slow_and_broken_requests_harm_nobody(server, model, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", 0.5)
    slow_model = Slow(model, 0.3)
    service = server(slow_model)
    head = b"POST /images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    def sent(content: bytes):
        client = socket.create_connection(("127.0.0.1", service.port), timeout=20)
        client.sendall(content)
        return client

    slow = sent(head + b"Content-Length: 10\r\n\r\n{")
    large = sent(head + b"Content-Length: 1000000\r\n\r\n" + b" " * 70_000)
    sent(b"\xff\x00 no HTTP\r\n\r\n")
    body = json.dumps({"num": 8, "steps": 4}).encode()
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(2):  # two requests of two batches each
        left = sent(whole)
        time.sleep(0.1)
        left.close()
    assert service.images(seed=1).shape == (1, 8, 8, 1)
    assert slow.recv(12) == b"HTTP/1.1 408"
    assert large.recv(12) == b"HTTP/1.1 413"
    assert sum(slow_model.batches) <= 9  # of the 16 images that nobody waits for, half are not made


def test_blocked_images_are_grey_and_counted(server, model):
    images = model(6)
    means = images.mean((1, 2, 3))
    bad = filters.Filter(lambda batch: batch.mean((1, 2, 3)), float(np.median(means)), "mean")
    service = server(model, screen=bad)
    _, headers, content = service.ask(num=6, format="npz")
    answer = np.load(io.BytesIO(content))
    blocked = means >= bad.threshold
    assert (answer["blocked"] == blocked).all()
    assert headers["x-blocked"] == "3"
    assert (answer["images"][blocked] == filters.GREY).all()
    assert (answer["images"][~blocked] == images[~blocked]).all()
    assert "fewstep_blocked_total 3.0" in service.ask("/metrics")[2].decode()


def test_a_failing_batch_fails_its_requests_and_no_others(model):
    class Failing(Slow):
        def make(self, plan, seed, numbers, condition):
            if 7 in seed.tolist():
                raise UserError("not finite")
            return super().make(plan, seed, numbers, condition)

    async def ask():
        batcher = Batcher(Failing(model), size=1, most=10)
        work = asyncio.create_task(batcher.run())
        plan = model.plan()
        calls = (batcher.images(plan, seed, range(1), {}) for seed in (6, 7, 8))
        results = await asyncio.gather(*calls, return_exceptions=True)
        work.cancel()
        return results

    good, bad, after = asyncio.run(ask())
    assert isinstance(bad, UserError)
    assert (good[0].shape, after[0].shape) == ((1, 1, 8, 8), (1, 1, 8, 8))


def test_requests_of_other_plans_wait_their_turn_and_share_no_batch(model):
    class Noted(Slow):
        def make(self, plan, seed, numbers, condition):
            self.batches.append((plan.num_steps, seed.tolist()))
            return torch.zeros(len(numbers), 1, 8, 8, dtype=torch.uint8)

    async def ask(maker):
        batcher = Batcher(maker, size=3, most=5)
        plans = {n: Plan("ddim", tuple(0.1 * i for i in range(n + 1))) for n in (1, 2)}
        order = [(1, 0, 2), (2, 1, 1), (1, 2, 2)]  # steps, seed, images
        calls = [batcher.images(plans[n], seed, range(num), {}) for n, seed, num in order]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.images(plans[1], 3, range(1), {})
        work = asyncio.create_task(batcher.run())
        await asyncio.gather(*tasks)
        work.cancel()

    maker = Noted(model)
    asyncio.run(ask(maker))
    assert maker.batches == [(1, [0, 0, 2]), (2, [1]), (1, [2])]


def test_who_was_answered_shares_the_next_batch_with_who_waited(model):
    async def ask(maker):
        batcher = Batcher(maker, size=4, most=8)
        work = asyncio.create_task(batcher.run())

        async def client(seed):
            for number in range(3):
                await batcher.images(model.plan(), seed, range(number, number + 1), {})

        first = asyncio.create_task(client(1))
        await asyncio.sleep(0.05)  # its batch is being made
        await asyncio.gather(first, client(2))
        work.cancel()

    maker = Slow(model, 0.1)
    asyncio.run(ask(maker))
    assert maker.batches == [1, 2, 2, 1]


def test_an_exact_service_makes_whole_batches_alone(server, model):
    maker = Slow(model)
    service = server(maker, replace(OPTIONS, exact=True))
    assert (service.images(num=1, seed=3) == model(1, seed=3)).all()
    assert (service.images(num=6, seed=3) == model(6, seed=3)).all()
    assert maker.batches == [4, 4, 4]


def test_an_answer_s_parts_do_not_wait_for_each_other_s_receipt():
    with serve.listening("127.0.0.1", 0) as listens:
        with socket.create_connection(listens.getsockname()) as _, listens.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_batch_is_the_least_that_makes_nearly_the_most_images_a_second(model):
    class Machine(Slow):
        def make(self, plan, seed, numbers, condition):
            time.sleep(0.01 + 0.002 * max(0, len(numbers) - 8))  # up to 8 cost no more than one
            return torch.zeros(len(numbers), 1, 8, 8, dtype=torch.uint8)

    assert best_batch(Machine(model), model.plan(), 64) in (8, 16)


def test_sigterm_finishes_what_began_and_takes_no_more(student, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom students import api, serve\nfrom diffusion.console import run\n"
        "make = api.Checkpoint.make\n"
        "def slowly(*arguments):\n    time.sleep(1)\n    return make(*arguments)\n"
        "api.Checkpoint.make = slowly\nrun(serve.main)\n"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            script,
            student,
            "--port",
            "0",
            "--batch-size",
            "1",
            "--precision",
            "fp32",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        port = int(process.stdout.readline().split(",")[0].rsplit(":", 1)[1])
        asking = Server.__new__(Server)
        asking.port = port
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(asking.ask, seed=seed) for seed in range(2)]
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert [answer.result()[0] for answer in answers] == [200, 200]
        assert process.wait(20) == -signal.SIGTERM
        with pytest.raises(ConnectionError):
            asking.ask()
    finally:
        process.kill()


def test_the_page_shows_images_in_a_browser(server, model, tmp_path):
    service = server(model)
    opened = browser(tmp_path)(f"http://127.0.0.1:{service.port}/")
    assert "progressive, digits 8×8" in opened.dom
    assert 'alt="8 images in 4 steps"' in opened.dom
    assert 'src="blob:' in opened.dom
    assert opened.console == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queue", "10"], "--queue must be at least --max-images 256"),
        (["--port", "99999"], "cannot be listened at"),
        (["--filter", "missing.onnx"], "expected an ONNX classifier"),
        (["--filter", "module:os:nothing"], "expected module:package.module:function"),
        (["--max-steps", "2"], "makes no images in --max-steps 2"),
    ],
)
def test_a_mistake_is_one_line(command, student, flags, words):
    flags = [*flags, "--port", "0"] if "--port" not in flags else flags
    outcome = command(serve.main, student, *flags, "--batch-size", "1", "--precision", "fp32")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err
