"""Process-wide state: forced paths, statistics and the probe hold per thread and task, and caches survive threads,
processes and swapped parameters."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, func

from kernelbank import Mixer, use_path
from kernelbank.ops import context, expansion, machine, plan, scope
from kernelbank.ops.machine import unprobed
from kernelbank.ops.paths import PathError
from kernelbank.ops.scope import Scope
from kernelbank.ops.statistics import over_processes, synchronised

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
X = torch.linspace(-1, 1, 2 * 16 * 16).view(2, 16, 16)


def in_another_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_path_forced_in_one_thread_is_not_forced_in_another() -> None:
    """`dwsa` has no softmax: it would raise PathError where sdpa is forced."""
    forced, free = Mixer("vit", 16, 2, (4, 4)), Mixer("dwsa", 16, 2, (4, 4))
    stop, errors = threading.Event(), list[Exception]()

    def run_freely() -> None:
        while not stop.is_set():
            try:
                free(X)
            except PathError as error:
                errors.append(error)

    thread = threading.Thread(target=run_freely)
    thread.start()
    for _ in range(100):
        with use_path("sdpa"):
            forced(X)
    stop.set()
    thread.join()
    assert not errors


def test_a_path_forced_in_one_task_is_not_forced_in_another() -> None:
    mixer = Mixer("dwsa", 16, 2, (4, 4))
    entered, done = asyncio.Event(), asyncio.Event()

    async def force() -> None:
        with use_path("sdpa"):
            entered.set()
            await done.wait()
            with pytest.raises(PathError, match="sdpa"):
                mixer(X)

    async def run_freely() -> None:
        await entered.wait()
        mixer(X)
        done.set()

    async def both() -> None:
        await asyncio.gather(force(), run_freely())

    asyncio.run(both())


def test_statistics_and_the_probe_are_fixed_in_their_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with synchronised():
        with synchronised():
            pass
        assert over_processes() and in_another_thread(over_processes) is False
    assert not over_processes()
    monkeypatch.setattr(machine, "probe", lambda device="cpu", dtype=None: machine.Machine(device, reason="measured"))
    monkeypatch.setattr(machine, "_probed", {})
    with unprobed():
        assert "the run" in machine.machine().reason
        assert in_another_thread(lambda: machine.machine().reason) == "measured"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("traceable", [scope.TRACEABLE, False])
def test_a_compiled_mixer_follows_the_path_that_is_forced_later(
    traceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a torch that traces context variables: a graph compiled under no path is not used under one."""
    monkeypatch.setattr(scope, "TRACEABLE", traceable)
    torch._dynamo.reset()
    mixer = Mixer("vit", 16, 2, (4, 4)).eval()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = mixer(X)
        assert torch.allclose(compiled(X), expected, atol=1e-6)
        with use_path("conv"):
            assert torch.allclose(compiled(X), expected, atol=1e-6)
        with use_path("shifts"), pytest.raises(torch._dynamo.exc.Unsupported, match="does not support"):
            compiled(X)
        assert torch.allclose(compiled(X), expected, atol=1e-6)
    torch._dynamo.reset()


def test_scopes_nest_and_end_with_an_error() -> None:
    value: Scope[int] = Scope("test_scopes", 0)
    with pytest.raises(RuntimeError), value.entered(1):
        with value.entered(2):
            assert value.get() == 2 and in_another_thread(value.get) == 0
        assert value.get() == 1
        raise RuntimeError
    assert value.get() == 0


def test_the_input_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(plan, "check_input", lambda *arguments: calls.append(context.check_input(*arguments)))
    Mixer("vit", 16, 2, (4, 4))(X)
    assert len(calls) == 1


# ---- expansions ------------------------------------------------------------------------------------------


def test_parameters_with_expansions_can_be_swapped() -> None:
    """torch swaps no tensor that has a weak reference."""
    mixer = Mixer("dwsa", 16, 2, (4, 4)).eval()
    gc.collect()  # mixers of other tests, which graphs may hold in cycles
    before = len(expansion._CACHE)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            expected = mixer(X)
            assert len(expansion._CACHE) == before + 1
            assert torch.allclose(mixer.double()(X.double()).float(), expected, atol=1e-5)
            assert torch.allclose(mixer.float()(X), expected, atol=1e-5)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    del mixer
    gc.collect()
    assert len(expansion._CACHE) == before


def test_tables_of_one_storage_have_an_expansion_each() -> None:
    """As parameters of a flat buffer have: neither is computed again for the other's sake."""
    flat = torch.randn(2, 3, 7, 7)
    count = [0]

    def compute(table: Tensor) -> Tensor:
        count[0] += 1
        return table * 2

    for _ in range(3):
        for table in (flat[0], flat[1]):
            assert torch.equal(expansion.expanded((table,), "twice", lambda table=table: compute(table)), table * 2)
    assert count[0] == 2
    flat[0].add_(1)
    assert torch.equal(expansion.expanded((flat[0],), "twice", lambda: compute(flat[0])), flat[0] * 2)
    assert count[0] == 3


def test_threads_share_expansions() -> None:
    mixer, errors = Mixer("dwsa", 16, 2, (4, 4)).eval(), list[float]()
    with torch.no_grad():
        expected = mixer(X)

    def run() -> None:
        with torch.no_grad():
            for step in range(30):
                expansion._CACHE.pop(mixer.tensors()["table.weight"].untyped_storage(), None) if step % 3 == 0 else None
                errors.append(float((mixer(X) - expected).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 120 and max(errors) < 1e-6


# ---- processes -------------------------------------------------------------------------------------------


def _answer(mixer: Mixer, x: Tensor, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), use_path("vectorised"):
        pipe.send(float(mixer(x).double().sum()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_a_process_started_while_locks_are_held(method: str) -> None:
    """A thread of the parent holds every lock while the child starts: a forked child has them open."""
    mixer = Mixer("dwsa", 16, 2, (4, 4)).eval()
    with torch.no_grad():
        expected = float(mixer(X).double().sum())
    locks = [expansion._LOCK, plan._LOCK, machine._LOCK]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[0], locks[1], locks[2]:
            held.set()
            release.wait(400)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    start = multiprocessing.get_context(method)
    ours, theirs = start.Pipe()
    process = start.Process(target=_answer, args=(mixer, X, theirs))
    process.start()
    try:
        assert ours.poll(300), f"a child started by {method} hangs"
        assert ours.recv() == pytest.approx(expected, rel=1e-5)
    finally:
        release.set()
        thread.join()
        process.join(60)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0


# ---- the probe -------------------------------------------------------------------------------------------


def test_transforms_and_graphs_start_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a process may be inside a transform, which would run on the probe's tensors too."""
    monkeypatch.setattr(machine, "_probed", {})
    monkeypatch.setattr(machine, "probe", lambda device="cpu": pytest.fail("probed"))
    mixer = Mixer("relu_attention", 16, 2, (4, 4)).eval()
    parameters = dict(mixer.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return func.functional_call(mixer, p, (x[None],)).square().sum()

    assert func.vmap(func.grad(loss), (None, 0))(parameters, X)
    func.jvp(mixer, (X,), (X,))
    torch.export.export(mixer, (X,))
