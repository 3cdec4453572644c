"""Builds a wheel that holds nothing but a name and a version, for the stand-ins beside this file, which link to it.

A build tool from an index would take more time than all else about them: pip installs it anew for every package that it
builds. Interface: PEP 517. Format: packaging.python.org/en/latest/specifications/binary-distribution-format
"""

import tomllib
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: object = None) -> str:
    """Of the project in the current directory. Returns the name of the file."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    name = f"{project['name']}-{project['version']}"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: empty_wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name}.dist-info/{file},sha256={digest(text)},{len(text)}\n" for file, text in files.items())
    files["RECORD"] = f"{record}{name}.dist-info/RECORD,,\n"
    wheel = f"{name}-py3-none-any.whl"
    with ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}.dist-info/{file}", text)
    return wheel


def digest(text: str) -> str:
    """As the files of a wheel are recorded."""
    return urlsafe_b64encode(sha256(text.encode()).digest()).decode().rstrip("=")
