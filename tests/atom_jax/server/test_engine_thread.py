"""The engine's thread alone: who calls the engine, how often the event loop is woken, what is given up."""

import asyncio
import threading

import pytest

from atom_jax.engine import RequestParams
from atom_jax.errors import AtomError
from atom_jax.server.engine_thread import EngineThread, Stopped
from tests.atom_jax.server.fake import FakeEngine, expected

FOREVER = RequestParams(max_new_tokens=10**6)


def run(scenario, engine=None, **options):
    """Runs ``scenario(thread, engine)`` in an event loop with the thread started."""
    engine = engine or FakeEngine(step_seconds=0.001)

    async def main():
        thread = EngineThread(engine, **options)
        thread.start()
        try:
            return await scenario(thread, engine)
        finally:
            await thread.stop()

    return asyncio.run(main())


async def collect(stream):
    texts = {}
    async for index, output in stream:
        texts[index] = texts.get(index, "") + output.text
    return texts


async def settled(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_groups_get_their_own_outputs():
    async def scenario(thread, engine):
        requests = [([1, 2], RequestParams(max_new_tokens=5)), ([9], RequestParams(max_new_tokens=3, seed=4))]
        # Answers that do not end before they are counted, however busy the machine is.
        endless = [await thread.submit([([1], FOREVER), ([2], FOREVER)]) for _ in range(3)]
        assert thread.in_flight == 6
        for stream in endless:
            stream.close()
        await settled(lambda: thread.in_flight == 0 and not engine.requests)
        groups = [await thread.submit(requests) for _ in range(3)]
        for texts in await asyncio.gather(*map(collect, groups)):
            assert texts == {0: expected([1, 2], 5), 1: expected([9], 3, seed=4)}
        assert thread.in_flight == 0
        assert engine.threads and threading.get_ident() not in engine.threads and len(engine.threads) == 1

    run(scenario)


def test_one_wake_up_a_step(monkeypatch):
    async def scenario(thread, engine):
        loop, wake_ups = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe

        def counted(callback, *args):
            wake_ups.append(callback.__name__)
            return wake(callback, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        stream = await thread.submit([([n], RequestParams(max_new_tokens=8)) for n in range(4)])
        await collect(stream)
        assert engine.generated == 32
        assert wake_ups.count("_deliver") == engine.steps <= 9

    run(scenario)


def test_a_refused_request_takes_back_its_group():
    async def scenario(thread, engine):
        with pytest.raises(AtomError, match="found 1000"):
            await thread.submit([([1], FOREVER), ([1000], FOREVER)])
        assert thread.in_flight == 0 and not engine.requests

    run(scenario)


def test_close_frees_the_pages():
    async def scenario(thread, engine):
        stream = await thread.submit([([1], FOREVER), ([2], FOREVER)])
        await anext(stream)
        stream.close()
        stream.close()
        assert thread.in_flight == 0
        await settled(lambda: thread.stats.free_pages == engine.num_pages)
        assert engine.aborted == 2

    run(scenario)


def test_whoever_leaves_before_the_answer_leaves_nothing():
    async def scenario(thread, engine):
        task = asyncio.create_task(thread.submit([([1], FOREVER)]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(lambda: thread.in_flight == 0 and not engine.requests)

    run(scenario)


def test_time_is_over():
    async def scenario(thread, engine):
        stream = await thread.submit([([1], FOREVER)], timeout=0.05)
        with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
            await collect(stream)
        await settled(lambda: not engine.requests)

    run(scenario)


def test_a_closed_group_leaves_no_timer():
    async def scenario(thread, _):
        stream = await thread.submit([([1], RequestParams(max_new_tokens=2))], timeout=300)
        await collect(stream)
        stream.close()
        assert stream.expiry.cancelled()

    run(scenario)


def test_stop_ends_what_runs():
    async def scenario(thread, _):
        stream = await thread.submit([([1], FOREVER)])
        await thread.stop()
        with pytest.raises(Stopped, match="shutting down"):
            await collect(stream)
        with pytest.raises(Stopped):
            await thread.submit([([1], FOREVER)])

    run(scenario)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_answers_everybody():
    told = []

    async def scenario(thread, engine):
        stream = await thread.submit([([1], FOREVER)])
        engine.broken = RuntimeError("no more device")
        with pytest.raises(Stopped, match="engine failed"):
            await collect(stream)
        with pytest.raises(Stopped):
            await thread.submit([([1], FOREVER)])
        assert thread.failure is engine.broken and told == [True]

    run(scenario, on_failure=lambda: told.append(True))


def test_latency_is_reported_twice():
    seen = []

    async def scenario(thread, _):
        await collect(await thread.submit([([1], RequestParams(max_new_tokens=4))]))

    run(scenario, on_progress=lambda latency: seen.append((latency.ended is None, latency.tokens)))
    assert seen == [(True, 1), (False, 4)]
