"""Steps through an arena that real processes share, in Triton's interpreter: the same bits, and who fails harms nobody.

The gateway's side is its own pool, dispatcher and hops; the device model's part, rows in and outputs out, is played.

Letters: L layers, T tokens, K experts of each, D hidden size.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.config import ExpertGroupConfig, GatewayConfig
from consilium.float_experts import FloatArithmetic
from consilium.gate import Routing
from consilium.gpu.arena import ABORTED
from consilium.quantization import Quantized, quantize_rows
from consilium.rpc import DEFAULT_MAX_FRAME
from gateway.batch import Segment
from gateway.batches import combine, group_by_expert
from gateway.device_hop import PATIENT, DeviceHop, bucket_of
from gateway.device_hops import DeviceHops
from gateway.dispatcher import Dispatcher
from gateway.expert_meter import ExpertMeter
from gateway.gpu.experts import DispatchedExperts
from gateway.gpu.model import DeviceModel
from gateway.gpu.pages import PagePool
from gateway.gpu.tiling import Tiling
from gateway.local_experts import LocalExperts
from gateway.mailbox import Mailbox
from gateway.worker_connection import Expectations
from gateway.worker_pool import View, WorkerPool
from protos.tensor.v1 import tensor_pb2
from tests.stack import Process, launch, worker_argv
from tests.tiny_models import save_mixtral

MOST_TOKENS, TOP_K = 5, 2
SECONDS = 60.0
TILING = Tiling(rows=16, keys=16, chunk=16)
PATIENCE = 5.0  # seconds that a worker is waited for within a layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the arena lies in the CPU's memory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 experts in each of 3 layers, D 64."""
    return save_mixtral(tmp_path_factory.mktemp("hop") / "tiny")


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """Two workers without faults that share experts 1 and 2. The second one computes with the GPU's kernels."""
    argv = ["--dtype", "bfloat16", "--model", str(model), "--device", "cuda", "--metrics-port", "0"]
    with workers(model, tmp_path_factory.mktemp("pair"), "0-2", other=worker_argv("1-3", *argv)) as processes:
        yield processes


class Gateway:
    """What the engine has beside its model, over these workers."""

    def __init__(self, model: Path, workers: Sequence[Process]) -> None:
        checkpoint = Checkpoint(model)
        self.config = checkpoint.config
        self.mailbox = Mailbox(self._follow)
        local = partial(LocalExperts, checkpoint, FloatArithmetic(torch.float32))
        settings = GatewayConfig(layer_timeout=20, audit=0)
        self.dispatcher = Dispatcher(torch.bfloat16, settings, ExpertMeter(self.config), local)
        dtypes = torch.int8, torch.bfloat16
        self.hops = DeviceHops(self.config, MOST_TOKENS, dtypes, torch.device("cpu"), PATIENCE)
        fits = Expectations(checkpoint.fingerprint, "int8", tensor_pb2.DTYPE_BFLOAT16, self.config.hidden_size)
        endpoints = [f"grpc://{each.address.removeprefix('grpc://')}" for each in workers]
        groups = {"experts": ExpertGroupConfig(endpoint=endpoints)}
        self._loop = asyncio.new_event_loop()
        pool = WorkerPool(groups, DEFAULT_MAX_FRAME, self.config, fits, self.mailbox)
        self._task = self._loop.create_task(pool.run())
        self._thread = threading.Thread(target=self._run, name="io")
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()
        self.hops.close()

    def await_workers(self, count: int) -> None:
        """So many are connected."""
        self.await_true(lambda: len(self.dispatcher.workers) == count)

    def await_hop(self) -> DeviceHop:
        """An arena is open."""
        self.await_true(lambda: self.hops.current() is not None)
        hop = self.hops.current()
        assert hop is not None
        return hop

    def await_true(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            self.mailbox.receive(0.1)

    def ordinary(self, x: Tensor, ids: Tensor) -> list[Tensor]:
        """The combined outputs [T, D] of every layer, frame by frame; each layer computes from those before."""
        found = []
        for number, layer in enumerate(self.config.expert_layers()):
            routing = Routing(ids[number].long(), weights_of(ids[number]))
            batches = group_by_expert(*quantize_rows(x), routing)
            outputs, failures = self.mailbox.drive(self.dispatcher.dispatch(layer, batches))
            assert not failures
            x = combine(outputs, routing)
            outputs.release()
            found.append(x)
        return found

    def through(self, hop: DeviceHop, x: Tensor, ids: Tensor) -> list[Tensor] | None:
        """The same through the arena; None when the step came to nothing.

        Another thread stands for the device's stream, so that this one may hear of what happens meanwhile.
        """
        found: list[Tensor] = []
        hop.begin(bucket_of(len(x)))
        stream = threading.Thread(target=self._stream, args=(hop, x, ids, found))
        stream.start()
        while stream.is_alive():
            self.mailbox.receive(0.01)
        lost = hop.failed(int(hop.arena.broken))
        if lost:
            self.hops.failed(lost)
        return None if lost else found

    def check(self, tokens: int, seed: int = 0) -> None:
        """A step goes through the arena to the same bits."""
        x, ids = self.step_of(tokens, seed)
        found = self.through(self.await_hop(), x, ids)
        assert found is not None
        assert_same(found, self.ordinary(x, ids))

    def step_of(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Rows [T, D], and the experts [L, T, K] of every layer, ascending."""
        generator = torch.Generator().manual_seed(seed)
        layers, experts = len(self.config.expert_layers()), self.config.num_experts
        ids = torch.rand(layers, tokens, experts, generator=generator).topk(TOP_K).indices.sort().values
        return torch.randn(tokens, self.config.hidden_size, generator=generator), ids.to(torch.int32)

    def _stream(self, hop: DeviceHop, x: Tensor, ids: Tensor, found: list[Tensor]) -> None:
        """What a device model launches."""
        with torch.inference_mode():
            self._launch(hop, x, ids, found)

    @staticmethod
    def _launch(hop: DeviceHop, x: Tensor, ids: Tensor, found: list[Tensor]) -> None:
        arena, tokens = hop.arena, len(x)
        for number in range(len(ids)):
            rows: Quantized = quantize_rows(x)
            arena.rows[:tokens], arena.scales[:tokens], arena.ids[:tokens] = *rows, ids[number]
            arena.ids[tokens:] = -1
            hop.exchange(number)
            outputs = arena.outputs[: tokens * TOP_K].view(tokens, TOP_K, -1).float()
            weights = weights_of(ids[number])
            x = torch.zeros_like(x)
            for place in range(TOP_K):
                x = x + weights[:, place, None] * outputs[:, place]
            found.append(x)

    def _follow(self, event: object) -> None:
        assert isinstance(event, View)
        self.view = event.placement, event.workers
        self.dispatcher.follow(event.placement, event.workers)
        self.hops.follow(event.placement, event.workers)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._task]))


def weights_of(ids: Tensor) -> Tensor:
    """[T, K] powers of two, so that no sum's bits depend on fused multiplications."""
    return torch.tensor([0.5, 0.25]).expand(ids.shape).contiguous()


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@contextmanager
def workers(model: Path, folder: Path, *held: str, other: Sequence[str] | None = None) -> Iterator[list[Process]]:
    """Workers that hold these experts, and an ``other``; the fault of each is what the file ``folder``/number says."""
    argv = ["--model", str(model), "--port", "0", "--threads", "1", "--dtype", "bfloat16", "--experts"]
    with ExitStack() as cleanup:
        processes = []
        for number, experts in enumerate(held):
            process = launch(["tests.gpu.arena_worker", str(folder / str(number)), *argv, experts])
            cleanup.callback(_end, process)
            processes.append(process)
        if other is not None:
            processes.append(launch(other))
            cleanup.callback(_end, processes[-1])
        for process in processes:
            process.wait_listening()
        yield processes


def _end(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()
    assert process.popen.stdout is not None
    process.popen.stdout.close()


@contextmanager
def gateway(model: Path, processes: Sequence[Process]) -> Iterator[Gateway]:
    made = Gateway(model, processes)
    try:
        made.await_workers(len(processes))
        yield made
    finally:
        made.close()


def test_steps_of_several_sizes_through_two_workers_have_the_same_bits(model: Path, pair: list[Process]) -> None:
    """Buckets, what is in no bucket, and another owner of replicas between two steps."""
    with gateway(model, pair) as served:
        for seed, tokens in enumerate((1, 3, MOST_TOKENS, 2)):
            served.check(tokens, seed)
        hop = served.await_hop()
        before = hop.arena.owners.clone()
        moved = before.numpy().copy()
        moved[:, 1:3] = 1 - moved[:, 1:3]  # both have them
        hop.place(moved)
        served.check(3)
        served.hops.follow(*served.view)
        served.check(3)
        assert torch.equal(hop.arena.owners, before)
        assert served.await_hop() is hop
        served.await_true(lambda: counted_steps(pair[1]) >= hop.steps)


def counted_steps(worker: Process) -> float:
    """Those that went well, by the worker's metrics."""
    lines = httpx.get(worker.metrics).raise_for_status().text.splitlines()
    found = [each for each in lines if each.startswith("consilium_expert_service_device_steps_total")]
    return sum(float(each.split()[-1]) for each in found if 'outcome="ok"' in each)


def device_model(served: Gateway, model: Path, hops: DeviceHops | None) -> DeviceModel:
    """The gateway's model on a device, with pages of its own."""
    checkpoint, clock = Checkpoint(model), served.dispatcher.clock

    def make_pool() -> PagePool:
        return PagePool(checkpoint.config, torch.bfloat16, 2**18, torch.device("cpu"))

    experts = DispatchedExperts(served.dispatcher, clock)
    return DeviceModel(checkpoint, experts, make_pool, (TILING, TILING), torch.device("cpu"), clock, hops)


def hidden_of(served: Gateway, made: DeviceModel) -> list[Tensor]:
    """A prompt of four tokens in two steps, then two tokens one after the other."""
    cache = made.pool.allocate(6, 8)
    found, position = [], 0
    for count in (3, 1, 1, 1):
        batch = made.batch(list(range(5 + position, 5 + position + count)), [Segment(cache, 0, count, position)])
        with torch.inference_mode():
            found.append(served.mailbox.drive(made.forward(batch)).clone())
        assert not batch.failures
        position += count
    return found


def test_a_model_on_a_device_has_the_same_bits_through_the_arena(model: Path, pair: list[Process]) -> None:
    """Steps of prompts and of single tokens, with and without comparing them."""
    with gateway(model, pair) as served:
        expected = hidden_of(served, device_model(served, model, None))
        served.hops.audit = 0.5
        hop = served.await_hop()
        before = hop.steps
        assert_same(hidden_of(served, device_model(served, model, served.hops)), expected)
        assert hop.steps == before + len(expected)
        assert served.await_hop() is hop


def test_a_worker_that_is_killed_and_one_that_never_signals(model: Path, tmp_path: Path) -> None:
    """A step comes to nothing and goes the ordinary way; steps go on through another arena with whoever is left."""
    with workers(model, tmp_path, "0-3", "0-3") as processes, gateway(model, processes) as served:
        x, ids = served.step_of(4)
        expected = hidden_of(served, device_model(served, model, None))
        first = served.await_hop()
        (tmp_path / "0").write_text("killed")
        assert_same(hidden_of(served, device_model(served, model, served.hops)), expected)
        assert int(first.arena.broken) == ABORTED  # the host heard of it, and did not leave it to the device's clock
        served.await_workers(1)
        served.check(4)
        second = served.await_hop()
        assert len(second.members) == 1
        (tmp_path / "1").write_text("silent")  # and its host answers whatever it is asked
        assert served.through(second, x, ids) is None
        assert list(second.lost) == [second.members[0].address]  # the device's clock says because of whom
        assert served.hops.current() is None
        served.ordinary(x, ids)


def test_a_gateway_that_goes_in_the_middle_of_a_step(model: Path, pair: list[Process]) -> None:
    """The workers' wait ends with the socket, long before the device's clock would end it; the next one is served."""
    with gateway(model, pair) as served:
        served.await_hop().begin(2)  # and no word more
        before = [each.log().count("is let go") for each in pair]
    began = time.monotonic()
    for each, count in zip(pair, before, strict=True):
        served.await_true(lambda: each.log().count("is let go") > count)  # noqa: B023 (called at once)
    assert time.monotonic() - began < PATIENT * PATIENCE
    with gateway(model, pair) as served:
        served.check(2)
