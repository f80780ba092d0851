"""measure/gpus.py, in small: on two gloo ranks every part runs and is right; what is broken is said."""

import json
import shutil

import pytest
from support import ROOT, copy_of_the_code, torchrun

PARTS = ["parity", "invariance", "bandwidth", "layers", "seed"]


@pytest.fixture(scope="module")
def suite(build):
    """(what it printed, what it wrote) on two ranks."""
    folder = build / "suite"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--device", "cpu", "--small", "--output", str(folder), "--before", "ep_launcher/launcher.py"]
    done = torchrun(2, "measure/gpus.py", *flags, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads((folder / "cpu_x2_suite.json").read_text())


def test_every_part_ran_and_found_nothing_wrong(suite):
    printed, result = suite
    assert list(result["parts"]) == PARTS
    for name, part in result["parts"].items():
        assert part["failures"] == []
        assert f"\n{name}: ok in " in printed
    assert result["world_size"] == 2 and result["backend"] == "gloo"
    assert str(ROOT) not in json.dumps(result)
    command = "torchrun --standalone --nproc_per_node=2 measure/gpus.py --device cpu --small"
    assert result["command"] == command


def test_parity_and_invariance_hold_what_they_promise(suite):
    parts = suite[1]["parts"]
    results = parts["parity"]["results"]
    assert {r["dtype"] for r in results} == {"float32", "bfloat16"}
    assert {"all_gather", "all_to_all"} <= {r["dispatcher"] for r in results}
    assert all(max(r["errors"].values()) <= r["limit"] and r["bytes_agree"] for r in results)
    invariance = parts["invariance"]
    assert invariance["sizes"] == [1, 2]
    names = set(invariance["task_loss"])
    assert {"1 ranks: local+loop", "2 ranks: all_to_all+loop", "2 ranks: all_to_all+blocks"} <= names
    assert max(invariance["furthest"].values()) <= 1e-10
    assert all(len(curve) == invariance["steps"] for curve in invariance["task_loss"].values())


def test_bandwidth_counts_the_bytes_that_leave(suite):
    part = suite[1]["parts"]["bandwidth"]
    sent, choices, row = part["mean_bytes_that_leave"], part["tokens"] * part["top_k"], 2 * part["hidden_dim"]
    assert sent["plain gloo all-to-all"] == choices * row / 2
    assert sent["all_gather, dispatch"] == choices * (
        row + 4
    )  # everything to the one other rank, with its weight
    assert 0 < sent["all_to_all, combine"] < choices * row
    assert sent["plain glue, dispatch"] == sent["plain glue, combine"] == sent["all_to_all, combine"]
    assert sent["all_to_all, dispatch"] > sent["all_to_all, combine"]  # weights ride
    for name, samples in part["samples_ms"].items():
        assert min(samples) > 0
        assert part["gb_per_s"][name] == pytest.approx(sent[name] / part["median_ms"][name] / 1e6)


def test_layers_and_seed_measure_ours_beside_others(suite):
    parts = suite[1]["parts"]
    for size in parts["layers"]["sizes"].values():
        kinds = {
            f"{who}, all_to_all + {experts}"
            for who in ("ours", "before")
            for experts in ("grouped", "blocks")
        }
        assert set(size["median_ms"]) == kinds | {"plain glue"}
        assert all(max(e.values()) < 2e-2 for e in size["errors"].values())
        assert {"y", "x", "w1", "w2", "w3"} == set(size["errors"]["plain glue"])
        kept = size["memory"]["ours, all_to_all + grouped"]["saved_gb"]
        assert size["predicted_kept_gb"] < kept < 2 * size["predicted_kept_gb"]  # small: ids weigh much
    ours = {"ours", "all_gather + loop", "capacity"}
    theirs = {"before", "before, all_gather + loop", "before, capacity"}
    assert set(parts["seed"]["median_ms"]) == {"seed"} | ours | theirs
    assert parts["seed"]["run"]["bytes_sent_per_step"]["counted"] > 0
    assert len(suite[1]["before_sha256"]) == 64


def test_what_is_broken_is_said_and_the_next_part_runs(build):
    """A copy whose results come home in the wrong order, and which has no notebooks to extract."""
    broken = copy_of_the_code(build / "broken_suite", '"combine"), order)', '"combine").flip(0), order)')
    flags = ["--device", "cpu", "--small", "--output", str(broken / "results")]
    flags += ["--parts", "seed", "bandwidth", "layers"]
    done = torchrun(2, str(broken / "measure/gpus.py"), *flags, timeout=180)
    assert done.returncode != 0
    parts = json.loads((broken / "results/cpu_x2_suite.json").read_text())["parts"]
    assert "cannot be extracted" in parts["seed"]["failures"][0]
    assert any("all_to_all: tokens came back" in f for f in parts["bandwidth"]["failures"])
    assert any("off the reference" in f for f in parts["layers"]["failures"])
    assert not any("all_gather" in f or "plain glue" in f for f in parts["bandwidth"]["failures"])
    assert "failed: seed, bandwidth, layers" in done.stdout
