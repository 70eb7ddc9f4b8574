"""Files of a host's own /etc: how it reaches the others and lets them in, and who its users are."""

from __future__ import annotations

import pwd
from pathlib import Path

_SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 200
"""
_SSH_CONFIG = """\
Host *
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
"""


def write_ssh_and_users(etc: Path, folder: Path) -> None:
    """Write ssh_config, sshd_config and passwd.

    Root logs in to a plain shell and an empty home: what a shell of ours reads at its start may take a lock that a
    killed host keeps; pyenv's makes every login wait for a minute then.

    Args:
        etc: The folder of the host's files.
        folder: The folder of the keys, host_key and user_key, which gets the home.
    """
    (etc / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
    (etc / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
    home = folder / "home"
    home.mkdir(exist_ok=True)
    users = [":".join(map(str, user)) for user in pwd.getpwall() if user.pw_name != "root"]
    (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{home}:/bin/sh", *users]) + "\n")
