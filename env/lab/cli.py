"""The command `lab`."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import shutil
import sys

import click
from rich.console import Console
from rich.table import Table

from lab import settings
from lab.errors import LabError, NotRunning
from lab.report import Report


class Command(click.Group):
    """Turns the lab's own errors into one line on standard error and exit status 1."""

    def invoke(self, context: click.Context):
        """Run a subcommand."""
        try:
            return super().invoke(context)
        except LabError as error:
            click.echo(f"lab: {error.what}" + (f" {error.cure}" if error.cure else ""), err=True)
            context.exit(1)
        except KeyboardInterrupt:
            click.echo("lab: interrupted; run the same command again, or `lab down`.", err=True)
            context.exit(130)
        except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            click.echo(f"lab: {error.strerror}: {error.filename}.", err=True)
            context.exit(1)
        except OSError as error:
            click.echo(f"lab: {error.strerror or error}" + (f": {error.filename}" if error.filename else "") + ".", err=True)
            context.exit(1)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A local Kubernetes cluster and three Kafka brokers for the book's notebooks."""
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), *settings.ADMIN_PATH]))


def as_root(*program: str, **variables: str) -> None:
    """Go on as root through sudo, keeping what the lab reads of the environment.

    Args:
        program: What the interpreter runs; this command if nothing is named.
        variables: What else to keep.
    """
    if os.geteuid() == 0:
        return
    kept = {**settings.environment(), "LAB_CACHE": str(settings.cache()), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    program = program or ("-m", "lab", *sys.argv[1:])
    sys.stdout.flush()
    os.execvp("sudo", ["sudo", "env", *(f"{name}={value}" for name, value in kept.items()), sys.executable, *program])


def _brought_along() -> list[str]:
    """A line on each of what LAB_CLUSTER and LAB_BROKERS name, once it was checked."""
    if settings.own() == settings.Own("", ""):
        return []
    from lab import byo

    return byo.examine()


def _root_lab() -> bool:
    return settings.SYSTEM_STATE.exists()


@main.command()
@click.option("--nodes", type=click.IntRange(1, settings.MAX_NODES), help="Worker nodes; 2 where none run yet.")
@click.option("--no-cluster", is_flag=True, help="Brokers only; needs no root.")
@click.option("--no-brokers", is_flag=True, help="Cluster only.")
def up(nodes: int | None, no_cluster: bool, no_brokers: bool) -> None:
    """Bring the lab up, or find it running."""
    from lab import host, lifecycle

    report = Report()
    own = settings.own()
    for line in _brought_along():
        report(line)
    with_cluster, with_brokers = not (no_cluster or own.cluster), not (no_brokers or own.brokers)
    if not (with_cluster or with_brokers):
        report("Nothing to start: the cluster and the brokers are your own.")
        return
    if with_cluster:
        if why_not := host.clusterless():
            raise why_not
        if not host.is_root():
            lifecycle.refuse_if_held()
            lifecycle.prepare(report, with_cluster=True, with_brokers=with_brokers)
            as_root()
    lab = lifecycle.up(report, nodes=nodes, with_cluster=with_cluster, with_brokers=with_brokers)
    if lab.kubeconfig:
        report(f"Kubernetes {settings.KUBERNETES}: {lab.kubeconfig} (`lab kubectl get nodes`)")
    if lab.bootstrap:
        report(f"Kafka {settings.KAFKA}: {lab.bootstrap}")


@main.command()
@click.option("--purge", is_flag=True, help="Remove the cache too: binaries, jars, images.")
@click.option("--force", is_flag=True, help="Take down a lab of another checkout as well.")
def down(purge: bool, force: bool) -> None:
    """Take the lab down; nothing of it stays but the cache."""
    from lab import lifecycle

    if _root_lab() or (purge and any(settings.cache().glob("store-*"))):
        as_root()
    lifecycle.down(Report(), purge=purge, force=force)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Show each component, node and broker: version, age, memory, address."""
    from lab import status as told

    rows = told.collect()
    if as_json:
        click.echo(jsonlib.dumps([row.as_dict() for row in rows], indent=2))
    elif not rows:
        click.echo("No lab is up. Start it with `lab up`.")
    else:
        told.show(rows, Console(width=max(shutil.get_terminal_size().columns, 112)))
    if not rows or any(row.state != "running" for row in rows):
        sys.exit(1)


@main.command()
@click.option("--quick", is_flag=True, help="Only whether a cluster can run here, or has been brought along; one line.")
def doctor(quick: bool) -> None:
    """Show what this machine has and lacks, with the cure for each."""
    from lab import host

    if quick:
        if not settings.own().cluster and (why_not := host.clusterless()):
            raise why_not
        return
    findings = host.examine(running=settings.find() is not None)
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row("✓" if finding.well else "✗", finding.what, finding.found, "" if finding.well else finding.cure)
    Console(highlight=False).print(table)
    for line in _brought_along():
        click.echo(f"✓ {line}")
    if not all(finding.well for finding in findings):
        sys.exit(1)


@main.command()
@click.argument("name", required=False)
@click.option("-n", "--lines", default=50, show_default=True, help="How many lines from the end.")
def logs(name: str | None, lines: int) -> None:
    """Print a component's log, e.g. kubelet, node-1/kubelet, broker-2; without NAME, list them."""
    from lab import status as told

    found = told.logs()
    if name is None:
        click.echo("\n".join(sorted(found)) or "There are no logs: no lab is up.")
        return
    chosen = {label: path for label, path in found.items() if label == name or label.split("/")[-1] == name or label.startswith(f"{name}/")}
    if not chosen:
        raise NotRunning(f"There is no log of {name!r}.", f"Known: {', '.join(sorted(found)) or 'none, no lab is up'}.")
    for label, path in sorted(chosen.items()):
        if len(chosen) > 1:
            click.echo(f"==> {label}")
        click.echo("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))


class Verbatim(click.Command):
    """Hands every argument on as it is, `--` and options included."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Take the arguments without looking at them."""
        context.params["arguments"] = tuple(arguments)
        return []


@main.command(cls=Verbatim)
def kubectl(arguments: tuple[str, ...]) -> None:
    """Run kubectl against the cluster that notebooks use."""
    from lab import access

    environment = access.environment(cluster=True)
    program = shutil.which("kubectl", path=environment["PATH"])
    if program is None:
        raise NotRunning("There is no kubectl.", "Build it with `lab build`.")
    try:
        os.execve(program, [program, *arguments], environment)
    except OSError as error:
        raise NotRunning(f"{program} cannot run: {error.strerror}.", "Build it anew: `lab down --purge`, then `lab build`.") from None


@main.command()
def env() -> None:
    """Print the variables that connect a shell to the lab: eval "$(lab env)"."""
    from lab import access

    for name, value in access.variables().items():
        click.echo(f"export {name}={value}" if name == "PATH" else f"export {name}={shlex.quote(value)}")


@main.command()
def build() -> None:
    """Build the binaries and images, the add-ons' too, and fetch the jars, and start nothing."""
    from lab import host, lifecycle

    own = settings.own()
    with_cluster = not own.cluster and host.clusterless() is None
    lifecycle.prepare(Report(), with_cluster=with_cluster, with_brokers=not own.brokers, with_addons=True)


@main.command()
@click.argument("names", nargs=-1)
def addon(names: tuple[str, ...]) -> None:
    """Bring up what one lesson needs and others do not; without NAMES, list what there is."""
    from lab import addons, provision

    if not names:
        lab = settings.find()
        running = provision.applied(lab) if lab and lab.kubeconfig and not settings.own().cluster else {}
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, one in addons.every().items():
            table.add_row("✓" if name in running else " ", name, f"{one.told['about']}\n[dim]{one.told['title']}[/dim]")
        Console(highlight=False).print(table)
        return
    addons.named(names)
    if not settings.own().cluster and _root_lab():
        if not os.geteuid():
            provision.up(Report(), names)
            return
        addons.prepare(Report(), addons.named(names))
        as_root()
    provision.up(Report(), names)


@main.group(cls=Command)
def node() -> None:
    """Work on one node."""


@node.command()
@click.argument("name")
def restart(name: str) -> None:
    """Cut the node's power and start it again."""
    from lab import lifecycle

    lifecycle.restart_node(name)


@main.command()
@click.option("--runs", type=click.IntRange(1, 20), default=5, show_default=True, help="How often each start is measured.")
def bench(runs: int) -> None:
    """Measure starting, stopping and idling, and print the medians."""
    from lab import bench as measured

    as_root()
    measured.run(runs, Console())


@main.command()
@click.option("--kafka", is_flag=True, help="Instead, the images that env/compose.yaml runs, for where the public ones cannot be had.")
def images(kafka: bool) -> None:
    """Write the demo images as an archive and print its path, for `kind load image-archive` or `docker load`."""
    from lab import compose
    from lab import images as written

    if kafka:
        click.echo(compose.archive(Report()))
        for variable, tag in compose.tags().items():
            click.echo(f"export {variable}={tag}", err=True)
        return
    click.echo(written.demo_archive(Report()))
    for tag in written.tags():
        click.echo(tag, err=True)
