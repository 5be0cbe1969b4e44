"""The broker over TLS, with a certificate authority of our own."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.errors import BrokerUnavailable, BrokerUnreachableError
from tests.contract.broker_world import FOREVER_S, offer, start, train
from tests.redis_fixtures import TIMEOUT_S
from tests.redis_server import AOF, ServerRefusedError, own_server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.crt``, and ``server.crt`` with ``server.key`` signed by it; ``other.crt`` is of another authority."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.crt",
        )  # fmt: skip
    openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=redis", "-keyout", "server.key", "-out", "server.csr",
    )  # fmt: skip
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "names", "-out", "server.crt",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tls_address(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (
        *AOF, f"tls-port {port}", "tls-auth-clients no", f"tls-cert-file {certificates}/server.crt",
        f"tls-key-file {certificates}/server.key", f"tls-ca-cert-file {certificates}/ca.crt",
    )  # fmt: skip
    with contextlib.ExitStack() as running:
        try:
            running.enter_context(own_server(tmp_path_factory.mktemp("tls"), settings))
        except ServerRefusedError:
            pytest.skip("this Redis was built without TLS")
        yield f"rediss://127.0.0.1:{port}"


def test_groups_travel_encrypted(tls_address: str, certificates: Path) -> None:
    url = f"{tls_address}?ssl_ca_certs={certificates}/ca.crt"
    with contextlib.closing(RedisRun(url, "tls", timeout_s=TIMEOUT_S)) as run:
        source = start(run)
        offer(run, 1, *train(0), payload=bytes(900))
        (delivery,) = source.read(1, timeout_s=FOREVER_S)
        assert delivery.payload == bytes(900)


@pytest.mark.parametrize("options", ["", "?ssl_ca_certs={folder}/other.crt"])
def test_a_stranger_with_another_certificate_is_not_trusted(tls_address: str, certificates: Path, options: str) -> None:
    run = RedisRun(tls_address + options.format(folder=certificates), "tls", timeout_s=3.0)
    with contextlib.closing(run), pytest.raises(BrokerUnreachableError, match="certificate verify failed"):
        run.check_reachable()


def test_without_tls_nobody_is_let_in(tls_address: str) -> None:
    run = RedisRun(tls_address.replace("rediss", "redis"), "tls", timeout_s=3.0)
    with contextlib.closing(run), pytest.raises(BrokerUnavailable):
        run.run_store.state()
