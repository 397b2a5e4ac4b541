"""Batches of a fake signature, which tells what ran together and waits when a test says so."""

import asyncio
import random
import threading
import weakref

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.serving import batching
from bertgen_tf.serving.batching import Batcher, QueueFull, RequestTooLarge, is_client_error
from bertgen_tf.serving.pricing import Cost, Size, row_sizes

SECONDS = 60  # until a test that hangs fails


class Fake:
    """Gives its texts back; `bad` ones fail the run."""

    name = "fake"
    max_length = None
    clock = None

    def __init__(self, max_batch_size=4, has_rows=True, inputs=("text",)):
        self.max_batch_size = max_batch_size
        self.has_rows = has_rows
        self.inputs = dict.fromkeys(inputs)
        self.cost = Cost()
        self.runs = []
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.running = threading.Lock()

    def run(self, inputs):
        assert self.running.acquire(blocking=False), "two runs at a time"
        try:
            first = next(iter(inputs.values()))
            self.runs.append(first.tolist())
            self.started.set()
            assert self.go_on.wait(SECONDS)
            if "bad" in first.reshape(-1).tolist():
                raise tf.errors.InvalidArgumentError(None, None, "bad")
            return self.answer(inputs)
        finally:
            self.running.release()

    def answer(self, inputs):
        return {"out": inputs["text"]}


def texts(*values):
    return {"text": np.array(values, object)}


def run(test, **options):
    """Runs `test(batcher)`."""

    async def main():
        batcher = Batcher(**options)
        try:
            async with asyncio.timeout(SECONDS):
                await test(batcher)
        finally:
            await batcher.close()

    asyncio.run(main())


async def hold(batcher, signature):
    """A request that runs, and holds up all others until `go_on`."""
    signature.started.clear()
    signature.go_on.clear()
    task = asyncio.create_task(batcher.run(signature, texts("first")))
    assert await asyncio.to_thread(signature.started.wait, SECONDS)
    return task


async def start(batcher, signature, *all_inputs):
    tasks = [asyncio.create_task(batcher.run(signature, inputs)) for inputs in all_inputs]
    await asyncio.sleep(0)  # each is in the queue
    return tasks


async def outputs(tasks):
    return [(await task).outputs["out"].tolist() for task in tasks]


def test_what_waits_is_one_batch():
    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        tasks = await start(batcher, fake, texts("a"), texts("b", "c"))
        assert batcher.queued == 3
        fake.go_on.set()
        assert await outputs([first, *tasks]) == [["first"], ["a"], ["b", "c"]]
        assert fake.runs == [["first"], ["a", "b", "c"]]
        assert (await tasks[0]).batch_size == 3
        assert batcher.queued == 0

    run(test)


def test_everybody_gets_his_own():
    async def test(batcher):
        fake = Fake(max_batch_size=8)
        draw = random.Random(0)
        requests = [
            [f"{number}-{row}" for row in range(draw.randrange(12))] for number in range(300)
        ]
        tasks = await start(batcher, fake, *(texts(*request) for request in requests))
        assert await outputs(tasks) == requests
        assert max(map(len, fake.runs)) == 8
        # Empty ones run alone.
        assert len([run for run in fake.runs if run]) <= sum(map(len, requests)) // 8 + 1

    run(test)


def test_long_requests_are_split_and_joined():
    async def test(batcher):
        fake = Fake()
        values = list("abcdefghij")
        result = await batcher.run(fake, texts(*values))
        assert result.outputs["out"].tolist() == values
        assert [len(run) for run in fake.runs] == [4, 4, 2]
        assert result.batch_size == 4

    run(test)


def test_short_requests_do_not_wait_for_a_long_one():
    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        long, short = await start(batcher, fake, texts(*"abcdefghijkl"), texts("short"))
        fake.go_on.set()
        assert await outputs([first, long, short]) == [["first"], list("abcdefghijkl"), ["short"]]
        assert fake.runs[1:] == [[*"abc", "short"], list("defg"), list("hijk"), ["l"]]

    run(test)


class Clock:
    """The time of the batcher, which runs advance."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    monkeypatch.setattr(Fake, "clock", clock)
    return clock


class Priced(Fake):
    """Takes `fixed` seconds, and 1 for a row."""

    def __init__(self, fixed=0.0, known=True, **options):
        super().__init__(**options)
        self.fixed = fixed
        for count in (1, 2) if known else ():
            sizes = row_sizes(texts(*[b"text"] * count), count, None)
            self.cost.learn(sizes.padded, fixed + count)

    def run(self, inputs):
        self.clock.now += self.fixed + len(inputs["text"])
        return super().run(inputs)


def priced(*values):
    return texts(*(f"{value:04}".encode() for value in values))


def test_rows_of_a_long_request_fill_a_batch_up_to_its_time():
    async def test(batcher):
        fake = Priced(max_batch_size=8)
        await batcher.run(fake, priced(*range(7)))
        assert [len(run) for run in fake.runs] == [3, 3, 1]
        # So do rows of different requests.
        fake.runs.clear()
        tasks = await run_together(batcher, fake, *(priced(value) for value in range(5)))
        await outputs(tasks)
        assert [len(run) for run in fake.runs] == [3, 2]

    run(test, batch_seconds=3.5)


def test_batches_of_slow_rows_are_of_several_too():
    """Or no batch would show that several rows take hardly longer than one."""

    async def test(batcher):
        fake = Priced(max_batch_size=16, fixed=7.0, known=False)
        for _ in range(4):
            await batcher.run(fake, priced(*range(24)))
        # Two single rows take 16 seconds, and so do 9 together.
        assert min(len(run) for run in fake.runs[-3:-1]) >= 8

    run(test, batch_seconds=1.0)


def test_a_batch_that_took_half_its_time_is_followed_by_a_larger_one():
    """Even if the estimate says that it would take too long."""

    async def test(batcher):
        fake = Priced(max_batch_size=16)
        fake.cost.seconds = lambda size: 100.0
        fake.cost.target = lambda size, rows, seconds: 4.0
        await batcher.run(fake, priced(*range(10)))
        assert [len(run) for run in fake.runs] == [1, 2, 4, 3]

    run(test)


def test_a_price_that_was_due_to_a_disturbance_is_not_for_ever():
    async def test(batcher):
        fake = Priced(max_batch_size=8)
        for count in (1, 2):
            sizes = row_sizes(texts(*[b"text"] * count), count, None)
            fake.cost.learn(sizes.padded, 50.0 * count)
        refused = 0
        for _ in range(100):
            try:
                await batcher.run(fake, priced(*range(8)))
                break
            except RequestTooLarge:
                refused += 1
        assert 0 < refused < 50
        for _ in range(20):
            await batcher.run(fake, priced(*range(8)))

    run(test, request_timeout=60, batch_seconds=4.5)


def test_the_first_batch_of_an_unknown_signature_says_nothing():
    async def test(batcher):
        fake = Priced(known=False)
        await batcher.run(fake, priced(1))
        assert not fake.cost.is_known
        await batcher.run(fake, priced(1))
        sizes = row_sizes(priced(1), 1, None)
        assert fake.cost.seconds(sizes.padded) == pytest.approx(1.0, rel=1e-3)

    run(test)


def test_a_single_text_waits_for_two_batches_at_most():
    async def test(batcher):
        one, other = Priced(max_batch_size=2), Priced(max_batch_size=2)
        order = []
        one.answer = lambda inputs: order.append("long") or {"out": inputs["text"]}
        other.answer = lambda inputs: order.append("short") or {"out": inputs["text"]}
        long = await start(batcher, one, *(priced(*range(20)) for _ in range(3)))
        waits = []
        for number in range(6):
            one.go_on.clear()
            one.started.clear()
            assert await asyncio.to_thread(one.started.wait, SECONDS)
            before = len(order)
            (short,) = await start(batcher, other, priced(number))
            one.go_on.set()
            await short
            waits.append(order[before:].index("short"))
        await outputs(long)
        assert max(waits) <= 2 and order.count("long") == 30

    run(test, batch_seconds=2.5)


def test_new_texts_cannot_starve_a_long_request():
    async def test(batcher):
        fake = Fake(max_batch_size=2)
        first = await hold(batcher, fake)
        (long,) = await start(batcher, fake, texts(*"abcdef"))
        done = 0

        async def client(number):
            nonlocal done
            while not long.done():
                await batcher.run(fake, texts(str(number)))
                done += 1

        clients = [asyncio.create_task(client(number)) for number in range(20)]
        await asyncio.sleep(0)
        fake.go_on.set()
        await outputs([first, long])
        assert done < 60
        await asyncio.gather(*clients)

    run(test)


def test_what_takes_too_long_alone_is_refused_with_the_number_that_does_not():
    async def test(batcher):
        fake = Priced()
        with pytest.raises(RequestTooLarge, match=r"about 11 seconds, and may take 10\. Send at mo"
                           r"st 10 such texts"):  # fmt: skip
            await batcher.run(fake, priced(*range(11)))
        assert not fake.runs and not batcher.queued
        assert len((await batcher.run(fake, priced(*range(10)))).outputs["out"]) == 10
        # A text is never too large.
        long = texts(b"text" * 1000)
        assert (await batcher.run(fake, long)).outputs["out"].tolist() == long["text"].tolist()
        assert (await batcher.run(Fake(), texts(*"a" * 5000))).batch_size == 4

    run(test, request_timeout=30, max_queued=10_000)


def test_what_cannot_be_answered_in_time_is_refused():
    async def test(batcher):
        fake, other = Priced(), Fake()
        first = await hold(batcher, other)
        tasks = await start(batcher, fake, *(priced(*range(9)) for _ in range(3)))
        with pytest.raises(QueueFull, match="would take about 36 seconds, and may take 30"):
            await batcher.run(fake, priced(*range(9)))
        # A short one waits for a few rows of each only.
        tasks += await start(batcher, fake, priced(1))
        assert round(batcher.queued_seconds) == 28
        other.go_on.set()
        await outputs([first, *tasks])
        assert batcher.queued_seconds == 0

    run(test, request_timeout=30)


def test_a_cancelled_request_enters_no_further_batch():
    async def test(batcher):
        fake = Fake()
        fake.go_on.clear()
        (long,) = await start(batcher, fake, texts(*"abcdefghijkl"))
        assert await asyncio.to_thread(fake.started.wait, SECONDS)
        fake.clock.now += 3.0
        assert batcher.busy_seconds == 3.0
        long.cancel()
        await asyncio.sleep(0)
        fake.go_on.set()
        await batcher.run(fake, texts("next"))
        assert fake.runs == [list("abcd"), ["next"]]
        assert batcher.queued == batcher.busy_seconds == 0

    run(test)


def test_what_was_cancelled_is_not_run_again_when_its_batch_fails():
    async def test(batcher):
        fake = Fake()
        other = Fake()
        first = await hold(batcher, other)
        tasks = await start(batcher, fake, texts("a"), texts("bad"))
        fake.go_on.clear()
        other.go_on.set()
        await first
        assert await asyncio.to_thread(fake.started.wait, SECONDS)
        tasks[0].cancel()
        await asyncio.sleep(0)
        fake.go_on.set()
        with pytest.raises(tf.errors.InvalidArgumentError):
            await tasks[1]
        assert fake.runs == [["a", "bad"], ["bad"]]

    run(test)


def test_long_texts_do_not_hold_up_short_ones():
    async def test(batcher):
        fake = Fake()
        short, long = texts(b"short"), texts(b"long " * 1000)
        tasks = await run_together(batcher, fake, short, long, short)
        await outputs(tasks)
        assert [len(run) for run in fake.runs] == [2, 1]

    run(test)


def test_a_surprise_does_not_change_what_is_expected_by_much():
    async def test(batcher):
        fake = Fake()
        fake.cost.learn(Size(100.0, 0.0), 1e-4)
        before = fake.cost.seconds(Size(100.0, 0.0))
        fake.answer = lambda inputs: setattr(fake.clock, "now", 0.2) or {"out": inputs["text"]}
        await batcher.run(fake, texts(b"a"))
        assert before < fake.cost.seconds(Size(100.0, 0.0)) < 10 * before

    run(test)


def test_texts_run_in_their_order_whatever_the_signature():
    async def test(batcher):
        one, other = Fake(max_batch_size=1), Fake(max_batch_size=1)
        order = []
        one.answer = lambda inputs: order.append("one") or {"out": inputs["text"]}
        other.answer = lambda inputs: order.append("other") or {"out": inputs["text"]}
        first = await hold(batcher, one)
        tasks = await start(batcher, one, texts("a"), texts("b"))
        tasks += await start(batcher, other, texts("c"))
        tasks += await start(batcher, one, texts("d"))
        one.go_on.set()
        await outputs([first, *tasks])
        assert order == ["one", "one", "one", "other", "one"]

    run(test)


def test_a_bad_row_fails_its_request_only():
    async def test(batcher):
        fake = Fake(max_batch_size=8)
        first = await hold(batcher, fake)
        tasks = await start(
            batcher, fake, texts("a"), texts("b"), texts("c", "bad"), texts("d"), texts("e")
        )
        fake.go_on.set()
        good = [task for task in tasks if task is not tasks[2]]
        assert await outputs([first, *good]) == [["first"], ["a"], ["b"], ["d"], ["e"]]
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            await tasks[2]
        assert is_client_error(error.value)

    run(test)


def test_a_request_that_fails_leaves_the_queue():
    async def test(batcher):
        fake = Fake(max_batch_size=1)
        with pytest.raises(tf.errors.InvalidArgumentError):
            await batcher.run(fake, texts("bad", *"abcdefg"))
        assert batcher.queued == 0
        assert (await batcher.run(fake, texts("next"))).outputs["out"].tolist() == ["next"]
        assert len(fake.runs) <= 3

    run(test)


def test_an_answer_that_cannot_be_joined_fails_alone():
    class Fickle(Fake):
        def answer(self, inputs):
            return {f"out{len(self.runs)}": inputs["text"]}

    async def test(batcher):
        with pytest.raises(KeyError):
            await batcher.run(Fickle(max_batch_size=1), texts("a", "b"))
        assert (await batcher.run(Fake(), texts("next"))).outputs["out"].tolist() == ["next"]

    run(test)


@pytest.mark.parametrize(
    "error", [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "no memory")]
)
def test_where_memory_is_short_there_is_no_second_run(error):
    class Hungry(Fake):
        def answer(self, inputs):
            if len(self.runs) > 1:
                raise error
            return super().answer(inputs)

    async def test(batcher):
        hungry = Hungry()
        first = await hold(batcher, hungry)
        others = await start(batcher, hungry, texts("a"), texts("b"), texts("c"))
        hungry.go_on.set()
        await first
        results = await asyncio.gather(*others, return_exceptions=True)
        assert [type(result) for result in results] == [type(error)] * 3
        assert len(hungry.runs) == 2

    run(test)


def test_errors_of_the_server_are_not_the_clients():
    assert not is_client_error(tf.errors.InternalError(None, None, "XLA compilation disabled"))
    assert not is_client_error(ValueError("a bug"))


def test_full_queue():
    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        tasks = await start(batcher, fake, texts("a", "b"), texts("c"))
        with pytest.raises(QueueFull, match="3 texts wait, but at most 4 may"):
            await batcher.run(fake, texts("d", "e"))
        tasks += await start(batcher, fake, texts("f"))
        with pytest.raises(QueueFull):
            await batcher.run(fake, texts())  # a request without texts counts, too
        tasks[0].cancel()
        await asyncio.sleep(0)
        tasks += await start(batcher, fake, texts("g", "h"))
        assert batcher.queued == 4
        fake.go_on.set()
        assert await outputs([first, *tasks[1:]]) == [["first"], ["c"], ["f"], ["g", "h"]]
        assert ["a"] not in fake.runs and batcher.queued == 0

    run(test, max_queued=4)


def test_what_nobody_waits_for_is_not_run():
    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        tasks = await start(batcher, fake, texts("a"), texts("b"))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher.queued == 0
        fake.go_on.set()
        await first
        assert (await batcher.run(fake, texts("c"))).outputs["out"].tolist() == ["c"]
        assert fake.runs == [["first"], ["c"]]

    run(test)


def test_a_lone_client_does_not_wait():
    async def test(batcher):
        fake = Fake()
        for value in "abc":
            await batcher.run(fake, texts(value))
        assert fake.runs == [["a"], ["b"], ["c"]]

    run(test, patience=10 * SECONDS)


def test_several_clients_wait_for_each_other():
    """Until as many are there as the last time."""

    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        tasks = await start(batcher, fake, texts("a"), texts("b"), texts("c"))
        fake.go_on.set()
        await outputs([first, *tasks])
        tasks = await start(batcher, fake, texts("d"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(fake.runs) == 2
        tasks += await start(batcher, fake, texts("e", "f"))
        assert await outputs(tasks) == [["d"], ["e", "f"]]
        assert fake.runs[2:] == [["d", "e", "f"]]

    run(test, patience=10 * SECONDS)


def test_patience_ends():
    async def test(batcher):
        fake = Fake()
        await batcher.run(fake, texts("a", "b"))
        await batcher.run(fake, texts("c"))
        assert fake.runs == [["a", "b"], ["c"]]

    run(test, patience=0.001)


def ids(*rows, mask=True, mask_columns=None):
    rows = np.array(rows, np.int32)
    inputs = {"input_ids": rows}
    if mask:
        inputs["attention_mask"] = np.ones((len(rows), mask_columns or rows.shape[1]), np.int32)
    return inputs


def fake_for_ids(**options):
    fake = Fake(inputs=("input_ids", "attention_mask"), **options)
    fake.answer = lambda inputs: {"out": inputs["input_ids"] * 1, "seen": inputs["input_ids"]}
    return fake


async def run_together(batcher, fake, *requests):
    other = Fake()
    first = await hold(batcher, other)
    tasks = await start(batcher, fake, *requests)
    other.go_on.set()
    await first
    return tasks


def test_masked_ids_of_different_lengths_share_a_batch():
    async def test(batcher):
        fake = fake_for_ids()
        masks = []
        answer = fake.answer
        fake.answer = lambda inputs: masks.append(inputs["attention_mask"]) or answer(inputs)
        tasks = await run_together(batcher, fake, ids([1, 2, 3]), ids([4, 5, 6, 7, 8]))
        assert await outputs(tasks) == [[[1, 2, 3, 0, 0]], [[4, 5, 6, 7, 8]]]
        assert masks[0].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] and len(masks) == 1

    run(test)


def test_lengths_that_differ_much_do_not_share_a_batch():
    async def test(batcher):
        fake = fake_for_ids()
        tasks = await run_together(batcher, fake, ids([1] * 3), ids([1] * 1000))
        assert [len(row) for (row,) in await outputs(tasks)] == [3, 1000]

    run(test)


def test_unmasked_lengths_do_not_share_a_batch():
    async def test(batcher):
        fake = fake_for_ids()
        fake.inputs = {"input_ids": None}
        requests = [ids([1, 2], mask=False), ids([3], mask=False), ids([4], mask=False)]
        tasks = await run_together(batcher, fake, *requests)
        assert await outputs(tasks) == [[[1, 2]], [[3]], [[4]]]
        assert fake.runs == [[[1, 2]], [[3], [4]]]

    run(test)


def test_padding_does_not_hide_that_ids_and_mask_differ():
    async def test(batcher):
        fake = fake_for_ids()
        shapes = []
        fake.answer = lambda inputs: (
            shapes.append([x.shape for x in inputs.values()]) or {"out": inputs["input_ids"]}
        )
        tasks = await run_together(batcher, fake, ids([1, 2, 3], mask_columns=2), ids([4] * 9))
        await outputs(tasks)
        assert [(1, 3), (1, 2)] in shapes

    run(test)


def test_inputs_of_different_numbers_of_rows_are_for_the_graph_to_judge():
    async def test(batcher):
        fake = Fake(inputs=("text", "other"))
        inputs = {"text": np.array(["a", "b"], object), "other": np.array(["c"], object)}
        tasks = await run_together(
            batcher, fake, inputs, {**texts("d"), "other": texts("e")["text"]}
        )
        assert await outputs(tasks) == [["a", "b"], ["d"]]
        assert fake.runs == [["a", "b"], ["d"]]

    run(test)


def test_signatures_without_rows_run_alone_and_whole():
    async def test(batcher):
        fake = Fake(has_rows=False)
        fake.answer = lambda inputs: {"out": np.array(len(inputs["text"]))}
        tasks = await run_together(batcher, fake, texts(*"abcdef"), texts("g"))
        assert await outputs(tasks) == [6, 1]

    run(test)


def test_parts_of_different_widths_are_joined():
    async def test(batcher):
        fake = Fake(max_batch_size=2)

        def answer(inputs):
            longest = max(map(len, inputs["text"]))
            spelled = [list(text) + [b""] * (longest - len(text)) for text in inputs["text"]]
            lengths = [[len(text)] * longest for text in inputs["text"]]
            return {"out": np.array(spelled, object), "length": np.array(lengths, np.float32)}

        fake.answer = answer
        result = await batcher.run(fake, texts("a", "bc", "def"))
        assert result.outputs["out"].tolist() == [
            ["a", b"", b""],
            ["b", "c", b""],
            ["d", "e", "f"],
        ]
        assert result.outputs["length"].tolist() == [[1, 1, 0], [2, 2, 0], [3, 3, 3]]

    run(test)


def test_a_split_request_cannot_have_outputs_without_rows():
    async def test(batcher):
        fake = Fake(max_batch_size=2)
        fake.answer = lambda inputs: {"out": np.array(["all"] * 3, object)}
        with pytest.raises(ValueError, match="fake gives outputs without rows"):
            await batcher.run(fake, texts("a", "b", "c", "d"))

    run(test)


def test_outputs_without_rows_fail_only_together():
    """A signature may promise rows and not give them."""

    async def test(batcher):
        fake = Fake()
        fake.answer = lambda inputs: {"out": np.array(["all"], object)}
        tasks = await run_together(batcher, fake, texts("a"), texts("b"))
        assert await outputs(tasks) == [["all"], ["all"]]

    run(test)


def test_close_cancels_what_waits():
    async def test(batcher):
        fake = Fake()
        first = await hold(batcher, fake)
        (waiting,) = await start(batcher, fake, texts("a"))
        await batcher.close()
        fake.go_on.set()
        results = await asyncio.gather(first, waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2

    run(test)


def test_nothing_holds_a_signature_that_ran():
    """Its version may have been unloaded, and no other request may come for hours."""

    async def test(batcher):
        fake = Fake()
        gone = weakref.ref(fake)
        assert await outputs(await start(batcher, fake, texts("a"), texts("b"))) == [["a"], ["b"]]
        del fake
        await asyncio.sleep(0.1)
        assert gone() is None

    run(test)
