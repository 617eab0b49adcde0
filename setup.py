"""The packages of the wheel: every folder of the three packages that has an __init__.py, and the recipes as data.

All else stands in setup.cfg. The recipes lie beside the packages in a checkout, and inside radhpc once installed.
"""

from setuptools import find_packages, setup

PACKAGES = ("radhpc", "shards", "slurm")
setup(packages=[*find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]), "radhpc.recipes"])
