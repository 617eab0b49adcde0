"""Programs that the tests of imports run in processes of their own.

    python -m tests.importing forked [--loaded A,B] MODULE ...   # import each in a child that has only these loaded
    python -m tests.importing without-torch MODULE ...           # import all; the first that loads PyTorch is named
    python -m tests.importing help                               # the command's help, without PyTorch
    python -I tests/importing.py origins MODULE ...              # print the file that each comes from, one a line

Each prints one line per fault and ends with status 1 where there is one.
"""

import argparse
import contextlib
import gc
import importlib
import os
import runpy
import sys
import traceback

HEAVY = {"torch", "transformers"}


def forked(modules: list[str], loaded: list[str]) -> int:
    """Import each module first: in a child of this process, which has imported only `loaded`. Count the failures."""
    gc.disable()  # modules stay until the child ends; searching them for garbage takes a third of the time
    for name in loaded:
        importlib.import_module(name)
    failures = 0
    for module in modules:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                importlib.import_module(module)
                status = 0
            except BaseException as error:
                print(f"{module}: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
            finally:
                os._exit(status)
        failures += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    return failures


def without_torch(modules: list[str]) -> int:
    for module in modules:
        importlib.import_module(module)
        if culprits := HEAVY & set(sys.modules):
            print(f"{module} imports {', '.join(sorted(culprits))}")
            return 1
    return 0


def help_without_torch() -> int:
    sys.argv = ["launch.py", "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path("launch.py", run_name="__main__")
    return len(HEAVY & set(sys.modules))


def origins(modules: list[str]) -> int:
    for module in modules:
        print(importlib.import_module(module).__file__)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["forked", "without-torch", "help", "origins"])
    parser.add_argument("module", nargs="*")
    parser.add_argument("--loaded", type=lambda names: names.split(","), default=[])
    arguments = parser.parse_intermixed_args()
    if arguments.what == "forked":
        failures = forked(arguments.module, arguments.loaded)
    elif arguments.what == "without-torch":
        failures = without_torch(arguments.module)
    elif arguments.what == "origins":
        failures = origins(arguments.module)
    else:
        failures = help_without_torch()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
