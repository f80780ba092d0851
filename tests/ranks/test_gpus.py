"""measure/gpus.py, in small: on two gloo ranks every part runs and is right; what is broken is said."""

import json

from support import ROOT, copy_of_the_code, torchrun

SMALL = ["--device", "cpu", "--small", "--output"]


def test_every_part_runs_and_is_recorded(tmp_path):
    done = torchrun(2, "measure/gpus.py", *SMALL, str(tmp_path), "--before", "ep_launcher/launcher.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = (tmp_path / "cpu_x2_suite.json").read_text()
    result = json.loads(text)
    assert str(ROOT) not in text and str(tmp_path) not in text
    start = "torchrun --standalone --nproc_per_node=2 measure/gpus.py"
    assert result["command"] == f"{start} --device cpu --small --before FILE"
    assert result["launcher_sha256"] == result["before_sha256"]  # the same file
    assert (
        result["world_size"] == 2 and result["backend"] == "gloo" and result["torch"] and result["num_cores"]
    )
    parts = result["parts"]
    assert list(parts) == ["parity", "invariance", "bandwidth", "growth", "layers", "seed"]
    assert not any(part["failures"] for part in parts.values())
    variants = parts["parity"]["worst_of_variant"]
    assert {"float32", "bfloat16"} == {variant.split()[-1] for variant in variants}
    assert all(0 < worst < 0.1 for worst in variants.values()) and parts["parity"]["num_results"] > len(
        variants
    )
    assert {"1 ranks: local+loop", "2 ranks: all_to_all+blocks"} <= set(parts["invariance"]["furthest"])
    wire = parts["bandwidth"]
    sent, choices, row = wire["mean_bytes_that_leave"], wire["tokens"] * wire["top_k"], 2 * wire["hidden_dim"]
    assert sent["plain gloo all-to-all"] == choices * row / 2
    assert sent["all_gather, dispatch"] == choices * (row + 4)  # all of it to the other rank, with its weight
    assert sent["plain glue, combine"] == sent["all_to_all, combine"] < choices * row
    for size in parts["layers"]["sizes"].values():
        assert {"ours, all_to_all + grouped", "before, all_to_all + blocks", "plain glue"} <= set(
            size["median_ms"]
        )
        assert set(size["errors"]["plain glue"]) == {"y", "x", "w1", "w2", "w3"}
        kept = size["memory"]["ours, all_to_all + grouped"]["saved_gb"]
        assert size["predicted_kept_gb"] < kept < 2 * size["predicted_kept_gb"]  # small: ids weigh much
    assert {"seed", "ours", "before", "capacity"} <= set(parts["seed"]["median_ms"])
    assert all(len(s) == 2 and min(s) > 0 for s in parts["seed"]["samples_ms"].values())


def test_what_is_broken_is_said_and_the_next_part_runs(tmp_path):
    """A copy whose results come home in the wrong order, and which has no notebooks to extract."""
    landed = "(rows,) = flight.land()\n        return sum_rows(rows"
    broken = copy_of_the_code(tmp_path / "copy", landed, landed + ".flip(0)")
    done = torchrun(
        2, str(broken / "measure/gpus.py"), *SMALL, str(tmp_path), "--parts", "seed", "bandwidth", "layers"
    )
    assert done.returncode != 0 and "failed: seed, bandwidth, layers" in done.stdout
    parts = json.loads((tmp_path / "cpu_x2_suite.json").read_text())["parts"]
    assert "cannot be extracted" in parts["seed"]["failures"][0]
    assert any("all_to_all: tokens came back" in f for f in parts["bandwidth"]["failures"])
    assert not any("all_gather" in f or "plain glue" in f for f in parts["bandwidth"]["failures"])
    assert any("off the reference" in f for f in parts["layers"]["failures"])
