"""Name the packages; the rest stands in pyproject.toml.

pyproject.toml can search for packages or list them, but not search below src/ and add conf/, which
travels in the wheel as cifar_lab.conf. A search, so that a new package needs no edit.
"""

from setuptools import find_namespace_packages, setup

setup(packages=[*find_namespace_packages("src", exclude=["*__pycache__"]), "cifar_lab.conf"])
