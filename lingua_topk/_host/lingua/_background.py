"""An iterator in a process of its own, some items ahead of the one that uses them."""

import atexit
import contextlib
import logging
import logging.handlers
import multiprocessing as mp
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from lingua.errors import ConfigError

# What a producer may take to notice that it is no longer needed, before it is killed.
SECONDS_TO_END = 2.0


class BufferQueue:
    """`size` items on their way from one process to one other, and what the pipe takes.

    A pipe of which each process keeps its own end only: so each notices when the other
    is gone, even one that was killed in the middle of an item. (With
    multiprocessing.Queue the consumer holds a writing end, and would wait for ever.)
    """

    def __init__(self, size: int):
        self._size = size
        self._reader, self._writer = mp.Pipe(duplex=False)

    def start_reading(self) -> None:
        """In the consumer, once the producer runs."""
        self._writer.close()

    def get(self) -> Any:
        """The next item. EOFError or OSError once the producer is gone."""
        return pickle.loads(self._reader.recv_bytes())

    def close(self) -> None:
        """In the consumer: take no more; the producer's `put` says so."""
        self._reader.close()

    def start_writing(self) -> None:
        """In the producer, before the first `put`."""
        self._reader.close()
        self._waiting: deque[bytes] = deque()  # the first one is being sent
        self._changed = threading.Condition()
        self._is_read = True
        threading.Thread(target=self._send, daemon=True).start()

    def put(self, item: Any) -> bool:
        """Wait for room and add an item. False once the consumer is gone."""
        data = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._size or not self._is_read)
            self._waiting.append(data)
            self._changed.notify_all()
            return self._is_read

    def flush(self) -> None:
        """Wait until the consumer has taken everything, or is gone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or not self._is_read)

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting[0]
            try:
                self._writer.send_bytes(data)
            except OSError:
                self._is_read = False
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
                if not self._is_read:
                    return


@dataclass
class _End:
    """Sent after the last item: `kind(text)` is to be raised, or nothing."""

    kind: type[Exception] | None = None
    text: str = ""


class _ForwardedLogs(logging.handlers.QueueHandler):
    """Sends log records with the items; the consumer has the handlers that the run set up."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put(record)


def _feed_and_log(level: int, *args) -> None:
    """`feed_buffer` where records of `level` are made; a new process makes warnings only."""
    logging.getLogger().setLevel(level)
    feed_buffer(*args)


def feed_buffer(
    queue: BufferQueue,
    stop_event: Any,
    iterator_builder: Callable[[], AbstractContextManager[Iterator[Any]]],
) -> None:
    """The producer: put the items of the iterator into the queue until told to stop.

    Signals to the whole process group are the consumer's affair: it may still want items
    for the step it is in. Its end, however it comes, ends this process too.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    queue.start_writing()
    logging.getLogger().handlers = [_ForwardedLogs(queue)]
    try:
        with iterator_builder() as iterator:
            for item in iterator:
                if stop_event.is_set() or not queue.put(item):
                    return
        queue.put(_End())
    except Exception as error:
        queue.put(_failure(error))
    finally:
        queue.flush()


def _failure(error: Exception) -> _End:
    """A user's mistake stays what it is; anything else takes its traceback along."""
    if hasattr(error, "exit_status"):
        return _End(type(error), str(error))
    trace = "".join(traceback.format_exception(error)).rstrip()
    return _End(RuntimeError, f"the data loader's process failed: {error}\n{trace}")


def consume_buffer(producer: mp.Process, queue: BufferQueue) -> Iterator[Any]:
    """The items, in order. What the producer raised is raised here.

    RuntimeError when the producer ended without saying why.
    """
    while True:
        try:
            item = queue.get()
        except (EOFError, OSError):
            producer.join(SECONDS_TO_END)
            raise RuntimeError(
                f"the data loader's process ended with exit code {producer.exitcode}; minus 9 is a"
                " kill, often for want of memory: see the messages above, or set"
                " data.load_async=false"
            ) from None
        if isinstance(item, logging.LogRecord):
            logging.getLogger(item.name).handle(item)
        elif not isinstance(item, _End):
            yield item
        elif item.kind is None:
            return
        else:
            raise item.kind(item.text)


@contextlib.contextmanager
def async_iterator(
    buffer_size: int, iterator_builder: Callable[[], AbstractContextManager[Iterator[Any]]]
) -> Iterator[Iterator[Any]]:
    """The items of an iterator that runs in another process, `buffer_size` ahead at most.

    iterator_builder: can be pickled, and returns a context manager. On leaving, the other
    process has ended.
    """
    if buffer_size < 1:
        raise ConfigError(f"data.prefetch_size={buffer_size} is too small: give at least 1")
    queue, stop_event = BufferQueue(buffer_size), mp.Event()
    producer = mp.Process(
        target=partial(_feed_and_log, logging.getLogger().level),
        args=(queue, stop_event, iterator_builder),
        name="data-loader",
        daemon=True,
    )
    producer.start()
    queue.start_reading()
    end = partial(_end, producer, queue, stop_event)
    # Where this context is never left: at exit multiprocessing would wait for the producer.
    atexit.register(end)
    try:
        yield consume_buffer(producer, queue)
    finally:
        atexit.unregister(end)
        end()


def _end(producer: mp.Process, queue: BufferQueue, stop_event: Any) -> None:
    if producer.is_alive():  # One that was killed may have left the event locked.
        stop_event.set()
    queue.close()
    producer.join(SECONDS_TO_END)
    if producer.is_alive():
        producer.kill()
        producer.join()
