"""What is said of a login that does not come about, and that both clients have the face that the manager uses."""

from __future__ import annotations

import inspect

import pytest

from distpool.managers import ssh_binary, ssh_paramiko
from distpool.managers.ssh_client import Connection, LoginError, Session


def test_a_login_error_has_its_reason_and_what_was_printed() -> None:
    error = LoginError("no such host")
    assert (str(error), error.reason, error.output) == ("no such host", "no such host", "")
    assert LoginError("x", "banner").output == "banner"


@pytest.mark.parametrize(
    ("face", "kind"),
    [
        (Connection, ssh_binary.BinaryConnection),
        (Connection, ssh_paramiko.ParamikoConnection),
        (Session, ssh_binary.BinarySession),
        (Session, ssh_paramiko.ParamikoSession),
    ],
)
def test_clients_have_the_face(face: type, kind: type) -> None:
    names = [name for name, value in vars(face).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert names
    for name in names:
        wanted = list(inspect.signature(getattr(face, name)).parameters)
        assert list(inspect.signature(getattr(kind, name)).parameters) == wanted, name
