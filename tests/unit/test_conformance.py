import importlib.util
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "conformance"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"conformance_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


specs, userland = load("specs"), load("userland")

SELECTION = """
[labels]
any = ["Conformance", "NodeConformance"]
none = ["Alpha"]
[areas]
"Jobs" = '^.sig-apps. Job '
"Pods" = '^.sig-node. Pods '
[[left_out]]
match = 'should pull'
image = "registry.example/agnhost:1"
why = "It pulls."
"""


def spec(name: str, *labels: str, state: str = "", seconds: float = 0.0) -> object:
    return specs.Spec(name, frozenset(labels or ["Conformance"]), state, seconds)


SUITE = [
    spec("[sig-apps] Job should run"),
    spec("[sig-apps] Job should run [alpha]", "Conformance", "Alpha"),
    spec("[sig-apps] Job should run with a feature", "Conformance", "Feature:Something"),
    spec("[sig-apps] Job should be fast", "Slow"),
    spec("[sig-node] Pods should pull (an image)", "NodeConformance"),
    spec("[sig-node] Pods should be a+b"),
    spec("[sig-storage] CSINodes should be"),
]


def test_the_areas_choose_and_what_is_left_out_has_a_reason() -> None:
    chosen, left_out = specs.Selection(SELECTION).of(SUITE)
    assert [one.name for one in chosen] == ["[sig-apps] Job should run", "[sig-node] Pods should be a+b"]
    assert left_out == [specs.LeftOut("[sig-node] Pods should pull (an image)", "It pulls.", "registry.example/agnhost:1")]


def test_a_focus_reaches_every_area_but_not_what_is_left_out() -> None:
    chosen, left_out = specs.Selection(SELECTION).of(SUITE, "CSINodes|pull")
    assert [one.name for one in chosen] == ["[sig-storage] CSINodes should be"]
    assert [one.name for one in left_out] == ["[sig-node] Pods should pull (an image)"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [("sig-apps. Job", "sig-apps. Jobb", "Jobs"), ("should pull", "should fetch", "should fetch")],
    ids=["area", "left out"],
)
def test_a_pattern_that_fits_nothing_is_told(old: str, new: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        specs.Selection(SELECTION.replace(old, new)).of(SUITE)


def test_the_pattern_fits_the_chosen_specs_only() -> None:
    pattern = re.compile(specs.pattern(SUITE[:1] + SUITE[5:6]))
    assert [one.name for one in SUITE if pattern.search(f"Kubernetes e2e suite {one.name}")] == [
        "[sig-apps] Job should run",
        "[sig-node] Pods should be a+b",
    ]


def test_the_selection_of_this_book_can_be_read() -> None:
    selection = specs.Selection(specs.SELECTION.read_text())
    assert selection.area("[sig-network] DNS should provide DNS for the cluster [Conformance]") == "DNS"
    assert selection.area("[sig-storage] CSINodes CSI Conformance should run") == specs.ELSEWHERE


def report(*told: dict) -> str:
    base = {
        "ContainerHierarchyTexts": ["[sig-apps] Job"],
        "ContainerHierarchyLabels": [["sig-apps"]],
        "LeafNodeType": "It",
        "LeafNodeLabels": ["Conformance"],
        "LeafNodeText": "should run",
        "State": "passed",
        "RunTime": 4_000_000_000,
    }
    setup = {"ContainerHierarchyTexts": None, "ContainerHierarchyLabels": None, "LeafNodeLabels": None, "LeafNodeText": ""}
    nodes = [{**base, **(setup if one.get("LeafNodeType") else {}), **one} for one in told]
    return json.dumps([{"SpecReports": nodes}])


def test_a_report_is_read_and_counted(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text(
        report(
            {},
            {"LeafNodeText": "should fail", "State": "timedout", "Failure": {"Message": "no Pod\ncame"}},
            {"LeafNodeText": "should be skipped", "State": "skipped", "Failure": {"Message": "IPv6 only"}},
            {"LeafNodeText": "should be cut short", "State": "interrupted", "Failure": {"Message": "Interrupted by User"}},
            {"LeafNodeType": "SynchronizedBeforeSuite"},
            {"LeafNodeType": "SynchronizedAfterSuite", "State": "failed", "Failure": {"Message": "left behind"}},
        )
    )
    found = specs.read(target)
    assert [(one.name, one.state, one.message) for one in found] == [
        ("[sig-apps] Job should run", "passed", ""),
        ("[sig-apps] Job should fail", "timedout", "no Pod"),
        ("[sig-apps] Job should be skipped", "skipped", "IPv6 only"),
        ("[sig-apps] Job should be cut short", "interrupted", "Interrupted by User"),
        ("SynchronizedAfterSuite", "failed", "left behind"),
    ]
    left_out = [specs.LeftOut("[sig-node] Pods should pull", "It pulls.")]
    assert specs.rows(specs.Selection(SELECTION), found, left_out) == [
        specs.Row("Jobs", 1, 1, 1, 16.0),
        specs.Row("Pods", 0, 0, 1, 0.0),
        specs.Row(specs.ELSEWHERE, 0, 1, 0, 4.0),
    ]


def test_images_are_made_under_the_names_that_the_tests_ask_for() -> None:
    tags = ["registry.k8s.io/e2e-test-images/agnhost:2.1", "gcr.io/k8s-authenticated-test/agnhost:2.1", "registry.k8s.io/etcd:3"]
    assert list(userland.made(tags, userland.NAMES)) == [("registry.k8s.io/e2e-test-images/agnhost:2.1", "agnhost")]


def test_packages_for_a_root_with_folders_apart_go_into_one_with_links() -> None:
    assert [userland.place(path) for path in ("./bin/sh", "./usr/sbin/nginx", "./lib64/ld.so", "./etc/bin/x")] == [
        "usr/bin/sh",
        "usr/bin/nginx",
        "usr/lib64/ld.so",
        "etc/bin/x",
    ]


def test_a_layer_has_each_path_once_and_folders_first() -> None:
    layer = userland.Layer()
    layer.file("usr/bin/tool", b"one", 0o4755)
    layer.file("usr/bin/tool", b"two")
    layer.link("bin", "usr/bin")
    with tarfile.open(fileobj=io.BytesIO(layer.close())) as archive:
        assert [(entry.name, entry.mode & 0o7777) for entry in archive if not entry.issym()] == [
            ("usr", 0o755),
            ("usr/bin", 0o755),
            ("usr/bin/tool", 0o4755),
        ]
        assert archive.extractfile("usr/bin/tool").read() == b"one"
        assert archive.getmember("bin").linkname == "usr/bin"
