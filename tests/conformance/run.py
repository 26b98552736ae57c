"""Run Kubernetes' own conformance tests against the embedded cluster: `make conformance`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import specs
import userland
from rich.console import Console
from rich.table import Table

from lab import binaries, cli, cluster, errors, host, lifecycle, settings
from lab.report import Report

RESULTS = settings.CHECKOUT / "_build" / "conformance"
"""Where a run leaves its log and Ginkgo's reports."""
PROCESSES = 6
"""How many specs run at a time: most of them wait most of the time, and the two-core machine has other work to do."""
LIMIT = "50m"
"""When Ginkgo gives up; two quiet cores need half of it."""
GRACE = 90.0
"""Seconds that Ginkgo gets to clean up after Ctrl-C."""
ENDED = re.compile(r"^[•S] (\[[A-Z !]+\] )?\[[\d.]+ seconds\]")
"""The line with which Ginkgo ends a spec's report."""


def main() -> int:
    """Prepare, run, tell; 0 if every spec that was run held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--focus", default=os.environ.get("FOCUS", ""), help="run the specs whose name fits this pattern, from any area")
    parser.add_argument("--procs", type=int, default=PROCESSES, help="how many at a time (default: %(default)s)")
    parser.add_argument("--limit", default=LIMIT, help="when to give up, as Go writes durations (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="say what would be run and what is left out, and run nothing")
    told = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*os.environ["PATH"].split(os.pathsep), *settings.ADMIN_PATH]))
    report = Report()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if why_not := host.clusterless():
            raise why_not
        if settings.own().cluster:
            raise errors.LabError("These tests are for the embedded cluster.", "Unset LAB_CLUSTER.")
        host.install_programs(report)
        binaries.build(report, [binaries.CLUSTER, userland.MODULE])
        archive = userland.archive(report)
        chosen, left_out = choose(told.focus)
        if told.list:
            show(chosen, left_out)
            return 0
        if not chosen:
            raise errors.LabError(f"No spec fits {told.focus!r}.", "`--list` names them.")
        cli.as_root(*sys.argv, FOCUS=os.environ.get("FOCUS", ""))
        with running(report) as lab, carrying(report, lab, archive), unchanged(report, lab):
            ran = run(report, lab, chosen, told.procs, told.limit)
    except errors.LabError as error:
        print(f"lab: {error.what} {error.cure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted.", file=sys.stderr)
        return 130
    return tell(ran, left_out, len(chosen))


def choose(focus: str) -> tuple[list[specs.Spec], list[specs.LeftOut]]:
    """The specs to run and those left out, from what the suite itself lists.

    Raises:
        LabError: The suite could not list them, or `specs.toml` does not fit it.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    listing = RESULTS / "listing.json"
    done = subprocess.run(
        [userland.MODULE.folder / "e2e.test", "--ginkgo.dry-run", "--ginkgo.silence-skips", f"--ginkgo.json-report={listing}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise errors.LabError(f"The tests could not be listed: {(done.stderr or done.stdout).strip()[-300:]}.", "")
    try:
        return specs.Selection(specs.SELECTION.read_text()).of(specs.read(listing), focus)
    except ValueError as error:
        raise errors.LabError(str(error), "Mend it.") from None
    finally:
        listing.unlink(missing_ok=True)


@contextmanager
def running(report: Report) -> Iterator[settings.Lab]:
    """The lab, brought up if it is not; what was not up before is taken down at the end."""
    before = settings.find()
    lab = lifecycle.up(report, with_brokers=False)
    try:
        yield lab
    finally:
        if before is None:
            lifecycle.down(report)


@contextmanager
def carrying(report: Report, lab: settings.Lab, archive: Path) -> Iterator[None]:
    """The nodes, with the images of the tests for as long as they run."""
    tags = [tag for tag, _ in userland.made(userland.wanted(), userland.NAMES)]
    with report.step("Import the images of the tests"):
        for node in lab.nodes:
            with archive.open("rb") as content:
                done = lifecycle.ctr(lab, node, "images", "import", "-", stdin=content)
            if done.returncode:
                raise errors.Unhealthy(
                    f"{node} did not take the images: {done.stderr.strip()[-300:]}", f"See `lab logs {node}/containerd`."
                )
    try:
        yield
    finally:
        for node in lab.nodes:
            lifecycle.ctr(lab, node, "images", "rm", *tags)


@contextmanager
def unchanged(report: Report, lab: settings.Lab) -> Iterator[None]:
    """The cluster, with what the tests made and left removed, and told of."""
    kubectl = functools.partial(cluster.kubectl, lab.kubeconfig)
    before = objects(kubectl)
    try:
        yield
    finally:
        with report.step("Clean up"):
            names = kubectl("get", "namespaces", "--selector=e2e-framework", "--output=name").stdout.split()
            if names:
                kubectl("delete", "--timeout=180s", *names, timeout=200)
            end = time.monotonic() + 30
            while (left := objects(kubectl) - before) and time.monotonic() < end:
                time.sleep(1)
        if left:
            report(f"The tests left in the cluster: {', '.join(sorted(left))}")


def objects(kubectl: Callable[..., subprocess.CompletedProcess]) -> set[str]:
    """What is in the cluster outside of namespaces: objects, and the nodes' labels and taints."""
    kinds = kubectl("api-resources", "--namespaced=false", "--verbs=list", "--output=name").stdout.split()
    kinds = [kind for kind in kinds if kind != "componentstatuses" and not kind.endswith("metrics.k8s.io")]
    found = set(kubectl("get", ",".join(kinds), "--output=name", timeout=60).stdout.split())
    for node in json.loads(kubectl("get", "nodes", "--output=json").stdout)["items"]:
        name = node["metadata"]["name"]
        found |= {f"label {key} of {name}" for key in node["metadata"]["labels"]}
        found |= {f"taint {taint['key']} of {name}" for taint in node["spec"].get("taints", [])}
    return found


def run(report: Report, lab: settings.Lab, chosen: list[specs.Spec], processes: int, limit: str) -> list[specs.Spec]:
    """Run specs with Ginkgo's own command, several at a time.

    Raises:
        LabError: Ginkgo did not get as far as a report.
        KeyboardInterrupt: The person has had enough; Ginkgo has cleaned up.
    """
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    command = [
        userland.MODULE.folder / "ginkgo", f"--procs={min(processes, len(chosen))}", "--no-color", "-v", "--silence-skips", "--keep-going",
        f"--timeout={limit}", f"--focus={specs.pattern(chosen)}", f"--output-dir={RESULTS}",
        "--json-report=report.json", "--junit-report=junit.xml", userland.MODULE.folder / "e2e.test", "--",
        f"--kubeconfig={lab.kubeconfig}", f"--kubectl-path={binaries.CLUSTER.folder / 'kubectl'}", "--provider=skeleton",
        f"--num-nodes={len(lab.nodes)}", "--dump-logs-on-failure=false", "--disable-log-dump=true",
    ]  # fmt: skip
    environment = {**os.environ, "KUBECTL_KUBERC": "false", "KUBECACHEDIR": str(RESULTS / "kubectl-cache")}
    log = RESULTS / "log.txt"
    with log.open("w", buffering=1) as file, report.step(f"Run {len(chosen)} of Kubernetes' own tests") as step:
        process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        ended = 0
        try:
            for line in process.stdout:
                file.write(line)
                if ENDED.match(line):
                    ended += 1
                    if ended > 3 * processes:  # Before that, those that wait for minutes say nothing of the others.
                        step.progress(ended, len(chosen), "specs")
            process.wait()
        except BaseException:
            stop(process)
            raise
        finally:
            shutil.rmtree(RESULTS / "kubectl-cache", ignore_errors=True)
            for path in (RESULTS.parent, RESULTS, *RESULTS.iterdir()):
                os.chown(path, *settings.owner())
    if not (RESULTS / "report.json").exists():
        raise errors.LabError(f"Ginkgo made no report; the end of {log} says why.", "")
    return [spec for spec in specs.read(RESULTS / "report.json") if spec.state != "skipped" or spec.message]


def stop(process: subprocess.Popen) -> None:
    """End Ginkgo as Ctrl-C would: its specs delete what they made. A second Ctrl-C ends it at once."""
    print("Ginkgo cleans up; Ctrl-C again ends it at once.", file=sys.stderr)
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def show(chosen: Iterable[specs.Spec], left_out: Iterable[specs.LeftOut]) -> None:
    """Print what would be run."""
    for spec in sorted(chosen, key=lambda spec: spec.name):
        print(spec.name)
    for one in left_out:
        print(f"Left out: {one.name}: {one.why}")


def tell(ran: list[specs.Spec], left_out: list[specs.LeftOut], wanted: int) -> int:
    """Print the table, each failure, and what was left out; the exit status."""
    selection = specs.Selection(specs.SELECTION.read_text())
    console = Console(highlight=False, soft_wrap=True, width=max(shutil.get_terminal_size().columns, 100))
    table = Table(box=None, pad_edge=False)
    for column in ("area", "passed", "failed", "left out", "seconds"):
        table.add_column(column, justify="left" if column == "area" else "right")
    found = specs.rows(selection, ran, left_out)
    for row in found:
        table.add_row(row.area, str(row.passed), str(row.failed or ""), str(row.left_out or ""), f"{row.seconds:.0f}")
    passed, failed = sum(row.passed for row in found), sum(row.failed for row in found)
    table.add_row("all", str(passed), str(failed), str(sum(row.left_out for row in found)), f"{sum(row.seconds for row in found):.0f}")
    console.print(table)
    for spec in ran:
        if spec.failed:
            console.print(f"\n✗ {spec.name}\n  {spec.message}", markup=False)
        elif spec.state in ("skipped", "pending"):
            console.print(f"\nLeft out by itself: {spec.name}\n  {spec.message}", markup=False)
    for one in left_out:
        console.print(f"\nLeft out: {one.name}\n  {one.why}" + (f" Needs {one.image}." if one.image else ""), markup=False)
    unmade = sorted(set(userland.wanted()) - {tag for tag, _ in userland.made(userland.wanted(), userland.NAMES)})
    console.print(f"\n{len(unmade)} of the suite's images are not made here; a spec that needs one of them fails.", markup=False)
    missing = wanted - passed - failed - sum(spec.state in ("skipped", "pending") for spec in ran)
    if missing > 0:
        console.print(f"\n{missing} specs were not reached.", markup=False)
    console.print(f"\nThe log and Ginkgo's reports are in {RESULTS.relative_to(settings.CHECKOUT)}.", markup=False)
    return 1 if failed or missing > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
