"""Two "nodes" on one machine, through the deepspeed launcher and a hostfile, on loopback addresses: `make test-nodes`.

One test starts a launcher on each node (``--no_ssh``); the other lets one launcher reach both by ssh, to an sshd of its
own on an unprivileged port, with keys made for it; that one needs Debian's openssh-server, openssh-client and pdsh.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import QUICK, ROOT, environment, lines_of, tiny_model  # noqa: F401

from ds_agsel import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODES = ("127.0.0.1", "127.0.0.2")
OPTIONS = {**QUICK, "--steps": "6", "--checkpoint-every": "3", "--test-rows": "0"}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{node} slots=1\n" for node in NODES))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job(model: Path, output: Path, *more: str) -> list[str]:
    words = [word for name, value in OPTIONS.items() for word in (name, value)]
    config = ["--deepspeed_config", "configs/zero2_offload.json", "--model", str(model), "--output", str(output)]
    return [str(ROOT / "launch" / "train.py"), *config, *words, *more]


def launcher(hostfile: Path, port: int, *options: str) -> list[str]:
    where = ["--hostfile", str(hostfile), "--master_addr", NODES[0], "--master_port", str(port)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *options]


def check_run(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["steps"] == 6
    assert len(lines_of(output / "selection.jsonl")) == 6
    tag, passed_over = checkpoints.newest_whole(output / "checkpoints")
    assert tag == "step00000006" and not passed_over
    manifest = checkpoints.read_manifest(output / "checkpoints" / tag)
    assert manifest.facts["world_size"] == 2
    assert len([name for name in manifest.files if name.endswith("optim_states.pt")]) == 2


def on_both_nodes(hostfile: Path, words: list[str], directory: Path) -> None:
    """One launcher a node, side by side, each told which node it is."""
    port = free_port()
    processes = []
    for rank in range(len(NODES)):
        options = ["--no_ssh", "--node_rank", str(rank)]
        with open(directory / f"node{rank}.log", "w") as log:
            command = launcher(hostfile, port, *options) + words
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((directory / f"node{rank}.log").read_text()[-4000:] for rank in range(2))


def test_one_launcher_a_node(tiny_model: Path, hostfile: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "run"
    on_both_nodes(hostfile, job(tiny_model, output), tmp_path)
    check_run(output)
    # One node alone goes on from what the two have saved.
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step00000006")
    single = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    words = job(tiny_model, output, "--resume", "--accumulation", "2")
    again = subprocess.run([*single, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "step00000003, after 3 steps" in again.stdout
    assert json.loads((output / "summary.json").read_text())["ranks"] == 1


@contextlib.contextmanager
def sshd(directory: Path) -> Iterator[dict[str, str]]:
    """An sshd on the nodes' addresses, for this user and this directory's key; the environment that reaches it."""
    port = free_port()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    authorized = directory / "authorized_keys"
    shutil.copy(directory / "user_key.pub", authorized)
    authorized.chmod(0o600)
    (directory / "sshd_config").write_text(
        "".join(f"ListenAddress {node}:{port}\n" for node in NODES)
        + f"HostKey {directory / 'host_key'}\nAuthorizedKeysFile {authorized}\nPidFile {directory / 'sshd.pid'}\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    (directory / "ssh_config").write_text(
        f"Host 127.*\n  Port {port}\n  IdentityFile {directory / 'user_key'}\n  IdentitiesOnly yes\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile {directory / 'known_hosts'}\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd separates privileges there
    daemon = subprocess.Popen([_program("sshd"), "-D", "-e", "-f", str(directory / "sshd_config")])
    try:
        bin_folder = directory / "bin"
        bin_folder.mkdir()
        wrapper = bin_folder / "ssh"  # for the launcher's own check, which knows no options but the port
        wrapper.write_text(f'#!/bin/sh\nexec {_program("ssh")} -F {directory / "ssh_config"} "$@"\n')
        wrapper.chmod(0o700)
        path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
        surroundings = {**environment(), "PATH": path, "PDSH_RCMD_TYPE": "ssh"}
        deadline = time.monotonic() + 20
        while subprocess.run(["ssh", NODES[1], "true"], env=surroundings, capture_output=True).returncode:
            assert daemon.poll() is None and time.monotonic() < deadline, "sshd does not answer"
            time.sleep(0.2)
        yield surroundings
    finally:
        daemon.terminate()
        daemon.wait()


def _program(name: str) -> str:
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])) or ""


@pytest.mark.skipif(
    not all(map(_program, ("sshd", "ssh", "ssh-keygen", "pdsh"))),
    reason="needs Debian's openssh-server, openssh-client and pdsh: apt-get install openssh-server pdsh",
)
def test_one_launcher_for_all_nodes_by_ssh(tiny_model: Path, hostfile: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "run"
    with sshd(tmp_path) as surroundings:
        command = launcher(hostfile, free_port(), "--launcher", "pdsh") + job(tiny_model, output)
        result = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    check_run(output)
