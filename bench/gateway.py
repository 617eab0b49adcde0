"""A real S3 gateway on this machine: Ceph's radosgw over one monitor, one manager and one BlueStore disk.

    python -m bench.gateway up                # 10 to 20 s; needs Debian's ceph-mon, ceph-mgr, ceph-osd and radosgw
    python -m bench.gateway status --json     # state, endpoint, keys, and the environment to export
    python -m bench.gateway down

    with Gateway() as gateway:                # in a program: one that is up already is used, and left up
        os.environ.update(gateway.environment)
        store = Store(gateway.bucket("hospital") + "/padchest")

Everything lives in one folder and listens on loopback only; the disk is a sparse file of 6 GiB in it. What was stored
is gone when the gateway goes down, and when the machine does: the next `up` starts from nothing. About 400 MB of
memory.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from radhpc.core.errors import UserError
from radhpc.core.files import exclusive, private_folder
from slurm.box import ENVIRONMENT
from slurm.box_files import free_ports

START_SECONDS = 90
DAEMONS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw")  # each in Debian's package of that name
REGION = "us-east-1"
DISK = 6 << 30  # bytes; sparse, so only what is stored is taken from the file system
MEMORY = 900 << 20  # bytes that the disk's daemon tries to stay below
ROLE = "temporary"  # what a session acts as; it may do all that S3 knows

# Who may do what. Without these keys (cephx) radosgw does not find its way to the monitor.
ALLOWED = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx", "mgr": "allow rw"},
}


class GatewayError(RuntimeError):
    """The gateway failed, not its user: exit status 1."""


class Gateway:
    """A running gateway for a `with`: brought up if it is not, and then down again at the end."""

    def __init__(self, folder: str | Path | None = None, port: int | None = None) -> None:
        self._folder, self._given_port = folder, port

    def __enter__(self) -> "Gateway":
        found = up(self._folder, self._given_port)
        self._started: bool = found["started"]
        self.folder = Path(found["folder"])
        self.endpoint: str = found["endpoint"]
        self.port = int(self.endpoint.rpartition(":")[2])
        self.environment: dict[str, str] = found["environment"]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            down(self.folder)

    def bucket(self, name: str) -> str:
        """Make a bucket, if it is not there, and return its URL."""
        self._client("s3").create_bucket(Bucket=name)  # making one's own again is no error here
        return f"s3://{name}"

    def session(self, seconds: float) -> dict[str, str]:
        """An environment with keys that the gateway refuses after so many seconds, by AssumeRole.

        Ceph answers 403 AccessDenied to expired keys, where AWS answers 400 ExpiredToken. It gives no keys for less
        than 15 minutes, so an earlier end is written into their token, which is sealed with a key of ours.
        """
        iam, user = self._client("iam"), {"AWS": ["arn:aws:iam:::user/radhpc"]}
        policy = _policy(Principal=user, Action=["sts:AssumeRole"])
        try:
            iam.create_role(RoleName=ROLE, Path="/", AssumeRolePolicyDocument=policy)
        except iam.exceptions.ClientError as error:  # Ceph's answer has its code where boto3 does not look for it
            if error.response.get("Code") != "EntityAlreadyExists":
                raise
        policy = _policy(Action=["s3:*"], Resource="arn:aws:s3:::*")
        iam.put_role_policy(RoleName=ROLE, PolicyName="all", PolicyDocument=policy)
        given = self._client("sts").assume_role(
            RoleArn=f"arn:aws:iam:::role/{ROLE}", RoleSessionName="session", DurationSeconds=max(900, int(seconds))
        )["Credentials"]
        sealed_with = json.loads((self.folder / "gateway.json").read_text())["sts_key"]
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        return {
            **self.environment,
            "AWS_ACCESS_KEY_ID": given["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": given["SecretAccessKey"],
            "AWS_SESSION_TOKEN": _with_end(given["SessionToken"], sealed_with, end),
        }

    def _client(self, service: str) -> Any:
        import boto3  # type: ignore[import-untyped]

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )


def up(folder: str | Path | None = None, port: int | None = None) -> dict[str, Any]:
    """Start a gateway, wait until it answers and return its status. One that is up is left alone."""
    if missing := missing_daemons():
        wanted = f"apt-get install --no-install-recommends {' '.join(missing)}"
        raise UserError(f"Ceph is not installed (no {', '.join(missing)}): {wanted}")
    place = _place(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(place):
        found = status(place)
        if found["state"] == "broken":
            raise UserError(f"{place}: {found['problem']}; first: python -m bench.gateway down --folder {place}")
        if found["state"] == "up":
            if port is not None and found["endpoint"] != _endpoint(port):
                raise UserError(f"--port {port}: {place} is already up at {found['endpoint']}")
            return {**found, "started": False}
        _empty(place)
        try:
            settings = _write_files(place, port)
            _start(place, settings)
            return {**_wait_until_it_answers(place), "started": True}
        except BaseException:
            _stop(place)
            shutil.rmtree(place)
            raise


def missing_daemons() -> list[str]:
    """The daemons, and so the packages, that are not installed."""
    return [name for name in DAEMONS if not shutil.which(name, path=ENVIRONMENT["PATH"])]


def down(folder: str | Path | None = None) -> dict[str, Any]:
    """End every process of the gateway, whatever state it is in, and remove its folder with all that was stored."""
    place = _place(folder)
    with exclusive(place) if place.exists() else contextlib.nullcontext():
        _stop(place)
        if (place / "gateway.json").exists():  # else it is somebody's folder, not a gateway's
            shutil.rmtree(place)
    return status(place)


def status(folder: str | Path | None = None) -> dict[str, Any]:
    """Say whether the gateway is up, down or broken; `problem` tells what is wrong with a broken one."""
    place = _place(folder)
    running = _processes(place)
    found: dict[str, Any] = {"state": "broken" if running else "down", "folder": str(place), "endpoint": None}
    found |= {"access_key": None, "secret_key": None, "environment": {}, "problem": None}
    found["daemons"] = {name: pid for pid, name in running.items() if name in DAEMONS}
    if not running:
        return found
    try:
        settings = json.loads((place / "gateway.json").read_text())
    except OSError as error:
        return {**found, "problem": f"does not know its own settings: {error}"}
    endpoint = _endpoint(settings["port"])
    found |= {"endpoint": endpoint, "access_key": settings["access_key"], "secret_key": settings["secret_key"]}
    found["environment"] = {
        "AWS_ACCESS_KEY_ID": settings["access_key"],
        "AWS_SECRET_ACCESS_KEY": settings["secret_key"],
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": REGION,
        "AWS_ALLOW_HTTP": "true",
    }
    if missing := [name for name in DAEMONS if name not in found["daemons"]]:
        return {**found, "problem": f"{', '.join(missing)} not running"}
    try:
        # Not by way of a proxy that the caller's environment may name.
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(endpoint, timeout=5).close()
    except OSError as error:
        return {**found, "problem": f"does not answer: {error}"}
    return {**found, "state": "up"}


def _endpoint(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _place(folder: str | Path | None) -> Path:
    return private_folder(Path(folder or _default_folder()), 200)  # ceph.conf gives $ # ; and quotes a meaning


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "radhpc" / "gateway"


def _empty(place: Path) -> None:
    """Clear what a gateway left behind when the machine went down; refuse a folder that was never a gateway's."""
    entries = list(place.iterdir())
    if entries and not (place / "gateway.json").exists():
        raise UserError(f"--folder {place}: holds other files; name a new or an empty folder")
    for entry in sorted(entries, key=lambda one: one.name == "gateway.json"):  # the mark goes last
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    place.chmod(0o700)


def _write_files(place: Path, port: int | None) -> dict[str, Any]:
    """Write ceph.conf, the keys and gateway.json; the folder is new and empty."""
    first, second, own = free_ports("127.0.0.1", 3)
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                raise UserError(f"--port {port}: {error}; allowed is a free port of 127.0.0.1") from None
    settings = {
        "port": own if port is None else port,
        "monitor": f"[v2:127.0.0.1:{first},v1:127.0.0.1:{second}]",  # one that speaks only v1 is never reached
        "access_key": secrets.token_hex(10).upper(),
        "secret_key": secrets.token_urlsafe(30),
        "sts_key": secrets.token_hex(8),  # sixteen characters, as Ceph wants them
        "cluster": str(uuid.uuid4()),
        "disk": str(uuid.uuid4()),
    }
    (place / "gateway.json").touch(mode=0o600)
    (place / "gateway.json").write_text(json.dumps(settings))
    for name in ("mon", "mgr", "osd", "rgw", "logs"):
        (place / name).mkdir(mode=0o700)
    (place / "keyring").touch(mode=0o600)
    (place / "keyring").write_text("".join(_keyring_entry(name, caps) for name, caps in ALLOWED.items()))
    (place / "ceph.conf").touch(mode=0o600)
    (place / "ceph.conf").write_text(f"""\
[global]
fsid = {settings["cluster"]}
mon host = {settings["monitor"]}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {place}/keyring
mon data = {place}/mon
mgr data = {place}/mgr
osd data = {place}/osd
rgw data = {place}/rgw
run dir = {place}
# No sockets for commands, whose paths may not be long; logs go to where the standard error goes.
admin socket =
log to file = false
log to stderr = true
err to stderr = true
# One disk, one copy, however full the machine's file system is.
osd pool default size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
osd objectstore = bluestore
bluestore block size = {DISK}
osd memory target = {MEMORY}
# A lone monitor has nobody to wait for: a second less for each of the changes that a start makes.
paxos propose interval = 0.05
# Else the end of an answer waits 40 ms for the client's acknowledgement of its beginning.
rgw frontends = beast endpoint=127.0.0.1:{settings["port"]} tcp_nodelay=1
rgw sts key = {settings["sts_key"]}
rgw s3 auth use sts = true
""")
    return settings


def _keyring_entry(name: str, caps: dict[str, str]) -> str:
    # A key: its type (1, AES), seconds and nanoseconds of its making, its length and its bytes.
    key = base64.b64encode(struct.pack("<HIIH", 1, int(time.time()), 0, 16) + secrets.token_bytes(16)).decode()
    return f"[{name}]\n    key = {key}\n" + "".join(f'    caps {part} = "{what}"\n' for part, what in caps.items())


def _start(place: Path, settings: dict[str, Any]) -> None:
    """Make the cluster and its user, and start the daemons one after the other."""
    radosgw = ["--name", "client.rgw.a"]
    monitor = ["--create", "--fsid", settings["cluster"], "--addv", "x", settings["monitor"], f"{place}/monmap"]
    _run(place, "monmaptool", *monitor, configured=False)
    _run(place, "ceph-mon", "-i", "x", "--mkfs", "--monmap", f"{place}/monmap")
    _launch(place, "ceph-mon", "-i", "x")
    _launch(place, "ceph-mgr", "-i", "x")
    _run(place, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", settings["disk"])
    _run(place, "ceph", "osd", "new", settings["disk"])
    _launch(place, "ceph-osd", "-i", "0")
    # Waits for the disk, and makes the pools.
    keys = ["--access-key", settings["access_key"], "--secret-key", settings["secret_key"]]
    user = ["--uid=radhpc", "--display-name=radhpc", "--caps=roles=*", *keys]
    _run(place, "radosgw-admin", *radosgw, "user", "create", *user)
    _launch(place, "radosgw", *radosgw)


def _run(place: Path, name: str, *arguments: str, configured: bool = True) -> None:
    """Run one of Ceph's commands to its end."""
    command = [name, *(["-c", f"{place}/ceph.conf"] if configured else []), *arguments]
    with (place / "logs" / f"{name}-command.log").open("a") as log:
        try:
            done = subprocess.run(
                command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=START_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise GatewayError(_ill(place, name, f"does not end within {START_SECONDS} s", "-command")) from None
    if done.returncode:
        raise GatewayError(_ill(place, name, f"failed with exit status {done.returncode}", "-command"))


def _launch(place: Path, name: str, *arguments: str) -> None:
    """Start a daemon in a session of its own; it is nobody's child, so it outlives this process."""
    command = ["setsid", "--fork", name, "-c", f"{place}/ceph.conf", *arguments, "-f"]
    with (place / "logs" / f"{name}.log").open("a") as log:
        subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)


def _wait_until_it_answers(place: Path) -> dict[str, Any]:
    start = time.monotonic()
    while (found := status(place))["state"] != "up":
        waited = time.monotonic() - start
        # One that is still being started may be missed.
        dead = [name for name in DAEMONS if name not in found["daemons"] and waited > 1]
        if dead or waited > START_SECONDS:
            fault = "ended while the gateway was starting" if dead else f"is not ready after {START_SECONDS} s"
            raise GatewayError(_ill(place, [*dead, "radosgw"][0], fault))
        time.sleep(0.1)
    return found


def _ill(place: Path, name: str, fault: str, kind: str = "") -> str:
    last = (place / "logs" / f"{name}{kind}.log").read_text(errors="replace").split("\n")
    return "\n  ".join([f"{name} {fault}; its log ends with:", *[line for line in last if line][-8:]])


def _stop(place: Path) -> None:
    """End all processes. None is asked: nothing of theirs is to be kept."""
    start = time.monotonic()
    while pids := _processes(place):
        if time.monotonic() - start > 10:
            raise GatewayError(f"processes {sorted(pids)} do not end, not even by SIGKILL")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(place: Path) -> dict[int, str]:
    """Every live process of the gateway: its id, and the daemon's name, or "command" for one of Ceph's commands.

    All processes are looked at, so that no lost or stale pid file hides or invents one.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
        except OSError:  # gone, or another user's
            continue
        # Python's programs have their own name second, as `ceph` has.
        names = {Path(one).name for one in (program, *arguments[:1])} & {*DAEMONS, "ceph", "radosgw-admin"}
        if names and f"{place}/ceph.conf" in arguments:
            name = names.pop()
            found[int(entry.name)] = name if name in DAEMONS and "-f" in arguments else "command"
    return found


def _policy(**statement: Any) -> str:
    whole = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]}
    return json.dumps(whole, separators=(",", ":"))  # a space reaches Ceph's parser as a plus, which it refuses


def _with_end(token: str, key: str, end: datetime) -> str:
    """Write another end into a session's token: AES in CBC mode, as Ceph seals it (src/rgw/rgw_sts.h, 16.2)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key.encode()), modes.CBC(b"cephsageyudagreg"))
    decryptor, encryptor = cipher.decryptor(), cipher.encryptor()
    plain = decryptor.update(base64.b64decode(token)) + decryptor.finalize()
    # The first time in it is the end, the second the beginning; both with nine digits after the second.
    stamp = f"{end:%Y-%m-%dT%H:%M:%S.%f}000Z".encode()
    changed, count = re.subn(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", stamp, plain, count=1)
    assert count == 1, "no time in the session's token: another version of Ceph?"
    return base64.b64encode(encryptor.update(changed) + encryptor.finalize()).decode()


app = typer.Typer(
    help=__doc__.replace("\n\n    ", "\n\n\b\n    "),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path | None, typer.Option(help="Default: ~/.cache/radhpc/gateway.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("up")
def _up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: one that is free.")] = None,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Start a gateway and wait until it answers."""
    _print(up(folder, port), as_json)


@app.command("down")
def _down(folder: Folder = None, as_json: Json = False) -> None:
    """End every process of the gateway and remove its folder, with all that was stored."""
    _print(down(folder), as_json)


@app.command("status")
def _status(folder: Folder = None, as_json: Json = False) -> None:
    """Say whether the gateway is up, down or broken, and how it is reached."""
    _print(status(folder), as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    already = "already " if found.get("started") is False else ""
    print(f"the gateway is {already}{found['state']}" + (f": {found['problem']}" if found["problem"] else ""))
    if found["state"] == "up":
        print("to use it:", *(f"export {name}={value}" for name, value in found["environment"].items()), sep="\n  ")


def main() -> None:
    try:
        app()
    except (UserError, GatewayError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
