"""Bringing the lab up and taking it down, so that any interruption is mended by the next command."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import psutil

from lab import addons, binaries, brokers, cluster, host, images, machine, network, settings
from lab.errors import NotRunning, Occupied, Unhealthy
from lab.report import Report
from lab.settings import Lab
from lab.supervise import Supervisor

MARK = "BY_EXPERIMENT_STATE"
"""Every process that the lab starts on the host carries this variable; its value is the state folder."""
TUNABLES = "tunables.json"
PATIENCE = 90.0
"""Seconds that each step of the start may take; it takes 4 at most on two idle cores."""
DEFAULT_NODES = 2
STAYS_PUT = "installed"
"""A file in the state folder: everything in it was written whole."""


@contextlib.contextmanager
def exclusive(report: Report) -> Iterator[None]:
    """Hold the machine's (or the user's) one right to start or stop a lab; wait for whoever has it.

    The lock is on a folder that is always there, so that it leaves no file behind.
    """
    place = settings.state().parent
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Another `lab` command is at work on this machine; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def supervisor(state: Path) -> Supervisor:
    """The host's supervisord: its programs are the machines and the brokers."""
    return Supervisor(state / "host")


def processes(state: Path | None = None) -> list[psutil.Process]:
    """The processes on the host that a lab started: that of `state`, or of any."""
    found = []
    for process in psutil.process_iter():
        try:
            value = process.environ().get(MARK)
        except (psutil.Error, OSError):
            continue
        if value and (state is None or value == str(state)):
            found.append(process)
    return found


def prepare(report: Report, *, with_cluster: bool, with_brokers: bool, with_addons: bool = False) -> None:
    """Build, fetch and write all that the lab runs; needs no root but for apt. What is there is left alone.

    The Go build burns the processors while the jars wait on the network, so both run at once.

    Args:
        report: Where each step is told.
        with_cluster: Whether for the cluster.
        with_brokers: Whether for the brokers.
        with_addons: Whether for the add-ons of either too; else each is built when a lesson first asks for it.

    Raises:
        LabError: Something could not be had.
    """
    settings.cache().mkdir(parents=True, exist_ok=True)
    if with_cluster:
        host.install_programs(report)

    chosen = addons.every().values() if with_addons else ()

    def kafka() -> None:
        with report.alone(settings.cache() / "kafka.lock"), report.step(f"Kafka {settings.KAFKA}: jars and start-up cache"):
            brokers.prepare()
        addons.prepare(report, [one for one in chosen if one.jars])

    def kubernetes() -> None:
        binaries.build(report, [binaries.CLUSTER, *(one.module for one in chosen if one.module)])
        images.system_archive(report)
        addons.prepare(report, [one for one in chosen if not one.jars])

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(kubernetes)] if with_cluster else []
        jobs += [pool.submit(images.demo_archive, report)] if with_cluster else []
        jobs += [pool.submit(kafka)] if with_brokers else []
        for job in jobs:
            job.result()


def up(report: Report, *, nodes: int | None = None, with_cluster: bool = True, with_brokers: bool = True) -> Lab:
    """Bring the lab up, or find it running.

    Args:
        report: Where each step is told.
        nodes: How many worker nodes, 1 to `settings.MAX_NODES`; None takes what runs, else `DEFAULT_NODES`.
        with_cluster: Whether to run the cluster; needs root.
        with_brokers: Whether to run the brokers.

    Raises:
        LabError: It could not be brought up; what was begun is undone.
    """
    state = settings.state()
    refuse_if_held()
    _require_place(state.parent)
    if not (was_running := _running(state) is not None):
        prepare(report, with_cluster=with_cluster, with_brokers=with_brokers)
    with exclusive(report):
        refuse_if_held()
        if (running := _running(state)) is not None:
            return _found(running, report, nodes=nodes, with_cluster=with_cluster, with_brokers=with_brokers)
        if was_running:
            prepare(report, with_cluster=with_cluster, with_brokers=with_brokers)
        wanted = (nodes or DEFAULT_NODES) if with_cluster else 0
        _end(state)
        host.require(cluster=with_cluster, kafka=with_brokers)
        if state.exists() and not _fits(state, wanted, with_brokers):
            shutil.rmtree(state)
        fresh = not state.exists()
        try:
            return _start(report, state, nodes=wanted, with_brokers=with_brokers)
        except BaseException:
            _keep_logs(state)
            _end(state)
            if fresh:
                shutil.rmtree(state, ignore_errors=True)
            raise


def _require_place(folder: Path) -> None:
    """Say that the state cannot be kept in a folder before anything is built, not after."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def refuse_if_held() -> None:
    """Say who holds this machine's lab, if another checkout does; works without a right to that lab.

    Raises:
        Occupied: Another checkout's lab is up.
    """
    lab = settings.find()
    if lab is None or lab.checkout == str(settings.CHECKOUT) or not Path(lab.checkout).exists() or not alive(Path(lab.state)):
        return
    raise Occupied(
        f"A lab of another checkout is up on this machine: {lab.checkout}.",
        f"Use it from here with KUBECONFIG={lab.kubeconfig} LAB_CLUSTER=context:lab LAB_BROKERS={lab.bootstrap}, "
        "run one beside it with LAB_INSTANCE=2, or take it down there with `lab down`.",
    )


def alive(state: Path) -> bool:
    """Whether the supervisord of that state folder exists, whoever owns it."""
    try:
        return "supervisor" in " ".join(psutil.Process(int((state / "host" / "supervisord.pid").read_text())).cmdline())
    except (psutil.Error, OSError, ValueError):
        return False


def _running(state: Path) -> Lab | None:
    found = settings.find()
    if found is not None and Path(found.state) == state and supervisor(state).running():
        return found
    return None


def _found(lab: Lab, report: Report, *, nodes: int | None, with_cluster: bool, with_brokers: bool) -> Lab:
    if with_cluster and (not lab.nodes or nodes not in (None, len(lab.nodes))):
        raise Occupied(f"The lab runs with {len(lab.nodes)} node(s), not {nodes or DEFAULT_NODES}.", "Take it down first with `lab down`.")
    if with_brokers and not lab.bootstrap:
        raise Occupied("The lab runs without brokers.", "Take it down first with `lab down`.")
    control = supervisor(Path(lab.state))
    dead = [process for process in control.processes() if process["statename"] != "RUNNING"]
    for process in dead:
        report(f"{process['name']} was {process['statename'].lower()}; starting it.")
        control.start_program(process["name"])
    if any(process["name"].startswith("broker-") for process in dead):
        brokers.wait_ready(PATIENCE)
    if any(not process["name"].startswith("broker-") for process in dead):
        _wait_cluster(report, lab)
    report("The lab is up already.")
    if lab.nodes and json.loads((Path(lab.state) / STAYS_PUT).read_text()).get("images") != _images():
        report("The demo images have changed since: `lab down` and `lab up` bring the new ones.")
    return lab


def _fits(state: Path, nodes: int, with_brokers: bool) -> bool:
    """Whether what an earlier lab left in `state` is whole and of the same shape."""
    try:
        told = json.loads((state / STAYS_PUT).read_text())
    except (OSError, ValueError):
        return False
    return told == _shape(nodes, with_brokers, told.get("subnet", ""))


def _shape(nodes: int, with_brokers: bool, subnet: str) -> dict:
    return {
        "nodes": nodes,
        "brokers": with_brokers,
        "subnet": subnet,
        "cache": str(settings.cache()),
        "cluster": binaries.CLUSTER.key if nodes else "",
        "images": _images() if nodes else [],
        "checkout": str(settings.CHECKOUT),
    }


def _images() -> list[str]:
    """The image archives that the sources of now give, by name."""
    silent = Report(quiet=True)
    return [images.system_archive(silent).name, images.demo_archive(silent).name]


def _start(report: Report, state: Path, *, nodes: int, with_brokers: bool) -> Lab:
    owner = settings.owner()
    names = cluster.node_names(nodes)
    resumed = (state / STAYS_PUT).exists()
    subnet = ""
    if nodes:
        subnet = json.loads((state / STAYS_PUT).read_text())["subnet"] if resumed else network.free_subnet()
    control = supervisor(state)
    bridge = network.address(subnet, 1) if subnet else None
    machines = cluster.machines(state, subnet, names) if nodes else []
    store = (
        cluster.image_store(report, [one.archive for one in addons.every().values() if one.archive and one.prepared]) if nodes else Path()
    )
    if not resumed:
        with report.step("Write certificates and configuration"):
            state.mkdir(parents=True, exist_ok=True)
            state.chmod(0o755)
            control.folder.mkdir()
            if nodes:
                cluster.install(state, subnet, names, owner, store)
            programs = [one.program(binaries.CLUSTER.folder) for one in machines]
            programs += brokers.programs(state, bridge) if with_brokers else []
            control.write(programs, owner)
            (state / STAYS_PUT).write_text(json.dumps(_shape(nodes, with_brokers, subnet)))
    lab = Lab(
        checkout=str(settings.CHECKOUT),
        state=str(state),
        cache=str(settings.cache()),
        subnet=subnet,
        nodes=names,
        kubeconfig=str(state / "kubeconfig") if nodes else "",
        bootstrap=brokers.bootstrap() if with_brokers else "",
        bootstrap_pods=brokers.bootstrap_pods(bridge) if with_brokers and bridge else "",
        started=time.time(),
    )
    if nodes:
        _save_tunables(state)
        with report.step("Lay the network"):
            network.up(subnet, {one.name: one.address for one in machines}, cluster.pod_subnets(names))
    control.start({MARK: str(state)}, PATIENCE)
    for one in machines:
        one.supervisor.wait_running(PATIENCE)
    if nodes:
        _wait_cluster(report, lab)
    if with_brokers:
        with report.step("Three Kafka brokers in one quorum"):
            brokers.wait_ready(PATIENCE)
    lab.save()
    return lab


def _wait_cluster(report: Report, lab: Lab) -> None:
    api = cluster.Api(Path(lab.state), lab.subnet)

    def until(what: str, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > end:
                raise Unhealthy(f"{what} did not come within {PATIENCE:.0f} s.", "`lab logs` lists what each component said.")
            time.sleep(0.05)

    with report.step("The API server answers"):
        until("The API server's answer", api.ready)
    cluster.apply_manifests(functools.partial(cluster.kubectl, lab.kubeconfig))
    with report.step(f"{len(lab.nodes)} node(s) Ready"):
        until("The nodes' readiness", lambda: api.nodes_ready(len(lab.nodes)))
    with report.step("Cluster DNS answers"):
        until("The cluster's DNS", api.dns_ready)


def init_pid(state: Path, name: str) -> int:
    """The host's pid of the machine's PID 1.

    Raises:
        NotRunning: The machine is not running.
    """
    for process in supervisor(state).processes():
        if process["name"] == name and process["pid"]:
            try:
                children = psutil.Process(process["pid"]).children()
            except psutil.Error:
                break
            if children:
                return children[0].pid
    raise NotRunning(f"{name} is not running.", "See `lab status`.")


def ctr(lab: Lab, node: str, *arguments: str, stdin: IO | None = None) -> subprocess.CompletedProcess:
    """Run containerd's `ctr` on a node, where Kubernetes' images are; needs root.

    Raises:
        NotRunning: The node is not running.
    """
    command = ["nsenter", f"--target={init_pid(Path(lab.state), node)}", "--mount", "--pid", "/opt/bin/ctr", "--namespace=k8s.io"]
    return subprocess.run([*command, *arguments], stdin=stdin or subprocess.DEVNULL, capture_output=True, text=True)


def down(report: Report, *, purge: bool = False, force: bool = False) -> None:
    """Take the lab down; nothing of it stays but the cache, and with `purge` not that either.

    Args:
        report: Where each step is told.
        purge: Remove the cache too.
        force: Take down a lab of another checkout as well.

    Raises:
        Occupied: It is another checkout's.
    """
    state = settings.state()
    with exclusive(report):
        lab = _running(state)
        if lab is not None and lab.checkout != str(settings.CHECKOUT) and Path(lab.checkout).exists() and not force:
            raise Occupied(f"This lab belongs to another checkout: {lab.checkout}.", "Take it down there, or here with `lab down --force`.")
        there = state.exists() or bool(processes(state))
        with report.step("Take the lab down") if there else _nothing():
            _end(state)
            if state.exists():
                shutil.rmtree(state)
        if not there:
            report("No lab was up.")
        if purge and settings.cache().exists():
            with report.step(f"Remove the cache {settings.cache()}"):
                shutil.rmtree(settings.cache())


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _end(state: Path) -> None:
    """End every process of the lab and remove what it holds of the host: links, namespaces, cgroups. Files stay."""
    doomed = processes(state)
    for process in sorted(doomed, key=lambda one: one.create_time()):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
    psutil.wait_procs(doomed, timeout=20)
    if not host.is_root():
        return
    network.down()
    _restore_tunables(state)
    end = time.monotonic() + 10
    while (left := machine.cgroups()) and time.monotonic() < end:
        for folder in left:
            try:
                folder.rmdir()
            except OSError:
                continue
        if machine.cgroups():
            time.sleep(0.05)
    (state / "lab.json").unlink(missing_ok=True)


def _tunables_of_others(state: Path) -> list[Path]:
    return [path for path in sorted(state.parent.glob(f"{settings.NAME}*/{TUNABLES}")) if path.parent != state]


def _save_tunables(state: Path) -> None:
    """Write down what the kubelets will change: as it is, or as the first of the labs beside this one found it."""
    others = _tunables_of_others(state)
    (state / TUNABLES).write_text(others[0].read_text() if others else json.dumps(host.tunables()))


def _restore_tunables(state: Path) -> None:
    """Put back what the kubelets changed, unless those of another lab still want it so."""
    with contextlib.suppress(OSError, ValueError):
        if not _tunables_of_others(state):
            host.restore_tunables(json.loads((state / TUNABLES).read_text()))
        (state / TUNABLES).unlink()


def _keep_logs(state: Path) -> None:
    """Copy the logs of a lab that did not come up to the cache, where `lab logs` finds them."""
    kept = settings.cache() / "failed"
    shutil.rmtree(kept, ignore_errors=True)
    for log in [*state.glob("host/log/*"), *state.glob("*/var/supervisor/log/*")]:
        target = kept / f"{log.relative_to(state).parts[0]}-{log.name}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, target)
        except OSError:
            return


def nodes() -> Supervisor:
    """The supervisord whose programs are the machines.

    Raises:
        NotRunning: There is no lab with a cluster.
    """
    lab = settings.find()
    if lab is None:
        raise NotRunning("No lab is up.", "Start it with `lab up`.")
    if not lab.nodes:
        raise NotRunning("The lab that is up has no nodes.", "Take it down with `lab down` and start it as root.")
    return supervisor(Path(lab.state))


def restart_node(name: str) -> None:
    """Cut a machine's power and start it again.

    Raises:
        NotRunning: There is no such machine, or no lab.
    """
    control = nodes()
    control.kill_program(name)
    control.start_program(name)
