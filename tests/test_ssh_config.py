"""What ~/.ssh/config says, for the client in this process."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from distpool.managers.specs import split_spec
from distpool.managers.ssh_config import Config, Target, parse_flags


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def target(spec: str, *flags: str) -> Target:
    return Config(flags).target(split_spec(spec))


def write(home: Path, text: str, name: str = "config") -> None:
    path = home / ".ssh" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)


def test_without_any_configuration(home: Path) -> None:
    found = target("somewhere")
    assert (found.name, found.host, found.port, found.user) == ("somewhere", "somewhere", 22, getpass.getuser())
    assert found.known_hosts == [f"{home}/.ssh/known_hosts", f"{home}/.ssh/known_hosts2"]
    assert found.use_agent and not found.accept_unknown and not found.accept_changed and not found.identity_files


def test_what_a_host_says(home: Path) -> None:
    write(
        home,
        """
        Host gpu*
          HostName %h.example.org
          User me
          Port 2222
          IdentityFile ~/.ssh/one
          IdentityFile ~/.ssh/two
          IdentitiesOnly yes
          ProxyJump bastion
          UserKnownHostsFile ~/.ssh/lab "/etc/more known"
          StrictHostKeyChecking accept-new
          HostKeyAlias farm
          ConnectTimeout 7
        Host *
          User somebody
          Port 1
        """,
    )
    found = target("gpu1")
    assert (found.host, found.user, found.port) == ("gpu1.example.org", "me", 2222)
    assert found.identity_files == [f"{home}/.ssh/one", f"{home}/.ssh/two"] and not found.use_agent
    assert found.proxy_jump == "bastion" and found.key_alias == "farm" and found.connect_timeout == 7
    assert found.known_hosts == [f"{home}/.ssh/lab", "/etc/more known"]
    assert found.accept_unknown and not found.accept_changed
    assert (target("other").user, target("other").port) == ("somebody", 1)


def test_the_spec_comes_first(home: Path) -> None:
    write(home, "Host h\n User me\n Port 2222\n")
    assert (target("you@h:3").user, target("you@h:3").port) == ("you", 3)


def test_flags_come_before_the_file(home: Path) -> None:
    write(home, "Host h\n Port 2222\n User me\n ProxyCommand nc %h %p\n")
    found = target("h", "-p", "4", "-oUser=you", "-o", "StrictHostKeyChecking no", "-i", "/k", "-J", "b:5", "-T")
    assert (found.port, found.user, found.identity_files, found.proxy_jump) == (4, "you", ["/k"], "b:5")
    assert found.accept_changed and found.proxy_command == "nc h 4"


def test_another_file(home: Path, tmp_path: Path) -> None:
    write(home, "User me\n")
    (tmp_path / "other").write_text("User you\n")
    assert target("h", "-F", str(tmp_path / "other")).user == "you"
    assert target("h", "-F", "none").user == getpass.getuser()
    with pytest.raises(FileNotFoundError):
        target("h", "-F", str(tmp_path / "nothing"))


def test_proxy_command_none_and_jump_none(home: Path) -> None:
    write(home, "Host h\n ProxyCommand none\n ProxyJump none\nHost *\n ProxyCommand nc %h %p\n ProxyJump b\n")
    assert target("h").proxy_command is None and target("h").proxy_jump is None


def test_agents(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_AGENT", "/run/mine")
    text = "Host a\n IdentityAgent ~/agent\nHost b\n IdentityAgent none\nHost c\n IdentityAgent $MY_AGENT\n"
    write(home, text)
    assert target("a").agent_socket == f"{home}/agent" and target("a").use_agent
    assert target("b").agent_socket is None and not target("b").use_agent
    assert target("c").agent_socket == "/run/mine"


# -- Include -----------------------------------------------------------------------------------------------------


def test_include(home: Path) -> None:
    write(home, "Include conf.d/*.conf\nHost *\n User last\n")
    write(home, "Host a\n User first\n", "conf.d/10.conf")
    write(home, f"Host b\n Include {home}/.ssh/more\n Port 9\n", "conf.d/20.conf")
    write(home, "User nested\n", "more")
    assert target("a").user == "first"
    assert (target("b").user, target("b").port) == ("nested", 9), "what follows belongs to the block again"
    assert (target("c").user, target("c").port) == ("last", 22)


def test_include_in_a_block_of_another_host(home: Path) -> None:
    write(home, "Host a !b\n Include more\nHost *\n Port 7\n")
    write(home, "Host *\n User nested\n", "more")
    assert target("a").user == "nested" and target("b").user == getpass.getuser() and target("b").port == 7


def test_a_circle_of_includes_ends(home: Path) -> None:
    write(home, "Include config\nUser me\n")
    assert target("a").user == "me"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
@pytest.mark.parametrize("host", ["a", "b", "c.example.org", "x"])
def test_the_same_as_openssh(home: Path, host: str) -> None:
    write(
        home,
        """
        Include conf.d/*
        Host *.example.org
            User org
            Port 44
        Match host b
            Port 55
        Match final all
            HostKeyAlias finally
        Host a b
            HostName real-%h
            Port 66
        """,
    )
    write(home, "Host a x\n  User included\n  IdentityFile ~/.ssh/%r_%h\n", "conf.d/1")
    config = home / ".ssh" / "config"
    text = subprocess.run(
        ["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=True, cwd=home
    ).stdout
    said = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    found = target(host, "-F", str(config))
    assert (found.host, str(found.port), found.user) == (said["hostname"], said["port"], said["user"])
    assert found.key_alias == said.get("hostkeyalias")


# -- flags -------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    options, file = parse_flags(["-4", "-vv", "-F", "~/x", "-oPort=3", "-o", "User  me", "-Cq", "-i", "key"])
    assert options == [("Port", "3"), ("User", "me"), ("IdentityFile", "key")]
    assert file == os.path.expanduser("~/x")


@pytest.mark.parametrize("flags", [["host"], ["-"], ["-p"], ["-o", "nothing"], ["-L", "1:2:3"], ["-Z"], ["-w", "1"]])
def test_flags_that_mean_nothing_here(flags: list[str]) -> None:
    with pytest.raises(ValueError, match="sshflags"):
        parse_flags(flags)


def test_what_paramiko_cannot_read(home: Path) -> None:
    write(home, "Match all host h\n User me\n")
    with pytest.raises(ValueError, match='use the OpenSSH program, ssh="ssh"'):
        target("h")


def test_C229_no_user_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(getpass, "getuser", nobody)
    with pytest.raises(ValueError, match="no user name to log in with"):
        target("h")
