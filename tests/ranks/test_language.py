"""Chapter 16 on several ranks: what tests/ranks/language_trials.py found."""

import pytest
from language_trials import BLOCKS, KINDS, MESHES, STEPS, WHOLE
from support import outcome, play

LIMIT = 1e-5  # float32, relative


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "language", "language_trials", 4)


@pytest.fixture(scope="module")
def alone(played):
    """{kind of run: what one rank measures}."""
    return {name.removesuffix(", ep 1"): run for name, run in outcome(played, "every_mesh", 1)[0].items()}


def apart(ours: list[float], right: list[float]) -> float:
    assert len(ours) == len(right)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("world_size", MESHES)
def test_no_curve_depends_on_the_mesh(played, alone, world_size):
    for found in outcome(played, "every_mesh", world_size):
        assert len(found) == len(MESHES[world_size]) * len(KINDS)
        for name, run in found.items():
            right = alone[name.partition(",")[0]]
            assert len(run["task_loss"]) == STEPS and apart(run["task_loss"], right["task_loss"]) < 1e-10, (
                name
            )
            assert apart([run["held_out_loss"]], [right["held_out_loss"]]) < 1e-10, name
            assert run["task_loss"][-1] < run["task_loss"][0]


@pytest.mark.parametrize("world_size", MESHES)
def test_bytes_are_predicted_evaluation_between_steps_or_not(played, world_size):
    for name, run in outcome(played, "every_mesh", world_size)[0].items():
        sent = run["bytes_sent_per_step"]
        if name.startswith("plain"):  # recomputation sends some rows again
            assert sent["predicted"] == sent["counted"], name
            assert (sent["counted"] > 0) == (not name.endswith("ep 1")), name


def test_a_run_goes_on_as_if_never_stopped(played, alone):
    found = outcome(played, "saved_and_resumed", 4)[0]
    same = {"ms_per_step", "metadata_bytes_per_step"}
    for name, value in found["never stopped"].items():
        assert name in same or found["resumed"][name] == value, name
    on_two = outcome(played, "saved_and_resumed", 2)[0]["resumed"]
    for name in ("task_loss", "held_out_loss"):
        ours, right = (run[name] for run in (on_two, alone["everything"]))
        pair = (ours, right) if isinstance(ours, list) else ([ours], [right])
        assert apart(*pair) < 1e-10, name


def check_errors(errors: dict[str, float]) -> None:
    worst = max(errors, key=errors.get)
    assert errors[worst] < LIMIT, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("world_size", MESHES)
@pytest.mark.parametrize("family", WHOLE)
def test_a_published_model_is_ours(played, family, world_size):
    for found in outcome(played, "whole_models", world_size):
        check_errors(found[family])
        assert len(found[family]) > 25


@pytest.mark.parametrize("world_size", MESHES)
@pytest.mark.parametrize("family", BLOCKS)
def test_the_layer_stands_in_a_published_model(played, family, world_size):
    for found in outcome(played, "layers_inside", world_size):
        check_errors(found[family])
        assert sum(".experts." in name for name in found[family]) >= 6


def test_transformers_counts_choices_where_we_count_shares(played):
    """Theirs is top_k times ours for one layer; of several it takes the means first, and does not add them up."""
    found = outcome(played, "aux_losses", 1)[0]
    assert found["theirs, one"] == pytest.approx(2 * found["ours, one"], rel=1e-5)
    assert found["theirs, three"] != pytest.approx(2 * found["ours, three"] / 3, rel=1e-3)
