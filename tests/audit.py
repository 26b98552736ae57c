"""Look for known vulnerabilities in everything that is pinned: `make audit`. Needs the internet.

Python packages are looked up by pip-audit, Go programs, as they were built, by govulncheck, jars in OSV's database itself.
Exit status: 0, none is known; 1, some are; 2, a database could not be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request

from lab import addons, binaries, brokers, settings
from lab.jars import Jars
from lab.report import Report

PIP_AUDIT = "pip-audit==2.10.1"
GOVULNCHECK = "golang.org/x/vuln/cmd/govulncheck@v1.9.0"
OSV = "https://api.osv.dev/v1/querybatch"
"""https://google.github.io/osv.dev/post-v1-querybatch/"""
GO = "https://vuln.go.dev/index/db.json"
"""What govulncheck reads first (https://go.dev/doc/security/vuln/database)."""


class Unreachable(Exception):
    """A database could not be asked; the message says why."""


def of_python() -> list[str]:
    """What is known of requirements.txt: package, version, vulnerability.

    Raises:
        Unreachable: OSV's database did not answer.
    """
    _reach(OSV)
    command = [
        sys.executable,
        "-m",
        "uv",
        "tool",
        "run",
        PIP_AUDIT,
        "--vulnerability-service=osv",
        "--format=json",
        "--progress-spinner=off",
    ]
    done = subprocess.run(
        [*command, "--disable-pip", "--requirement=requirements.txt"], cwd=settings.CHECKOUT, capture_output=True, text=True
    )
    try:
        told = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise Unreachable(_last(done.stderr)) from None
    if skipped := [one["name"] for one in told if "skip_reason" in one]:
        raise Unreachable(f"pip-audit skipped {', '.join(skipped)}")
    return [f"{one['name']} {one['version']}: {found['id']}" for one in told for found in one["vulns"]]


def of_go() -> list[str]:
    """What is known of the Go programs: the program, and what govulncheck says of it.

    Raises:
        Unreachable: The Go vulnerability database did not answer.
    """
    _reach(GO)
    lines = []
    modules = [binaries.CLUSTER, *(one.module for one in addons.every().values() if one.module)]
    toolchain = binaries.go(Report(quiet=True))
    for module in modules:
        if not module.built:
            raise Unreachable(f"{module.title} is not built; run `lab build`")
        for program in sorted(path for path in module.folder.iterdir() if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"):
            done = subprocess.run([toolchain, "run", GOVULNCHECK, "-mode=binary", program], capture_output=True, text=True)
            if done.returncode == 3:
                lines += [f"{program.name}: {line}" for line in done.stdout.splitlines() if line.startswith("Vulnerability #")]
            elif done.returncode:
                raise Unreachable(_last(done.stderr))
    return lines


def of_java() -> list[str]:
    """What is known of the jars: coordinates, vulnerability.

    Raises:
        Unreachable: OSV's database did not answer.
    """
    from jgo.env import LockFile

    locks: list[Jars] = [brokers.JARS, *(one.jars for one in addons.every().values() if one.jars)]
    jars = sorted({(f"{jar.groupId}:{jar.artifactId}", jar.version) for one in locks for jar in LockFile.load(one.lock).dependencies})
    queries = [{"package": {"ecosystem": "Maven", "name": name}, "version": version} for name, version in jars]
    request = urllib.request.Request(OSV, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"})
    try:
        answers = json.load(urllib.request.urlopen(request, timeout=60))["results"]
    except (OSError, ValueError) as error:
        raise Unreachable(f"{OSV}: {getattr(error, 'reason', error)}") from None
    return [
        f"{name} {version}: {found['id']}" for (name, version), one in zip(jars, answers, strict=True) for found in one.get("vulns", [])
    ]


def _reach(url: str) -> None:
    """Raise Unreachable at once where a tool would try for minutes."""
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.HTTPError:
        return  # It answers, only not to this.
    except OSError as error:
        raise Unreachable(f"{url}: {getattr(error, 'reason', error)}") from None


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def main() -> int:
    """Ask of each kind and print what is known."""
    status = 0
    for kind, ask in (("Python packages", of_python), ("Go programs", of_go), ("jars", of_java)):
        try:
            known = ask()
        except Unreachable as error:
            print(f"? {kind}: could not be looked up, so nothing is known of them: {error}")
            status = 2
            continue
        print(f"{'✗' if known else '✓'} {kind}: {len(known) or 'no'} known vulnerabilities", *known, sep="\n    ")
        status = status or int(bool(known))
    return status


if __name__ == "__main__":
    sys.exit(main())
