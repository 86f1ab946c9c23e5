"""Processes that need not import anything, for tests that start many.

A server forks for every line that it reads: a module, a script or code is run there as the main program, by one
process or by several that find each other as those that `accelerate launch` starts do. Servers are forked off a test
process before it runs a test, with what it has imported by then: `forks`. Those that need an environment of their own
are processes of their own, for which this is a script: `started`.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent

LIBRARIES = ("accelerate", "datasets", "safetensors.torch", "torch.distributed.tensor", "torch._dynamo")
"""What takes long to import, but for Transformers, which imports most of it itself."""

MODELS = (
    *(f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bert", "gpt2", "llama", "t5")),
    "transformers.quantizers.auto",
)
"""Models of Transformers, and what it imports to load them."""

SERVERS: dict[str, "Forks"] = {}
"""Of this test process, by what it had imported when they were forked off: see `conftest.py`."""


class Forks:
    """Starts programs in forks of a server, one after the other.

    Args:
        orders: What the server reads.
        codes: What it answers.
    """

    def __init__(self, orders: IO[str], codes: IO[str]) -> None:
        self.orders, self.codes = orders, codes

    def run(
        self, *arguments: Any, processes: int = 1, seconds: float | None = None, output: Sequence[Path] = ()
    ) -> list[int]:
        """Exit codes of the processes of `python arguments...`, which are killed after `seconds` or if one fails.

        Standard output and error go to the files in `output`, if they are given.
        """
        order = {
            "arguments": list(map(str, arguments)),
            "processes": processes,
            "seconds": seconds,
            "output": list(map(str, output)),
        }
        self.orders.write(json.dumps(order) + "\n")
        self.orders.flush()
        return json.loads(self.codes.readline())


def forks() -> Forks:
    """A server with all that this process has imported; it ends with this process.

    Nothing must have taken gradients before, whose threads a fork does not have.
    """
    gc.collect()
    gc.freeze()
    (orders, write_orders), (read_codes, codes) = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.close(write_orders)
            os.close(read_codes)
            serve(os.fdopen(orders), os.fdopen(codes, "w"))
        finally:
            os._exit(0)
    os.close(orders)
    os.close(codes)
    return Forks(os.fdopen(write_orders, "w"), os.fdopen(read_codes))


@contextmanager
def started(*imported: str, **environment: str) -> Iterator[Forks]:
    """A server that has imported these modules, with `environment` in addition to this process's."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(HERE / "forked.py"), *imported]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        yield Forks(server.stdin, server.stdout)
        server.stdin.close()


def serve(orders: IO[str], codes: IO[str]) -> None:
    """Run what is asked for, until nobody can ask any more."""
    for line in orders:
        order = json.loads(line)
        several = [_forked(order["arguments"], one, order["output"]) for one in _environments(order["processes"])]
        print(json.dumps(_codes(several, order["seconds"])), file=codes, flush=True)


def _run(arguments: Sequence[str], environment: dict[str, str], output: Sequence[str]) -> None:
    os.environ.update(environment)
    for descriptor, path in enumerate(output or [os.devnull], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # Those of pytest, where the server is a fork of a test process.
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<code>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")


def _forked(arguments: Sequence[str], environment: dict[str, str], output: Sequence[str]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            _run(arguments, environment, output)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def _codes(running: Sequence[int], seconds: float | None) -> list[int]:
    end = float("inf") if seconds is None else time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(running):
        if time.monotonic() > end or any(codes.values()):
            for process in running:
                if process not in codes:
                    os.kill(process, signal.SIGKILL)
            end = float("inf")
        for process in running:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.002)
    return [codes[process] for process in running]


def _environments(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


if __name__ == "__main__":
    for module in sys.argv[1:]:
        import_module(module)
    gc.freeze()
    serve(sys.stdin, sys.stdout)
