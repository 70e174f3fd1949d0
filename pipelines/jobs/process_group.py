"""The process group of a run's ranks, whose store listens where Ray does: on loopback, in a cluster of our own."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.util import get_node_ip_address

#: The store's socket, in the process of rank 0, from its choice until the store takes it.
_listening: list[socket.socket] = []


class GroupConfig(TorchConfig):
    """Ray Train's own, but for the start: torch's store would listen on all addresses, for anybody."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts and ends it."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address = worker_group.execute_single(0, _listen)
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_join, backend_config.backend, *address, len(worker_group), backend_config.timeout_s)


def _listen() -> tuple[str, int]:
    """Take a port of this node's address."""
    host = get_node_ip_address()
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.bind((host, 0))
    server.listen(1024)
    _listening[:] = [server]
    return host, server.getsockname()[1]


def _join(backend: str, host: str, port: int, size: int, seconds: int) -> None:
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=seconds)
    # Where what a training loop calls asks the environment.
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    options: dict[str, Any] = {"master_listen_fd": _listening.pop().detach()} if rank == 0 else {}
    store = dist.TCPStore(host, port, size, rank == 0, timeout=limit, wait_for_workers=False, **options)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
