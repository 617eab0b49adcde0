"""Import one module, in an interpreter that has imported nothing else: `python -m bench.import_module MODULE`."""

import importlib
import sys

importlib.import_module(sys.argv[1])
