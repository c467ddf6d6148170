"""Gateways and workers of one host without gRPC: the same bits, and whoever is killed or lies harms no one else."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from consilium.frames import PROTOCOL_VERSION, encode_call
from consilium.link_packets import CallPacket, RowFormat
from consilium.local_socket import PACKET, new_socket, send_with_descriptor, socket_address
from consilium.shared_memory import SharedMemory
from expert_service.local_listener import SUFFIX
from gateway.local_link import open_link
from gateway.mailbox import Mailbox
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from tests.integration import fake_workers
from tests.integration.completions import DEADLINE_SECONDS, Completion, await_metric, body_of, complete, events, metric
from tests.integration.grpc_client import SECONDS, connected, conversation, make_frame, rows_of
from tests.links import Answer, packet_of, place, read_answer, result_rows
from tests.stack import Process, launch, running, stack, wait_ready, worker_argv

HIDDEN = 64
FORM = RowFormat(HIDDEN, torch.float32, torch.float32)
SIZE = 2**20
PROMPT = list(range(40, 70))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sockets")


@pytest.fixture(scope="module")
def file_options(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """``--config`` with these sections of the YAML."""

    def options(**sections: str) -> list[str]:
        file = tmp_path_factory.mktemp("config") / "consilium.yaml"
        file.write_text("".join(f"{name}: {{{values}}}\n" for name, values in sections.items()))
        return ["--config", str(file)]

    return options


@pytest.fixture(scope="module")
def worker(tiny_mixtral: Path, folder: Path, file_options: Callable[..., list[str]]) -> Iterator[Process]:
    """All experts in float32, with a socket in the folder, too."""
    options = file_options(worker=f"socket_folder: {folder}")
    with running(worker_argv("all", "--model", str(tiny_mixtral), "--quantization", "none", *options)) as process:
        yield process


def describe(worker: Process) -> expert_pb2.DescribeResponse:
    with connected(worker.address) as channel:
        return expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest(), timeout=SECONDS)


def transports(url: str) -> list[str]:
    workers = httpx.get(f"{url}/load", timeout=DEADLINE_SECONDS).json()["workers"]
    return sorted(each["transport"] for each in workers)


def mappings(process: Process) -> int:
    """How many shared memories it maps."""
    return Path(f"/proc/{process.pid}/maps").read_text().count("/memfd:consilium")


def descriptors(process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Of another process's state, which nothing tells of."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextmanager
def started(*arguments: Sequence[str]) -> Iterator[list[Process]]:
    """These processes, which start at the same time."""
    processes = [launch(argv) for argv in arguments]
    try:
        for each in processes:
            each.wait_listening()
        yield processes
    finally:
        for each in processes:
            each.popen.terminate()
        for each in processes:
            each.wait()
            assert each.popen.stdout is not None
            each.popen.stdout.close()


# -- a gateway that uses the link --------------------------------------------------------------------------------------


def test_the_same_bits_over_links_over_grpc_and_over_both(
    tiny_mixtral: Path, file_options: Callable[..., list[str]]
) -> None:
    """Three gateways over the same workers, of which one offers no link."""
    common = ["--model", str(tiny_mixtral), "--dtype", "float32"]
    off = file_options(worker="local_links: false")
    with started(worker_argv("0-1", *common), worker_argv("2-3", *common), worker_argv("2-3", *common, *off)) as (
        near,
        other,
        far,
    ):
        setups = {
            "local": ((near, other), []),
            "grpc": ((near, other), file_options(gateway="local_links: false")),
            "mixed": ((near, far), []),
        }
        arguments = [
            ["gateway", *common, "--port", "0", "--threads", "1", *options]
            + [part for each in workers for part in ("--group-endpoint", f"experts={each.address}")]
            for workers, options in setups.values()
        ]
        used = {"local": ["local", "local"], "grpc": ["grpc", "grpc"], "mixed": ["grpc", "local"]}
        found = {}
        with started(*arguments) as gateways:
            for name, gateway in zip(setups, gateways, strict=True):
                wait_ready(gateway)
                found[name] = complete(gateway.address, PROMPT * 10, 30)  # its prompt's frames go through memory
                assert transports(gateway.address) == used[name]
                assert metric(gateway.address, "worker_local") == used[name].count("local")
                assert metric(gateway.address, "worker_failures_total") == 0
    assert len(found["local"].tokens) == 30
    for name in ("grpc", "mixed"):
        found[name].assert_same(found["local"])


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_a_worker_killed_with_frames_in_flight_is_not_noticed(
    tiny_mixtral: Path, transport: str, file_options: Callable[..., list[str]]
) -> None:
    """Stopped first, so that the frame is surely there; then killed, and started again."""
    with ExitStack() as cleanup:
        options = file_options(gateway=f"local_links: {str(transport == 'local').lower()}")
        served = cleanup.enter_context(
            stack(tiny_mixtral, workers=2, replicas=2, quantization="int8", gateway_args=options)
        )
        assert transports(served.url) == [transport] * 2
        expected = complete(served.url, PROMPT, 60)
        victim, found, frames = served.workers[0], Completion(), 0.0
        for event in events(served.url, body_of(PROMPT, 60, stream=True)):
            found.add(event)
            if len(found.tokens) == 3 and victim.popen.poll() is None:
                os.kill(victim.pid, signal.SIGSTOP)
                threading.Timer(0.1, victim.popen.kill).start()  # the engine waits for its answer by then
        assert (found.finish_reason, found.error) == ("length", None)
        expected.assert_same(found)
        await_metric(served.url, "worker_connected", lambda value: value == 1)
        frames = metric(served.url, "worker_failures_total")
        assert frames >= 1, "no frame was in flight"
        port = victim.address.rpartition(":")[2]
        cleanup.enter_context(running([*victim.argv, "--port", port]))
        await_metric(served.url, "worker_connected", lambda value: value == 2)
        assert transports(served.url) == [transport] * 2
        complete(served.url, PROMPT, 60).assert_same(expected)
        assert metric(served.url, "worker_failures_total") == frames


def test_nothing_is_left_of_a_killed_gateway(worker: Process, tiny_mixtral: Path, folder: Path) -> None:
    before, files = (mappings(worker), descriptors(worker)), sorted(folder.iterdir())
    common = ["--model", str(tiny_mixtral), "--quantization", "none", "--port", "0", "--threads", "1"]
    gateway = launch(["gateway", *common, "--group-endpoint", f"experts={worker.address}"])
    try:
        gateway.wait_listening()
        wait_ready(gateway)
        opened = iter(events(gateway.address, body_of(PROMPT, 400, stream=True)))
        next(opened)
        assert transports(gateway.address) == ["local"]
        assert mappings(worker) == before[0] + 1
        engines = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
        for pid in (*map(int, engines), gateway.pid):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(opened)
    finally:
        gateway.stop(signal.SIGKILL)
        assert gateway.popen.stdout is not None
        gateway.popen.stdout.close()
    await_true(lambda: mappings(worker) <= before[0], "the worker still maps the memory of a dead gateway")
    await_true(lambda: descriptors(worker) <= before[1], "the worker still has descriptors of a dead gateway")
    assert sorted(folder.iterdir()) == files
    assert describe(worker).hidden_size == HIDDEN


# -- a peer that is not what it says -----------------------------------------------------------------------------------


async def why_not(names: list[str], worker_id: str) -> str:
    try:
        link = await open_link(names, worker_id, SIZE, FORM, Mailbox(lambda _: None))
    except Exception as error:
        return str(error)
    link.lose(ConnectionError("the test is over"))  # type: ignore[arg-type] # nobody hears it
    return ""


def test_the_socket_of_another_worker_is_not_used(worker: Process) -> None:
    names = list(describe(worker).local_sockets)
    said = asyncio.run(why_not(names, "0" * 32))
    assert said.count("it refuses: it is meant for worker '00000000000000000000000000000000'") == len(names)


def test_sockets_that_cannot_be_reached_are_told_and_the_next_one_is_taken(worker: Process, tmp_path: Path) -> None:
    description = describe(worker)
    names, mine = list(description.local_sockets), description.worker_id
    lies = ["@consilium-nobody", str(tmp_path / "absent"), "", "x" * 4000, "/", "@", "a\0b"]
    said = asyncio.run(why_not(lies, mine))
    for name, reason in (
        ("@consilium-nobody", "Connection refused"),
        ("absent", "No such file"),
        ("xxx", "AF_UNIX path too long"),
    ):
        assert f"{name}: {reason}" in said
    assert asyncio.run(why_not(["@consilium-nobody", names[0]], mine)) == ""
    assert asyncio.run(why_not(["@consilium-nobody", names[1]], mine)) == ""  # the folder's, as between containers
    assert asyncio.run(why_not([], mine)) == "it offers no local socket"


def test_a_gateway_falls_back_and_says_why(worker: Process, caplog: pytest.LogCaptureFixture) -> None:
    """A Describe that names another worker's socket: frames go over gRPC."""
    sockets = list(describe(worker).local_sockets)

    async def main() -> None:
        lie = fake_workers.describe(worker_id="f" * 32, local_sockets=sockets)
        async with fake_workers.serving(lie) as (liar,), fake_workers.following(liar.address) as gateway:
            view = await gateway.until(fake_workers.connected(liar))
            assert [each.transport for each in view.statuses] == ["grpc"]
            call = gateway.send(liar)
            liar.answer(await liar.receive_call())
            await gateway.outcome(call)

    with caplog.at_level(logging.INFO, "gateway.worker_connection"):
        asyncio.run(main())
    assert "over gRPC alone: " in caplog.text
    assert f"it is meant for worker '{'f' * 32}'" in caplog.text


@contextmanager
def raw(worker: Process) -> Iterator[socket.socket]:
    """A connection to the worker's socket on which nothing was said."""
    with new_socket() as link:
        link.connect(socket_address(describe(worker).local_sockets[0]))
        link.settimeout(SECONDS)
        yield link


@contextmanager
def linked(worker: Process) -> Iterator[tuple[socket.socket, SharedMemory]]:
    """A link that the worker has taken, in the test's hands."""
    with raw(worker) as link:
        memory, descriptor = SharedMemory.create(SIZE)
        send_with_descriptor(link, hello(worker), descriptor)
        os.close(descriptor)
        welcome = expert_pb2.LinkWelcome.FromString(link.recv(PACKET))
        assert (welcome.protocol_version, welcome.error) == (PROTOCOL_VERSION, "")
        yield link, memory


def hello(worker: Process, **fields: object) -> bytes:
    said = {"protocol_version": PROTOCOL_VERSION, "worker_id": describe(worker).worker_id, **fields}
    return expert_pb2.LinkHello(**said).SerializeToString()  # type: ignore[arg-type] # its own two fields


def memfd(seals: int = 0) -> int:
    descriptor = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def refusal(link: socket.socket) -> str:
    """Why the worker refuses the link, which it closes then."""
    said = expert_pb2.LinkWelcome.FromString(link.recv(PACKET)).error
    assert link.recv(PACKET) == b""
    return said


def assert_serves(worker: Process) -> None:
    """Over a link and over gRPC."""
    frame = make_frame(HIDDEN, 1, [0, 3], 3)
    with conversation(worker.address) as stream:
        expected = rows_of(stream.ask(encode_call(frame, 1)).result, frame)
    with linked(worker) as (link, memory):
        packet = place(frame, FORM, memory)
        assert ask(link, packet) == Answer(1)
        assert torch.equal(result_rows(packet, FORM, memory), expected)


def ask(link: socket.socket, packet: CallPacket) -> Answer:
    link.send(packet.pack())
    return read_answer(link.recv(PACKET))


def test_hellos_that_are_none(worker: Process, tmp_path: Path) -> None:
    before = descriptors(worker), mappings(worker)
    (tmp_path / "file").write_bytes(bytes(SIZE))
    good = hello(worker)
    with raw(worker) as link:
        link.send(good)
        assert "no descriptor came" in refusal(link)
    refused = {
        "is no memfd": (good, os.open(tmp_path / "file", os.O_RDWR)),
        "must be sealed": (good, memfd()),
        "is no LinkHello": (b"\xff" * 100, memfd()),
        "no LinkHello": (good[:-3], memfd()),
        "protocol version 99": (hello(worker, protocol_version=99), memfd()),
        "it is meant for worker 'x": (hello(worker, worker_id="x" * 5000), memfd()),
    }
    for said, (packet, descriptor) in refused.items():
        with raw(worker) as link:
            send_with_descriptor(link, packet, descriptor)
            os.close(descriptor)
            assert said in refusal(link)
    with raw(worker) as link:
        pass  # gone without a word
    with raw(worker) as link:
        many = [memfd() for _ in range(8)]
        socket.send_fds(link, [good], many)
        for each in many:
            os.close(each)
        assert "must be sealed" in refusal(link)
    assert_serves(worker)
    await_true(lambda: descriptors(worker) <= before[0], "descriptors stay behind")
    await_true(lambda: mappings(worker) <= before[1], "memory stays mapped")


def test_packets_that_are_none_end_their_own_link(worker: Process) -> None:
    frame = make_frame(HIDDEN, 1, [0], 2)
    whole = packet_of(frame).pack()
    with linked(worker) as (good, memory):
        for packet in (b"\xff" * 200, whole[:-5], whole[:1], whole + b"\0", whole + bytes(2 * PACKET)):
            with linked(worker) as (link, _):
                link.send(packet)
                assert link.recv(PACKET) == b""
        assert ask(good, place(frame, FORM, memory, 5)) == Answer(5), "another link goes on"
    assert_serves(worker)


def test_calls_in_memory_that_lie(worker: Process) -> None:
    frame = make_frame(HIDDEN, 1, [0, 3], 200)
    with linked(worker) as (link, memory):
        good = place(frame, FORM, memory)
        assert ask(link, good) == Answer(1)
        with conversation(worker.address) as stream:
            expected = rows_of(stream.ask(encode_call(frame, 1)).result, frame)
        assert torch.equal(result_rows(good, FORM, memory), expected)
        numbers = memory.array((5 + 400,), np.int32, 0)
        for where, what in ((0, "experts"), (3, "offsets: "), (5, "indices: must lie in 0..199")):
            for value in (201, -1, 2**31 - 1, -(2**31)):
                place(frame, FORM, memory)
                numbers[where] = value
                assert what in ask(link, good).error
        place(frame, FORM, memory)
        for begin in (SIZE, SIZE - 64, 2**64 - 64, 3):
            assert "do not lie in the shared memory" in ask(link, good._replace(begin=begin)).error
        most = 2**32 - 1
        for lie in (good._replace(rows=most), good._replace(experts=most), good._replace(pairs=most)):
            assert "do not lie in the shared memory" in ask(link, lie).error
        assert ask(link, good) == Answer(1)
    assert_serves(worker)


def test_numbers_that_change_while_they_are_computed(worker: Process) -> None:
    """Every call is answered, with rows or with an error, and the worker lives."""
    with linked(worker) as (link, memory):
        done = threading.Event()
        packet = place(make_frame(HIDDEN, 1, [0, 3], 200), FORM, memory)
        numbers = memory.array((5 + 400,), np.int32, 0)
        good = numbers.copy()

        def change() -> None:
            while not done.is_set():
                numbers.fill(0x7F7F7F7F)
                numbers[:] = good

        changer = threading.Thread(target=change)
        changer.start()
        try:
            answers = [ask(link, packet) for _ in range(200)]
        finally:
            done.set()
            changer.join(SECONDS)
    assert {each.error.partition(":")[0] for each in answers} <= {"", "DATA_LOSS", "FAILED_PRECONDITION"}
    assert_serves(worker)


def test_links_that_end_in_the_middle(worker: Process) -> None:
    before = mappings(worker)
    for _ in range(20):
        with linked(worker) as (link, memory):
            link.send(place(make_frame(HIDDEN, 1, [0, 3], 900), FORM, memory).pack())
    assert_serves(worker)
    # Fewer where the last test's link was still to be closed.
    await_true(lambda: mappings(worker) <= before, "the memory of links that ended is still mapped")


def test_an_offset_has_no_place_in_a_grpc_call_without_an_attachment(worker: Process) -> None:
    """Nor does a shape of more sizes than could ever be multiplied."""
    frame = make_frame(HIDDEN, 1, [0], 1)
    outside, odd = encode_call(frame, 1, place=lambda _: 0), encode_call(frame, 2)
    odd.rows.shape[:] = [2**32 - 1] * 1_000_000
    with conversation(worker.address) as stream:
        assert "nothing is there" in stream.ask(outside).error.message
        assert "rows: expected shape" in stream.ask(odd).error.message
        assert stream.ask(encode_call(frame, 4)).HasField("result")


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A socket's path has about 100 characters at most, and pytest's own folders may take most of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_folder_holds_the_sockets_of_the_living_alone(
    tiny_mixtral: Path, short_folder: Path, file_options: Callable[..., list[str]]
) -> None:
    (short_folder / f"notes{SUFFIX}").write_text("not a socket, and not ours to remove")
    options = file_options(worker=f"socket_folder: {short_folder}")
    argv = worker_argv("0", "--model", str(tiny_mixtral), "--quantization", "none", *options)

    def sockets() -> set[Path]:
        return {each for each in short_folder.iterdir() if each.is_socket()}

    with running(argv) as first:
        path = Path(describe(first).local_sockets[1])
        assert sockets() == {path}
        with running(argv) as second:
            assert sockets() == {path, Path(describe(second).local_sockets[1])}, "the living one's was left alone"
            second.stop()
            assert sockets() == {path}
            first.stop(signal.SIGKILL)
        assert sockets() == {path}, "nobody could remove it"
        with running(argv) as third:
            assert sockets() == {Path(describe(third).local_sockets[1])}
    assert [each.name for each in short_folder.iterdir()] == [f"notes{SUFFIX}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "it must be a folder that exists"), ("x" * 120, "choose another worker.socket_folder")],
)
def test_a_folder_that_cannot_be_used(
    tiny_mixtral: Path, tmp_path: Path, name: str, said: str, file_options: Callable[..., list[str]]
) -> None:
    if name != "absent":
        (tmp_path / name).mkdir()
    options = file_options(worker=f"socket_folder: {tmp_path / name}")
    process = launch(worker_argv("0", "--model", str(tiny_mixtral), "--quantization", "none", *options), tmp_path)
    assert process.wait(SECONDS) == 1
    assert process.popen.stdout is not None
    process.popen.stdout.close()
    assert said in process.log()
    assert "Traceback" not in process.log()
