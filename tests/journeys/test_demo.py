"""``farebox demo --once``: the story is told whole, again, and after a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("FAREBOX_", "T402_", "DATABASE_"))}


def demo(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farebox", "demo", "--once"],
        cwd=directory,
        env=CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(directory: Path) -> str:
    process = demo(directory)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def test_the_story_is_told_twice_and_survives_a_kill_in_the_middle(tmp_path: Path):
    first = told(tmp_path)
    assert "402 Payment Required" in first
    assert "settled: 0.001 USDC in transaction 0x" in first
    assert "left on the pass: calls=97" in first
    assert "metered: 25 calls of api_calls" in first
    assert "the lines add up: 20.06 USD = 20.06 USD" in first
    assert "sum per asset: USD: 0, sandbox:usdc: 0" in first

    killed = demo(tmp_path)
    assert killed.stdout is not None
    for line in killed.stdout:
        if "A regular buys a pass" in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert _everything_ends(tmp_path), "processes outlived the demo"

    third = told(tmp_path)
    assert "the lines add up" in third
    assert "2,000" in third or "3,000" in third, "the book goes on where it was"


def _everything_ends(directory: Path) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        mine = [p for p in Path("/proc").glob("[0-9]*") if str(directory).encode() in _command_line(p)]
        if not mine:
            return True
        time.sleep(0.1)
    return False


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
