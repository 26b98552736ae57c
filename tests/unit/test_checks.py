import matplotlib as mpl
import pytest

import lab
from lab import images, plots
from lab.report import Report


def test_a_check_says_what_it_verified(capsys: pytest.CaptureFixture[str]) -> None:
    lab.check("no request failed", True)
    assert capsys.readouterr().out == "✓ no request failed\n"
    with pytest.raises(lab.CheckFailed, match=r"✗ no request failed\. Found instead: 3"):
        lab.check("no request failed", False, 3)


def test_waiting_ends_with_what_was_found_or_names_what_did_not_come() -> None:
    answers = iter([None, 0, "", "there"])
    assert lab.wait("an answer", lambda: next(answers), limit=5, every=0.01) == "there"
    with pytest.raises(lab.TimedOut, match=r"Waited 0 s for the leader to move.*last seen: \[\]"):
        lab.wait("the leader to move", list, limit=0.05, every=0.01)


def test_waiting_takes_some_errors_for_not_yet() -> None:
    answers = iter([0, 1])
    assert lab.wait("a quotient", lambda: 1 / next(answers), limit=5, every=0.01, despite=ZeroDivisionError) == 1
    with pytest.raises(lab.TimedOut, match=r"last seen: ZeroDivisionError\('division by zero'\)"):
        lab.wait("a quotient", lambda: 1 / 0, limit=0.05, every=0.01, despite=(ZeroDivisionError, KeyError))
    with pytest.raises(ZeroDivisionError):
        lab.wait("a quotient", lambda: 1 / 0, limit=5, despite=KeyError)


@pytest.mark.parametrize("name", ["", "Über", "a" * 41, "-a", "a-", "a_b"])
def test_a_lesson_is_named_as_a_namespace_can_be(name: str) -> None:
    with pytest.raises(lab.LabError, match="cannot name a lesson"):
        lab.start(name)


def test_letters_in_plots_are_large_enough() -> None:
    plots.style()
    assert all(
        mpl.rcParams[key] >= 10
        for key in ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    )


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    with report.step("Build it") as step:
        step._told -= 100
        step._started -= 100
        step.progress(25, 100, "packages")
    with pytest.raises(ZeroDivisionError), report.step("Fail at it"):
        print(1 / 0)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "  Build it: 25 of 100 packages, about 5 min left"
    assert told[1].startswith("✓ Build it  100.")
    assert told[2].startswith("✗ Fail at it")


def test_the_demo_images_have_names() -> None:
    assert images.name("shop:v1") in images.tags()
