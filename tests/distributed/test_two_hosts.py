"""Two hosts of two ranks each train what one host with four ranks does.

The hosts are network namespaces: each has a network stack of its own, and a wire to the other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_engine.distributed.interface import interface_towards
from tests.stages.conftest import preferences, tiny_model, trainer  # noqa: F401
from tests.stages.runs import Trainer, check_close, environment, metrics

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29577


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a veth pair; skipped where there can be none."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2's ip command")
    names = (f"hybrid-a-{os.getpid()}", f"hybrid-b-{os.getpid()}")
    ends = (f"hya{os.getpid()}", f"hyb{os.getpid()}")
    steps = [("netns", "add", name) for name in names]
    steps.append(("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]))
    for name, end, address in zip(names, ends, ADDRESSES, strict=True):
        inside = ("-n", name)
        steps += [
            ("link", "set", end, "netns", name),
            (*inside, "address", "add", f"{address}/24", "dev", end),
            (*inside, "link", "set", end, "up"),
            (*inside, "link", "set", "lo", "up"),
        ]
    try:
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"needs network namespaces: ip {' '.join(step)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:  # their ends of the wire go with them
            ip("netns", "delete", name)
        ip("link", "delete", ends[0])


def start(host: str, number: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """torchrun on one of the two hosts, two ranks."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "2"]
    command += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    command += ["-m", "hybrid_engine.train_rlhf", *arguments]
    environ = environment()
    environ.pop("GLOO_SOCKET_IFNAME", None)
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environ, stdout=output, stderr=output)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_equal_one(hosts, trainer: Trainer, tmp_path: Path, stage: int) -> None:  # noqa: F811
    flags = ("--zero-stage", str(stage))
    one, two = tmp_path / "one", tmp_path / "two"
    done = trainer.spawn(one, "--num-gpus", "4", *flags)
    assert done.returncode == 0, done.stderr
    arguments = trainer.arguments(two, *flags)
    logs = [tmp_path / f"host-{number}.log" for number in (0, 1)]
    running = [start(host, i, arguments, logs[i]) for i, host in enumerate(hosts)]
    try:
        codes = [process.wait(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    check_close(two, one, 1e-6)
    assert {line["stage"] for line in metrics(two)} == {"sft", "reward", "rlhf"}


def test_the_interface_is_the_one_that_leads_to_the_others(hosts) -> None:
    code = "import sys; from hybrid_engine.distributed.interface import *; "
    code += "print(interface_towards(sys.argv[1]), interface_towards('192.0.2.1'))"
    for host, end in zip(hosts, ("hya", "hyb"), strict=True):
        for address in ADDRESSES:
            done = subprocess.run(
                ["ip", "netns", "exec", host, sys.executable, "-c", code, address],
                env=environment(),
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.split() == [f"{end}{os.getpid()}", "None"]
    assert interface_towards("127.0.0.1") == "lo"
