"""Runs files of texts through an export on a Ray cluster, or on the cores of this machine.

Each input file becomes a file of JSON lines in the same order, which gets its name only when it is
complete. Ray Data hands blocks of texts to workers, processes with a copy of the export each. A
block is consecutive lines of one file: neither the number of workers nor the death of one changes a
batch. A worker that dies is replaced, and its block generated anew.
"""

import contextlib
import glob
import itertools
import json
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from bertgen_tf.checkpoints.exports import verify
from bertgen_tf.checks import check_integer
from bertgen_tf.config import BATCH_SIZE
from bertgen_tf.data import resumable, text_files, text_lines
from bertgen_tf.data.progress import EmptyOutputs, show_progress

# A worker gets one block at a time, loses at most that, and sorts its texts by length.
BATCHES_OF_A_BLOCK = 8


class Job(NamedTuple):
    """An input file, and what is still to be done for its output file.

    Attributes:
        source: the input file.
        target: the output file.
        run: what determines its lines, see `resumable.find_begun`.
        total: how many texts it has.
        begun: what an earlier run left; None if the output file is complete.
        source_column: see `generate_files`.
    """

    source: str
    target: str
    run: dict[str, Any]
    total: int
    begun: resumable.Begun | None
    source_column: str | None = None


def generate_files(
    export: str | os.PathLike,
    pattern: str,
    output: str | os.PathLike,
    *,
    signature: str = "generate_xla",
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    address: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verbose: Any = "auto",
    source_column: str | None = None,
) -> list[str]:
    """Generates a text for each line of many files.

    Args:
        export: SavedModel folder NAME/VERSION: a program, which can read and write files, so one
            that you trust. Generation settings are those it was exported with. On a cluster all
            machines must find it under this path; they need `ray`, `tensorflow` and
            `tensorflow_text`, but not `bertgen_tf`.
        pattern: input files, such as "lines/*.jsonl"; their extensions specify the format, as for
            `bertgen-tf generate`. They are read on this machine.
        output: folder for `NAME.jsonl`, one for each input file NAME.*. A line is the object of the
            input line, or its columns where they have names, or {"source": TEXT}, with the
            generated text as "output": a list where the signature gives several.
        signature: of the export, from `text` to `text`. Those that end in `_xla` are faster once
            each worker has compiled them.
        batch_size: texts that are generated together.
        workers: processes; by default as many as the cores of the machine or the cluster allow.
        cpus_per_worker: cores, and threads, of each.
        address: of a Ray cluster, as for `ray.init`; by default RAY_ADDRESS, and if that is not
            set, a Ray of its own on this machine. If this process already uses Ray, that is used.
        overwrite: replace output files that exist.
        resume: continue where an earlier run with the same export and settings stopped.
        verbose: whether progress is shown, as in `generate`.
        source_column: the column of the texts in a `.csv`, or a `.tsv` with names in its first
            line, or their field in JSON; by default "source".

    Returns:
        the output files, in the order of the input files.

    Raises:
        ImportError: Ray is not installed.
        OSError: a file cannot be read or written, or there is no cluster at `address`.
        ValueError: no file matches, a line is malformed, the folder holds other files, two outputs
            would have the same name, the export has no such signature, or another run began a file
            that is to be resumed.
    """
    import_ray()
    batch_size = check_integer("batch_size", batch_size)
    workers = None if workers is None else check_integer("workers", workers)
    cpus_per_worker = check_integer("cpus_per_worker", cpus_per_worker)
    run = {**describe_export(export, signature), "batch_size": batch_size}
    warn = logging.getLogger(__name__).warning
    jobs = find_jobs(
        pattern,
        output,
        run,
        overwrite=overwrite,
        resume=resume,
        source_column=source_column,
        complain=warn,
    )
    run_jobs(
        jobs,
        export,
        signature=signature,
        batch_size=batch_size,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        address=address,
        verbose=verbose,
        complain=warn,
    )
    return [job.target for job in jobs]


def import_ray() -> Any:
    """The module `ray`, with `ray.data`.

    Raises:
        ImportError: says what to install.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            'Generating on Ray needs Ray Data: pip install "bertgen_tf[ray]".'
        ) from error
    return ray


def cluster_address(address: str | None) -> str | None:
    """That of the cluster to use; None for a Ray of our own on this machine."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def describe_export(export: str | os.PathLike, signature: str) -> dict[str, Any]:
    """What determines the outputs of an export, to tell runs apart.

    Raises:
        ValueError: it is not an export, is damaged, or has no such signature from `text` to `text`.
    """
    folder = pathlib.Path(export)
    path = folder / "saved_model.pb"
    if not path.is_file():
        raise ValueError(
            f"export must be the folder of a SavedModel, NAME/VERSION, but there is no {path}"
        )
    try:
        saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fitting = sorted(
        name
        for name, definition in saved.meta_graphs[0].signature_def.items()
        if set(definition.inputs) == {"text"} and "text" in definition.outputs
    )
    if signature not in fitting:
        raise ValueError(
            f"signature must be one from text to text, which in {export} are {', '.join(fitting)}; "
            f"received {signature!r}"
        )
    verify(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"export": resumable.digest(*files), "signature": signature}


def find_jobs(
    pattern: str,
    output: str | os.PathLike,
    run: dict[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
    source_column: str | None = None,
    complain: text_files.Complain | None = None,
) -> list[Job]:
    """Looks through all inputs, and at what exists of the outputs.

    Args:
        pattern: see `generate_files`.
        output: see `generate_files`.
        run: what determines the outputs besides the input.
        overwrite: see `generate_files`.
        resume: see `generate_files`.
        source_column: see `generate_files`.
        complain: see `text_files.read_pairs`.

    Returns:
        a job for each input file.

    Raises:
        OSError: an input cannot be read.
        ValueError: see `generate_files`.
    """
    sources = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    sources = [source for source in sources if os.path.isfile(source)]
    if not sources:
        raise ValueError(
            f"pattern must match files, such as 'lines/*.jsonl', but no file matches {pattern!r}"
        )
    targets: dict[str, str] = {}
    for source in sources:
        target = os.path.join(output, f"{text_lines.stem(source)}.jsonl")
        if target in targets:
            raise ValueError(f"{targets[target]} and {source} would both become {target}")
        targets[target] = source
    _check_folder(output, list(targets))
    jobs = []
    for target, source in targets.items():
        if os.path.isdir(output):
            resumable.check_path(target, overwrite, resume)
        # Reading twice costs little beside generating, and finds every malformed line now.
        texts = text_files.read_texts(source, source_column=source_column, complain=complain)
        total = sum(1 for _ in texts)
        begun: resumable.Begun | None = resumable.Begun()
        run_of_file = {
            "input": resumable.digest(source),
            **text_files.settings(source, source_column),
            **run,
        }
        if resume:
            begun = resumable.find_begun(target, run_of_file, total)
            if resumable.is_complete(target):
                resumable.forget(target)
                begun = None
        jobs.append(Job(source, target, run_of_file, total, begun, source_column))
    return jobs


def run_jobs(
    jobs: list[Job],
    export: str | os.PathLike,
    *,
    signature: str,
    batch_size: int,
    workers: int | None,
    cpus_per_worker: int,
    address: str | None,
    verbose: Any,
    complain: Callable[[str], None],
) -> None:
    """Writes the outputs of what `find_jobs` found.

    Args:
        jobs: those that are complete are skipped.
        export: see `generate_files`, as for all others.
        complain: called with a message that says where the finished lines are, if something raises,
            and how many outputs are empty.

    Raises:
        OSError: a file cannot be read or written, or there is no cluster at `address`.
    """
    jobs = [job for job in jobs if job.begun is not None]
    if not jobs:
        return
    os.makedirs(os.path.dirname(jobs[0].target), exist_ok=True)
    size = batch_size * BATCHES_OF_A_BLOCK
    with contextlib.ExitStack() as stack:
        outputs: Iterator[Any] = iter(())
        if any(_first(job, size) < job.total for job in jobs):
            worker = (os.path.abspath(export), signature, batch_size, cpus_per_worker)
            workers = stack.enter_context(_ray_running(address, workers, cpus_per_worker))
            outputs = stack.enter_context(closing(_on_ray(jobs, size, worker, workers)))
        total = sum(job.total for job in jobs)
        done = sum(_first(job, size) for job in jobs)
        advance = stack.enter_context(show_progress(verbose, total, batch_size, done))
        empty = EmptyOutputs()
        for job in jobs:
            _write(job, outputs, size, advance, complain, empty)
    empty.report(complain)


def _write(
    job: Job,
    outputs: Iterator[Any],
    size: int,
    advance: Callable[[int], None],
    complain: Callable[[str], None],
    empty: EmptyOutputs,
) -> None:
    if resumable.digest(job.source) != job.run["input"]:
        raise OSError(f"{job.source} changed while texts were generated; run again")
    first = _first(job, size)
    records = text_files.read_records(job.source, job.source_column)
    records = itertools.islice(records, first, job.total)
    outputs = itertools.islice(outputs, job.total - first)
    with resumable.open_output(job.target, job.run, job.begun, complain) as file:
        pairs = zip(records, outputs, strict=True)
        for number, ((text, record), output) in enumerate(pairs, first):
            if number >= job.begun.lines:
                empty.add(text, output)
                line = json.dumps({**record, "output": output}, ensure_ascii=False)
                # Half a character, which JSON can spell, stays as it was.
                file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
            if (number + 1) % size == 0 or number + 1 == job.total:
                resumable.sync(file)
                advance((number % size) + 1)


def _first(job: Job, size: int) -> int:
    """The line to begin with, where a block begins: the same batches give the same bits."""
    done = job.begun.lines
    return done if done == job.total else done // size * size


def _check_folder(output: str | os.PathLike, targets: list[str]) -> None:
    """Raises a ValueError unless it is a folder, or can be made, without foreign files."""
    if os.path.isdir(output):
        ours = {
            os.path.basename(f"{target}{ending}")
            for target in targets
            for ending in ("", ".partial", ".partial.json", ".partial.json.new")
        }
        others = sorted(set(os.listdir(output)) - ours)
        if others:
            raise ValueError(
                f"output must be a folder for these outputs alone, but {output} holds "
                f"{others[0]}; choose another folder"
            )
        return
    parent = next(path for path in pathlib.Path(output).absolute().parents if path.exists())
    if os.path.exists(output) or not parent.is_dir():
        raise ValueError(f"output must be a folder, but {output} is a file, or lies below one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output must lie in a folder that can be written, but {parent} cannot")


# ------------------------------------------------------------------------------------------ Ray


@contextlib.contextmanager
def _ray_running(address: str | None, workers: int | None, cpus: int) -> Iterator[int]:
    """Yields the number of workers, while Ray is up to run them."""
    ray = import_ray()
    ours = not ray.is_initialized()
    address = cluster_address(address)
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Its C++ side logs errors that are not errors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # None: as many as the machine or its container has.
            options |= {"num_cpus": workers and workers * cpus, "include_dashboard": False}
        else:
            _check_answers(address)
        try:
            ray.init(address or "local", **options)
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(f"Ray ({address or 'on this machine'}): {error}") from error
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns that it shows no progress.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if address is None and cores < cpus:
            raise ConnectionError(f"a worker cannot have {cpus} cores, because Ray has {cores}")
        # At least one, as a cluster may have no machines until there is work.
        yield workers or max(1, cores // cpus)
    finally:
        if ours:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises a ConnectionError if nobody answers at HOST:PORT, where Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error


def _on_ray(
    jobs: list[Job], size: int, worker: tuple[str, str, int, int], workers: int
) -> Iterator[Any]:
    """The texts generated from all texts of the jobs, in order."""
    import pyarrow

    ray = import_ray()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        blocks = ray.data.from_arrow_refs(
            [ray.put(pyarrow.table({"text": texts})) for texts in _blocks(jobs, size)]
        )
        outputs = blocks.map_batches(
            _worker_class(),
            fn_constructor_args=worker,
            batch_size=None,  # a block
            batch_format="pyarrow",
            # Actors of Ray Data restart, and their blocks are retried, without limit.
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=worker[-1],
        )
        for table in outputs.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.column("output").to_pylist()


def _blocks(jobs: Iterable[Job], size: int) -> Iterator[list[str]]:
    for job in jobs:
        texts = text_files.read_texts(job.source, source_column=job.source_column)
        texts = itertools.islice(texts, _first(job, size), job.total)
        while block := list(itertools.islice(texts, size)):
            yield block


def _worker_class() -> type:
    """The class of the workers.

    A class made in a function is sent as code, one of a module as a name: this way machines need no
    `bertgen_tf`.
    """

    class Worker:
        """Loads an export once, then answers blocks of texts."""

        def __init__(self, export: str, signature: str, batch_size: int, threads: int):
            import tensorflow as tf
            import tensorflow_text  # noqa: F401  registers the ops of the tokenizers

            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
            self.batch_size = batch_size
            self.answer = tf.saved_model.load(export).signatures[signature]

        def __call__(self, block: Any) -> Any:
            import pyarrow
            import tensorflow as tf

            texts = block.column("text").to_pylist()
            # Similar lengths together: less padding.
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            outputs: list[Any] = [None] * len(texts)
            for start in range(0, len(texts), self.batch_size):
                numbers = order[start : start + self.batch_size]
                answers = self.answer(text=tf.constant([texts[i] for i in numbers]))["text"]
                for i, answer in zip(numbers, answers.numpy().tolist(), strict=True):
                    several = isinstance(answer, list)
                    outputs[i] = [a.decode() for a in answer] if several else answer.decode()
            return pyarrow.table({"output": outputs})

    return Worker
