import base64
import datetime
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab import pki


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.Authority("kubernetes-ca")


def test_a_node_is_who_kubernetes_expects_it_to_be(authority: pki.Authority) -> None:
    issued = authority.issue("system:node:node-1", "system:nodes", server=("node-1", "10.30.0.11"), client=False)
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate))
    named = {attribute.oid: attribute.value for attribute in certificate.subject}
    assert named == {NameOID.COMMON_NAME: "system:node:node-1", NameOID.ORGANIZATION_NAME: "system:nodes"}
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["node-1", "10.30.0.11"]
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc


def test_two_labs_share_no_key(authority: pki.Authority) -> None:
    keys = {authority.issue("admin").key, authority.issue("admin").key, pki.Authority("kubernetes-ca").issue("admin").key}
    assert len(keys) == 3


def test_a_kubeconfig_holds_all_it_needs(authority: pki.Authority) -> None:
    issued = authority.issue("admin", "system:masters")
    told = yaml.safe_load(pki.kubeconfig("https://10.30.0.2:6443", authority, "admin", issued))
    assert base64.b64decode(told["users"][0]["user"]["client-key-data"]) == issued.key
    assert base64.b64decode(told["clusters"][0]["cluster"]["certificate-authority-data"]) == authority.certificate


def test_what_is_private_is_never_readable_by_others(tmp_path: Path, authority: pki.Authority) -> None:
    target = tmp_path / "a" / "kubeconfig"
    target.parent.mkdir()
    target.write_text("from before, and open to all")
    target.chmod(0o644)
    pki.write_private(target, "secret")
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("secret", 0o600)
    authority.issue("admin").write(tmp_path, "admin")
    assert stat.S_IMODE((tmp_path / "admin.key").stat().st_mode) == 0o600
    serialization.load_pem_private_key((tmp_path / "admin.key").read_bytes(), None)
