"""Benches as programs."""

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def bench(name, folder=None, flags="", of=None):
    """Builds a bench, with so many flags of rustc's in a folder of its own if there is one, and says where it is: or, with `of`, where the
    program of that name is, which is built along with it."""
    command = ["cargo", "bench", "--locked", "--no-run", "--bench", name, "--message-format", "json"]
    env = os.environ
    if folder:
        # With a target that is named, the flags are not for what runs while it is built.
        command += ["--target-dir", folder, "--target", host()]
        env = {**env, "RUSTFLAGS": flags}
        # It would count for more.
        env.pop("CARGO_ENCODED_RUSTFLAGS", None)
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return [message["executable"] for message in map(json.loads, built.splitlines())
            if message.get("executable") and message["target"]["name"] == (of or name)][-1]


def host():
    """The platform that rustc is for."""
    return rustc()["host"]


def rustc():
    """What rustc says of itself."""
    said = subprocess.run(["rustc", "-vV"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
