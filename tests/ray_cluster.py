"""A Ray of several nodes on this machine, for as long as standard input is open.

    python ray_cluster.py '{"num_cpus": 1, ...}'     arguments of the head's node

Answers with a line `{"address": "HOST:PORT", "raylet": PID}`. Each line `{...}`
starts a node with these arguments, and is answered with `{"raylet": PID}`.
"""

import json
import os
import sys
from typing import Any

from ray.cluster_utils import Cluster

# A node that is killed is noticed in two seconds, a head that is killed in five.
os.environ |= {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
SMALL: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}


def raylet_of(node: Any) -> int:
    """Return the process of a node that starts and holds all its workers."""
    (info,) = node.all_processes["raylet"]
    return int(info.process.pid)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    head = {**SMALL, "_system_config": HEALTH, **json.loads(sys.argv[1])}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    first = {"address": cluster.address, "raylet": raylet_of(cluster.head_node)}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        node = cluster.add_node(**SMALL, **json.loads(line))
        print(json.dumps({"raylet": raylet_of(node)}), file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
