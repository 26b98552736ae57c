"""Hands out addresses: writes one into the status of each Service of type LoadBalancer, and takes it back when the type changes.

kube-proxy does the rest: it serves whatever address it finds in a Service's status on every node. A cloud's
controller also programs a load balancer in front of the nodes; here the host has a route to them instead.
Services with a `loadBalancerClass` belong to somebody else and are left alone, as the API asks
(https://kubernetes.io/docs/concepts/services-networking/service/#load-balancer-class).

Variables:
  ADDRESSES   the range, e.g. 10.30.0.192/26
"""

import http.client
import ipaddress
import json
import os
import ssl
import sys
import time

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
WATCH_SECONDS = 300


def connect(timeout):
    """A connection to the API server, verified by the cluster's own authority."""
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    return http.client.HTTPSConnection(
        os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]), timeout=timeout, context=context
    )


def request(method, path, body=None, timeout=10):
    """Send one request with the Pod's own token, which the kubelet renews, and return the response."""
    with open(f"{ACCOUNT}/token") as token:
        headers = {"Authorization": f"Bearer {token.read()}", "Content-Type": "application/merge-patch+json"}
    connection = connect(timeout)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise OSError(f"{method} {path}: {response.status} {response.read(300)!r}")
    return response


def address_of(service):
    """The address in a Service's status, or ""."""
    return next((one.get("ip", "") for one in service["status"].get("loadBalancer", {}).get("ingress") or []), "")


class Addresses:
    """Who has which address of a range."""

    def __init__(self, network):
        self.free = [str(host) for host in ipaddress.ip_network(network).hosts()]
        self.held = {}

    def settle(self, service, gone):
        """Give a Service the address that it should have, or take back the one that it should not."""
        name = (service["metadata"]["namespace"], service["metadata"]["name"])
        wanted = not gone and service["spec"]["type"] == "LoadBalancer" and not service["spec"].get("loadBalancerClass")
        has = address_of(service)
        if wanted and not has:
            address = self.held.get(name) or next((one for one in self.free if one not in self.held.values()), None)
            if address is None:
                print(f"{'/'.join(name)}: no address is left", flush=True)
                return
            self.held[name] = address
            self.write(name, [{"ip": address, "ipMode": "VIP"}])
        elif wanted:
            self.held[name] = has
        elif self.held.pop(name, None) and not gone and has:
            self.write(name, None)

    def write(self, name, ingress):
        """Write the status of one Service."""
        path = f"/api/v1/namespaces/{name[0]}/services/{name[1]}/status"
        request("PATCH", path, {"status": {"loadBalancer": {"ingress": ingress}}}).read()
        print(f"{'/'.join(name)}: {ingress[0]['ip'] if ingress else 'none'}", flush=True)


def follow():
    """List every Service, then watch, until the API server ends the watch."""
    addresses = Addresses(os.environ["ADDRESSES"])
    listed = json.load(request("GET", "/api/v1/services"))
    services = sorted(listed["items"], key=lambda service: not address_of(service))
    for service in services:
        addresses.settle(service, gone=False)
    path = f"/api/v1/services?watch=1&timeoutSeconds={WATCH_SECONDS}&resourceVersion={listed['metadata']['resourceVersion']}"
    for line in request("GET", path, timeout=WATCH_SECONDS + 30):
        event = json.loads(line)
        if event["type"] == "ERROR":
            return
        addresses.settle(event["object"], gone=event["type"] == "DELETED")


def main():
    """Follow for ever."""
    while True:
        try:
            follow()
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(1)


if __name__ == "__main__":
    main()
