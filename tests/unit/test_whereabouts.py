"""What runs where, drawn without a lab."""

from lab import addons, whereabouts


def pod(name: str, owner: dict | None, image: str, labels: dict[str, str] | None = None) -> dict:
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": labels or {}, "ownerReferences": [owner] if owner else []},
        "spec": {"nodeName": "node-1", "containers": [{"name": "one", "image": image}]},
        "status": {"podIP": "10.244.1.9"},
    }


def test_a_pod_has_the_name_of_its_workload() -> None:
    replica_set = {"kind": "ReplicaSet", "name": "contour-7c55448cc9"}
    replicated = pod("contour-7c55448cc9-bsjdg", replica_set, "localhost/by-experiment/contour:1", {"pod-template-hash": "7c55448cc9"})
    told = whereabouts._pod(replicated, {"contour-7c55448cc9-bsjdg": 5})
    assert (told["kind"], told["workload"], told["addon"], told["memory"]) == ("Deployment", "contour", "gateway", 5)
    told = whereabouts._pod(pod("envoy-544k8", {"kind": "DaemonSet", "name": "envoy"}, "shop:v1"), {})
    assert (told["kind"], told["workload"], told["addon"], told["memory"]) == ("DaemonSet", "envoy", "", 0)
    told = whereabouts._pod(pod("alone", None, "registry.test:5000/loadbalancer:1"), {})
    assert (told["kind"], told["workload"], told["addon"]) == ("Pod", "alone", "loadbalancer")


def test_the_picture_of_a_cluster_of_ones_own_has_no_bridge() -> None:
    machine = {
        "name": "<kind>",
        "address": "172.18.0.2",
        "components": [{"name": "kubelet", "version": "1.36.0"}],
        "subnet": "",
        "pods": [],
    }
    drawn = whereabouts.picture({"bridge": {}, "machines": [machine], "brokers": [{"name": "broker", "notebook": "b:9092"}]})
    assert "&lt;kind&gt;" in drawn
    assert "your cluster" in drawn
    assert "b:9092" in drawn
    assert "bridge" not in drawn


def test_the_snapshot_can_be_drawn_and_names_the_labs_own_machines() -> None:
    told = whereabouts.stored()
    assert not told["own"]
    assert {"control-plane", "node-1"} <= {machine["name"] for machine in told["machines"]}
    drawn = whereabouts.picture(told)
    assert all(machine["address"] in drawn for machine in told["machines"])
    assert [row[0] for row in whereabouts.addon_rows(told)] == list(addons.every())
