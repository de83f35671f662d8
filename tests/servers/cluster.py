"""A Redis cluster: three masters, each with a replica."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from aiotaskq.drivers.redis.permissions import ROLES, cluster_role
from tests.servers.base import ServerFailed, Watchdog, free_port
from tests.servers.redis import RedisServer
from tests.servers.sentinel import wait_until

# Milliseconds until the others take a silent node for dead. On a busy machine a living node may be
# silent for a while, so the time is short only during a failover on purpose.
_BRISK, _CALM = 1000, 20_000
_SLOTS = 16384


class ClusterNode(RedisServer):
    """One node, with a port of its own for the cluster's bus."""

    name = "redis-cluster-node"
    topology_commands = ("cluster|slots", "wait")

    def __init__(self, watchdog: Watchdog, options: dict[str, str]) -> None:
        self.bus = free_port()
        super().__init__(watchdog, options=options | {"cluster-port": str(self.bus)})

    def _rules(self) -> list[str]:
        role = cluster_role(ROLES["all"])
        return role.rules("aiotaskq:{*}", more=self.topology_commands)

    @property
    def node_id(self) -> str:
        """Its id in the cluster."""
        return self.bulk("CLUSTER MYID").strip()


class RedisCluster:
    """Six nodes on the loopback device.

    Args:
        watchdog: Ends them if the tests are killed.
        masters: The number of masters.
        replicas: Whether each master has a replica.
        options: For all nodes, as in redis.conf.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        *,
        masters: int = 3,
        replicas: bool = True,
        options: dict[str, str] | None = None,
    ) -> None:
        given = {
            "cluster-enabled": "yes",
            "appendfsync": "no",  # its data survives a kill of the process, not a power cut
            "cluster-node-timeout": str(_BRISK),
            "cluster-replica-validity-factor": "0",
            "databases": "1",
            "repl-diskless-sync-delay": "0",
            **(options or {}),
        }
        self._masters = masters
        count = 2 * masters if replicas else masters
        self.nodes = [ClusterNode(watchdog, given) for _ in range(count)]
        self._made = False

    @property
    def url(self) -> str:
        """Its URL for drivers."""
        return f"redis+cluster://{','.join(f'{one.host}:{one.port}' for one in self.nodes)}"

    @property
    def limited_url(self) -> str:
        """Its URL for a user with the least permissions that aiotaskq needs."""
        return self.url.replace("://", f"://{ClusterNode.limited}@")

    @property
    def masters(self) -> Sequence[ClusterNode]:
        """The nodes that have slots now."""
        return [one for one in self.nodes if one.running and self._role(one) == "master"]

    def start(self) -> None:
        """Start all nodes, and wait until all slots are served and all replicas follow."""
        for node in self.nodes:
            node.start()
        if not self._made:
            self._make()
            self._made = True
        wait_until(self._is_whole, "become a cluster")
        self._set_timeout(_CALM)

    def fail_over(self, dead: ClusterNode | None = None) -> ClusterNode:
        """Kill a master, wait until its replica is promoted, and return the killed node."""
        dead = dead or self.masters[0]
        self._set_timeout(_BRISK)
        dead.kill()
        wait_until(lambda: len(self.masters) == self._masters, "fail over")
        wait_until(lambda: all(map(self._serves, self.masters)), "serve again")
        return dead

    def flush(self) -> None:
        """Delete all keys."""
        for master in self.masters:
            master.command("FLUSHALL")

    def stop(self) -> None:
        """Stop all nodes; their data stays."""
        for node in self.nodes:
            node.stop()

    def close(self) -> None:
        """End all."""
        for node in self.nodes:
            node.close()

    def _set_timeout(self, milliseconds: int) -> None:
        for node in self.nodes:
            if node.running:
                node.command(f"CONFIG SET cluster-node-timeout {milliseconds}")

    def _make(self) -> None:
        first, *others = self.nodes
        for number, node in enumerate(self.nodes, 1):
            node.command(f"CLUSTER SET-CONFIG-EPOCH {number}")
        for node in others:
            node.command(f"CLUSTER MEET {first.host} {first.port} {first.bus}")
        for number, master in enumerate(self.nodes[: self._masters]):
            begin = number * _SLOTS // self._masters
            end = (number + 1) * _SLOTS // self._masters - 1
            master.command(f"CLUSTER ADDSLOTSRANGE {begin} {end}")
        wait_until(lambda: all(map(self._knows_all, self.nodes)), "meet")
        for master, replica in zip(self.nodes, self.nodes[self._masters :], strict=False):
            replica.command(f"CLUSTER REPLICATE {master.node_id}")

    def _knows_all(self, node: ClusterNode) -> bool:
        ids = {line.split()[0] for line in node.bulk("CLUSTER NODES").splitlines()}
        return ids >= {one.node_id for one in self.nodes}

    def _serves(self, node: ClusterNode) -> bool:
        return "cluster_state:ok" in node.bulk("CLUSTER INFO")

    def _is_whole(self) -> bool:
        with contextlib.suppress(OSError, ServerFailed):
            roles = [node.info("replication") for node in self.nodes]
            masters = [one for one in roles if one["role"] == "master"]
            return (
                all(map(self._serves, self.nodes))
                and len(masters) == self._masters
                and all(
                    one.get("master_link_status") == "up" if one["role"] == "slave" else True
                    for one in roles
                )
                and sum(int(one["connected_slaves"]) for one in masters)
                == len(self.nodes) - self._masters
            )
        return False

    def _role(self, node: ClusterNode) -> str:
        with contextlib.suppress(OSError, ServerFailed):
            return node.info("replication")["role"]
        return "away"
