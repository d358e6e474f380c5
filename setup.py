"""For tools that still look for it; everything is in pyproject.toml, and nothing runs at install."""

from setuptools import setup

setup()
