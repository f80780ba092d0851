"""tools/hosts.py: a run over two namespaces gives what one host gives, and leaves nothing behind."""

import os
import signal
import subprocess
import sys

import pytest
from support import ROOT, gone, processes, wait_until

from measure.pair import BrokenPair
from tools import hosts
from tools.hosts import HostsUnavailable, run_on_two_hosts
from tools.launch import LaunchError, launch

SMALL = {"hidden_dim": 16, "ffn_dim": 16, "log_interval": 5}
ENDLESS = (
    "from tools.hosts import run_on_two_hosts\nrun_on_two_hosts(steps=1000000, hidden_dim=16, ffn_dim=16)"
)


def reason_here() -> str | None:
    """Why this machine allows no two hosts, or None: found by trying, as root may still be forbidden to."""
    try:
        with hosts.two_namespaces():
            return None
    except HostsUnavailable as reason:
        return str(reason)


REASON = reason_here()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no two hosts here: {REASON}")


def nothing_is_left() -> bool:
    """No torchrun and no rank, all of which name the folder of tools/hosts.py, and nobody who holds a namespace."""
    return gone("ep-hosts-")


@needs_hosts
def test_two_hosts_train_as_one_does():
    links = sorted(os.listdir("/sys/class/net"))
    two = run_on_two_hosts(steps=20, dtype="float64", **SMALL)
    assert nothing_is_left()
    assert sorted(os.listdir("/sys/class/net")) == links
    one = launch(nproc=2, steps=20, dtype="float64", device="cpu", quiet=True, **SMALL)
    assert two.summary["world_size"] == 2 and len(two.summary["task_loss"]) == 4
    pairs = zip(two.summary["task_loss"], one["task_loss"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-10
    sent = two.summary["bytes_sent_per_step"]
    assert sent == one["bytes_sent_per_step"] and sent["counted"] > 0
    assert sum(two.wire_bytes) > 20 * sent["counted"], "the rows did not go through the cable"


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing(number):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(processes("ep-hosts-")) >= 6)  # on each host a torchrun and a rank
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert nothing_is_left() and said.endswith("Interrupted: both hosts have ended\n")
    wait_until(nothing_is_left)


@needs_hosts
def test_a_time_limit_leaves_nothing():
    with pytest.raises(LaunchError, match="^the two hosts did not end within 0.5 s"):
        run_on_two_hosts(steps=10, limit_s=0.5, **SMALL)
    assert nothing_is_left()


def test_a_flag_that_two_hosts_choose_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(hosts, "two_namespaces", lambda: pytest.fail("started"))
    with pytest.raises(LaunchError, match="^log_dir: two hosts choose that themselves"):
        run_on_two_hosts(log_dir="x")


@needs_hosts
def test_a_bad_flag_is_one_line():
    with pytest.raises(LaunchError) as caught:
        run_on_two_hosts(stepps=3)
    assert caught.value.lines == ["unrecognized arguments: --stepps 3; did you mean --steps or --step?"]


def test_each_lack_is_one_clear_line(monkeypatch, tmp_path):
    def refusal() -> str:
        with pytest.raises(HostsUnavailable) as caught, hosts.two_namespaces():
            pass
        return str(caught.value)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal() == "the program `unshare` is not installed (Linux, package util-linux)"
    (tmp_path / "unshare").write_text("#!/bin/sh\necho 'unshare failed: not permitted' >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    assert refusal() == "the system refuses `unshare --net`: unshare failed: not permitted"
    assert nothing_is_left()


@needs_hosts
def test_what_ip_refuses_is_one_clear_line():
    with pytest.raises(HostsUnavailable, match="refuses `ip link set` .*: Cannot find device"):
        with hosts.two_namespaces() as namespaces:
            hosts.run_inside(namespaces[0], "ip", "link", "set", "nothing", "up")
    assert nothing_is_left()


def test_the_commands_name_the_same_meeting_point():
    first, second = hosts.host_flags(1), hosts.host_flags(2)
    different = {flag for flag in first if flag not in second}
    assert different == {"--rdzv-conf=is_host=1", "--local-addr=10.77.0.1"}
    assert {"--nnodes=2", "--nproc_per_node=1", "--rdzv-endpoint=10.77.0.1:29400"} <= set(first) & set(second)


def test_a_failure_tells_the_first_error_line_once_else_each_host():
    one = hosts.describe_hosts([(1, "error: 7 experts\n")] * 2, 9)
    assert one.lines == ["7 experts"]
    both = hosts.describe_hosts([(None, "[W1124 library talk\n"), (1, "a\nb\n")], 9)
    assert both.lines[0] == "the two hosts did not end within 9 s and were stopped"
    assert both.lines[1:] == ["host 1 had to be stopped", "host 2 exited with code 1", "  a", "  b"]


@needs_hosts
def test_a_cable_of_a_given_speed():
    show = ["tc", "qdisc", "show", "dev", hosts.INTERFACE]
    with hosts.two_namespaces(mbit_per_s=100) as namespaces:
        for namespace in namespaces:
            shown = hosts.run_inside(namespace, *show)
            assert "tbf" in shown and "rate 100Mbit" in shown
    with hosts.two_namespaces() as namespaces:
        assert "tbf" not in hosts.run_inside(namespaces[0], *show)


@needs_hosts
def test_a_cut_cable_ends_both_hosts_and_names_the_machine_that_went(tmp_path):
    flags = ["--hidden-dim", "16", "--ffn-dim", "16", "--steps", "1000000", "--log-interval", "1"]
    program = [
        str(hosts.LAUNCHER),
        *flags,
        "--device",
        "cpu",
        "--timeout-s",
        "5",
        "--dispatcher",
        "two_stage",
    ]
    logs = [tmp_path / f"ep-hosts-{number}.log" for number in (1, 2)]
    with hosts.two_namespaces() as namespaces:
        running = [
            hosts.start_host(namespace, number, [*program, "--log-dir", str(tmp_path)], log, 2)
            for number, (namespace, log) in enumerate(zip(namespaces, logs, strict=True), 1)
        ]
        try:
            wait_until(lambda: "[step 00003]" in logs[0].read_text())
            hosts.run_inside(namespaces[0], "ip", "link", "set", hosts.INTERFACE, "down")
            codes = [host.process.wait(timeout=5 + 30) for host in running]
            assert gone(str(tmp_path))  # no torchrun and no rank
        finally:
            for host in running:
                host.end()
    said = [[line for line in log.read_text().splitlines() if line.startswith("error: ")] for log in logs]
    assert all(codes) and [len(lines) for lines in said] == [1, 1], said
    assert said[0][0].startswith("error: machine 2 of 2 (rank 2, 3) is not heard any more; rank ")
    assert said[1][0].startswith("error: the machine of rank 0, 10.77.0.1, does not answer; rank ")


RESUMED_RUN = {
    "hidden_dim": 16, "ffn_dim": 16, "tokens": 32, "dtype": "float64", "balance": "bias", "steps": 80,
    "checkpoint_interval": 20, "log_interval": 1, "timeout_s": 4,
}  # fmt: skip
SAID = [
    "error: the machine of rank 0, 10.77.0.1, does not answer; ",
    "error: machine 2 of 2 (rank 1) is not heard any more; ",
]


def alike(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("ms_per_step", "config", "took")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The summary of the run on two machines that nobody disturbs."""
    with BrokenPair(tmp_path_factory.mktemp("calm"), **RESUMED_RUN) as calm:
        return alike(calm.finish())


@needs_hosts
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_machine_is_replaced_and_the_end_is_the_same(tmp_path, undisturbed, lost):
    """Machine 0 has rank 0 and the meeting point. Who is left ends in time; then both start again."""
    with BrokenPair(tmp_path / "broken", **RESUMED_RUN) as broken:
        broken.wait_for_step(23)
        broken.lose(lost)
        assert broken.machines[1 - lost].process.wait(timeout=4 + 30)
        assert broken.finish() == {} and not broken.left()
    (said,) = broken.errors(1 - lost)
    assert said.startswith(SAID[lost])
    again = RESUMED_RUN | {"checkpoint_dir": broken.checkpoints, "resume": True}
    with BrokenPair(tmp_path / "again", **again) as resumed:
        summary = resumed.finish()
    assert not resumed.left() and nothing_is_left()
    assert "\nresumed at step 20 " in resumed.outputs[0].read_text()
    assert alike(summary) == undisturbed and len(summary["task_loss"]) == 80
