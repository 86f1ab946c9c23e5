"""Processes that need not import anything, for tests that start many.

Run as a script it imports the package once, or the modules that it is given, and forks for every line that it reads: a
module, a script or code is run there as the main program, by one process or by several that find each other as those
that `accelerate launch` starts do.
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
from typing import Any

HERE = Path(__file__).parent


class Forks:
    """Starts programs in forks of a server, one after the other."""

    def __init__(self, server: subprocess.Popen) -> None:
        self.server = server

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
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@contextmanager
def forks(*imported: str, **environment: str) -> Iterator[Forks]:
    """A server, which has imported these modules, or what the command line needs.

    It has `environment` in addition to this process's.
    """
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(HERE / "forked.py"), *imported]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        yield Forks(server)
        server.stdin.close()


def _run(arguments: Sequence[str], environment: dict[str, str], output: Sequence[str]) -> None:
    os.environ.update(environment)
    for descriptor, path in enumerate(output or [os.devnull], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
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


IMPORTED = (
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "datasets",
    "hf_subprune.checkpoint",
    "hf_subprune.data.datafiles",
    "hf_subprune.report.card",
    "hf_subprune.report.hub",
    "hf_subprune.report.plots",
    "hf_subprune.sizes",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pydantic.type_adapter",
    "scipy.io",
    "threadpoolctl",
    "torch._subclasses.schema_check_mode",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "typer",
)
"""All but the command itself, which is run as the main program."""

if __name__ == "__main__":
    for module in sys.argv[1:] or IMPORTED:
        import_module(module)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        several = [_forked(order["arguments"], one, order["output"]) for one in _environments(order["processes"])]
        print(json.dumps(_codes(several, order["seconds"])), flush=True)
