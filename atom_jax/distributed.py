"""Several processes, usually one on each host: process 0 leads, and the others do what it publishes.

This is for programs in which one process alone has the input, such as a server. Where every process runs the
same code on the same input, ``jax.distributed`` and ``load(mesh=...)`` are enough, and nothing here is used.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

# What JAX detects of a cluster, and its exchange of small values, have no public names.
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv

from atom_jax.errors import AtomError, one_line
from atom_jax.process_group import ProcessGroup, accept, exit_at_once, join

# Key under which process 0 says where the others connect.
_KEY = "atom_jax/leader"
# Seconds until all processes are there. Those on other hosts may start later.
_START_SECONDS = 300
_CONNECT_SECONDS = 60.0
_END_SECONDS = 30
TIMEOUT = 10.0

_group: ProcessGroup | None = None
_failed = False


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT,
) -> ProcessGroup | None:
    """Makes this process one of a group. To be called before JAX has used a device.

    Args:
      coordinator_address: address and free port of process 0, as all reach it.
      num_processes: number of processes.
      process_id: 0 for the one that leads.
      timeout: seconds without a sign of life after which a process counts as gone.

    Where one of the first three is None, it is what JAX detects of a cluster around the process (Slurm,
    Open MPI, Kubernetes, TPU).

    Returns:
      The group; None if there is one process only: ``num_processes`` is 1, or all three are None and there is
      no cluster.

    Raises:
      AtomError: one of the three is missing, or the processes do not find each other.
    """
    global _group
    given = (coordinator_address, num_processes, process_id)
    found = _Cluster(*given, None) if None not in given or num_processes == 1 else _detect(*given)
    if found.num_processes == 1 or found[:3] == (None, None, None):
        return None
    if None in found[:3]:
        raise AtomError("several processes need --coordinator-address, --num-processes and --process-id")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # its messages hide what has happened
    # Processes compile programs at different times, some from the cache: none may wait for another's choices.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_shard_autotuning" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_shard_autotuning=false".strip()
    _check_address(found)
    # Where the others do not come, JAX would abort the process.
    message = f"after {_START_SECONDS} s the {found.num_processes} processes have not met at"
    message += f" {found.coordinator_address}; does each run, with this address?"
    timer = threading.Timer(_START_SECONDS, exit_at_once, [message])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *found,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * _START_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise AtomError(f"the processes do not find each other: {one_line(error)}") from error
    finally:
        timer.cancel()
    _group = _connect(timeout)
    return _group


class _Cluster(NamedTuple):
    """Arguments of ``jax.distributed.initialize``."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: Sequence[int] | None


def _check_address(cluster: _Cluster) -> None:
    """AtomError unless the coordinator's address has a port, which is free if it is this process's."""
    address = str(cluster.coordinator_address)
    port = address.rpartition(":")[2]
    if ":" not in address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise AtomError(f"--coordinator-address {address!r} is not HOST:PORT")
    if cluster.process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise AtomError(f"--coordinator-address {address}: {os.strerror(error.errno or 0)}") from error


def _detect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> _Cluster:
    """The arguments that are None from the cluster around this process, if there is one."""
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is missing to detect a cluster
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address, num_processes, process_id, None, None, _START_SECONDS
            )
    except Exception as error:  # of any kind, from the client of a cluster
        raise AtomError(
            f"the cluster around this process is not understood: {one_line(error)}; give "
            "--num-processes (1 for a process alone), --coordinator-address and --process-id"
        ) from error
    return _Cluster(*found)


def _connect(timeout: float) -> ProcessGroup:
    state = jax_distributed.global_state
    assert state.client is not None
    host = str(state.coordinator_address).rpartition(":")[0].strip("[]")
    if jax.process_index() > 0:
        where = json.loads(state.client.blocking_key_value_get(_KEY, int(_CONNECT_SECONDS * 1000)))
        return join((host, where["port"]), where["token"], jax.process_index(), timeout=timeout)
    token = secrets.token_hex(32)
    with _listen(host) as listener:
        state.client.key_value_set(_KEY, json.dumps({"port": listener.getsockname()[1], "token": token}))
        return accept(listener, token, jax.process_count(), timeout=timeout, wait=_CONNECT_SECONDS)


def _listen(host: str) -> socket.socket:
    """A socket at this address, or at all addresses if others know this process by one that it has not."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError:
        return socket.create_server(("", 0))


def leads() -> bool:
    """Whether other processes do what this one publishes."""
    return _group is not None and _group.is_leader


def publish(operation: Any) -> None:
    """Sends an operation to all processes that this one leads, if there are any."""
    if _group is not None and _group.is_leader:
        _group.publish(operation)


def end(failure: str = "") -> None:
    """Ends the group in order, or with a failure (``ProcessGroup.end``); nothing if there is none."""
    global _group, _failed
    if _group is None:
        return
    _group.end(failure)
    _group = None
    if failure:
        _failed = True
    else:
        jax.distributed.shutdown()


def failed() -> bool:
    """Whether the group has ended with a failure.

    Then this process must end by ``os._exit``. Otherwise JAX would wait at exit for processes that are gone.
    """
    return _failed
