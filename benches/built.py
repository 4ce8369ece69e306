"""Benches as programs."""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def bench(name):
    """Builds a bench, and says where it is."""
    built = subprocess.run(["cargo", "bench", "--locked", "--no-run", "--bench", name, "--message-format", "json"],
                           cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [message["executable"] for message in map(json.loads, built.splitlines())
            if message.get("executable") and message["target"]["name"] == name][-1]
