"""Where the driver takes each record that the workers and the controller have posted."""

from __future__ import annotations

from unittest.mock import Mock, call

from orchestrator.driver import fit
from orchestrator.telemetry.records import AttemptEnded, Begin, Failure, LossSeen, Note, Record, Stamped, StepSkipped

BEGIN = Begin(
    iter=4, max_iters=9, from_="c4", num_params=5, tokens_per_iter=64, world_size=1, device="cpu", dtype="float32"
)
SKIPPED = StepSkipped(iter=5, why="the norm of the gradient is nan", skipped=1, in_a_row=1)
NOTE = Note(text="a line")


def called_for(record: Record) -> tuple[list[object], list[object]]:
    """Return what the driver and the display are asked to do with a record."""
    driver, display, metrics = Mock(), Mock(), Mock()
    driver.ray_output.log_file_to_tell.return_value = None
    fit._pass_on([Stamped(record, 1000.5, "a")], driver, display, metrics)
    assert metrics.mock_calls == [call.write(Stamped(record, 1000.5, "a")), call.flush()], "they hear of all records"
    *calls, pass_on, _ = driver.mock_calls
    assert pass_on == call.ray_output.pass_on()
    return calls, display.mock_calls


def test_the_controllers_events_are_kept_with_their_time() -> None:
    assert called_for(AttemptEnded(number=1)) == ([call.journal.emit(AttemptEnded(number=1), 1000.5)], [])


def test_the_workers_records_are_shown_and_summed_up() -> None:
    for record in (SKIPPED, NOTE):
        assert called_for(record) == ([call.journal.observe(Stamped(record, 1000.5, "a"))], [call.show(record)])


def test_rays_words_are_sorted_by_what_is_known_of_a_loss() -> None:
    lost, bug = (Failure(number=1, cause=cause, text="it failed") for cause in ("worker_lost", "user_error"))
    assert called_for(LossSeen()) == ([call.ray_output.expect_loss()], [])
    assert called_for(lost)[0] == [call.journal.emit(lost, 1000.5), call.ray_output.expect_loss()]
    assert called_for(bug)[0] == [call.journal.emit(bug, 1000.5), call.ray_output.show_everything()]
    assert called_for(BEGIN)[0][0] == call.ray_output.end_loss()


def test_the_file_of_rays_words_is_named() -> None:
    driver, display = Mock(), Mock()
    driver.ray_output.log_file_to_tell.return_value = "out/ray.log"
    fit._pass_on([], driver, display, Mock())
    display.show.assert_called_once_with(Note(text="Ray's own words about lost workers are in out/ray.log"))
