"""The package is this folder; its sub-packages are the folders in it that have an __init__.py."""

from setuptools import find_packages, setup

setup(
    script_name="setup.py",  # what setuptools then leaves out of the package
    package_dir={"scanax": "."},
    packages=[
        "scanax",
        *(f"scanax.{name}" for name in find_packages(exclude=["tests", "tests.*"])),
    ],
)
