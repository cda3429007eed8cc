"""How many workers a run gets of a cluster, and waiting for one that grows."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from slrnet.launch import cluster as cluster_module
from slrnet.launch.cluster import ClusterError, WorkerPlan, WorkerRequest, await_lost_nodes


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A node of `cpus` and `gpus`, `others`, and one more GPU node of 8 cores at each of `arrivals` (seconds)."""
    state: dict[str, Any] = {"cpus": 8, "gpus": 0, "others": [], "arrivals": [], "now": 0.0, "requests": [], "said": []}

    def nodes() -> list[tuple[int, int]]:
        arrived = sum(time <= state["now"] for time in state["arrivals"])
        return [(state["cpus"], state["gpus"]), *state["others"], *[(8, 1)] * arrived]

    def resources() -> tuple[int, int]:
        cpus, gpus = map(sum, zip(*nodes(), strict=True))
        return cpus, gpus

    def sleep(seconds: float) -> None:
        state["now"] += seconds

    monkeypatch.setattr(cluster_module, "cluster_nodes", nodes)
    monkeypatch.setattr(cluster_module, "cluster_resources", resources)
    monkeypatch.setattr(cluster_module.time, "sleep", sleep)
    monkeypatch.setattr(cluster_module.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: state["requests"].append(bundles))
    return state


@pytest.mark.parametrize(
    ("cpus", "gpus", "count", "options", "expected"),
    [
        (8, 0, None, {}, "1 worker(s) x 8 CPU(s)"),
        (8, 0, 2, {}, "2 worker(s) x 4 CPU(s)"),
        (8, 0, 3, {"cpus_per_worker": 1}, "3 worker(s) x 1 CPU(s)"),
        (32, 4, None, {}, "4 worker(s) x 8 CPU(s) + 1 GPU"),
        (32, 4, None, {"cpu_only": True}, "1 worker(s) x 32 CPU(s)"),
        (32, 4, 8, {"cpu_only": True}, "8 worker(s) x 4 CPU(s)"),
        (32, 4, (2, 8), {}, "2 to 8 worker(s) x 8 CPU(s) + 1 GPU"),
        (8, 0, (1, 2), {}, "1 to 2 worker(s) x 4 CPU(s)"),
        (8, 0, (2, 2), {}, "2 worker(s) x 4 CPU(s)"),
    ],
)
def test_workers_get_equal_shares(
    cluster: dict[str, Any], cpus: int, gpus: int, count: Any, options: dict[str, Any], expected: str
) -> None:
    cluster |= {"cpus": cpus, "gpus": gpus}
    assert str(WorkerRequest(num_workers=count, **options).plan()) == expected
    assert cluster["requests"] == []


@pytest.mark.parametrize(
    ("head", "others", "count", "expected"),
    [
        ((64, 0), [(8, 1), (8, 1)], None, "2 worker(s) x 8 CPU(s) + 1 GPU"),
        ((64, 8), [(8, 1)], 9, "9 worker(s) x 8 CPU(s) + 1 GPU"),
        ((64, 8), [(8, 1)], 2, "2 worker(s) x 32 CPU(s) + 1 GPU"),
        ((4, 0), [(7, 0)], 3, "3 worker(s) x 3 CPU(s)"),
    ],
)
def test_a_share_is_one_that_a_node_has(
    cluster: dict[str, Any],
    head: tuple[int, int],
    others: list[tuple[int, int]],
    count: int | None,
    expected: str,
) -> None:
    cluster |= {"cpus": head[0], "gpus": head[1], "others": others}
    assert str(WorkerRequest(num_workers=count).plan()) == expected


def test_workers_that_fit_no_node_are_refused(cluster: dict[str, Any]) -> None:
    cluster["others"] = [(8, 0)]
    with pytest.raises(
        ClusterError, match=r"1 workers with 9 CPUs .* 16 CPUs and 0 GPUs on 2 node\(s\), 8 CPUs at most"
    ):
        WorkerRequest(num_workers=1, cpus_per_worker=9).plan()


def test_without_workers_the_process_itself_trains(cluster: dict[str, Any]) -> None:
    workers = WorkerRequest(num_workers=0).plan()
    assert (workers.least, workers.most, workers.gpu, workers.count) == (0, 0, False, "1")
    assert WorkerRequest(num_workers=0, cpus_per_worker=3).plan().cpus == 3


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, "3 workers with a GPU each .* has 2 GPUs and 8 CPUs; lower --num-workers to 2"),
        ((3, 8), {}, "3 workers with a GPU each"),
        (2, {"cpus_per_worker": 5}, "2 workers with 5 CPUs each .* has 8 CPUs"),
        (9, {"cpu_only": True}, "9 workers with 1 CPUs each .* --wait-for-nodes"),
    ],
)
def test_more_than_there_is_is_refused(
    cluster: dict[str, Any], count: Any, options: dict[str, Any], message: str
) -> None:
    cluster["gpus"] = 2
    with pytest.raises(ClusterError, match=message):
        WorkerRequest(num_workers=count, **options).plan()


def test_it_asks_a_growing_cluster_for_nodes_and_waits(cluster: dict[str, Any]) -> None:
    cluster |= {"cpus": 0, "arrivals": [70, 200]}
    request = WorkerRequest(num_workers=(2, 4), cpus_per_worker=6, wait_minutes=10)
    workers = request.plan(cluster["said"].append)
    assert workers == WorkerPlan(least=2, most=4, cpus=6, gpu=True)
    assert cluster["requests"] == [[{"CPU": 6, "GPU": 1}] * 2, []]  # and no longer than it needs
    assert cluster["now"] == 200
    assert len(cluster["said"]) == 3
    assert cluster["said"][1].startswith(
        "waiting for nodes: the cluster has 8 CPUs and 1 GPUs; needed: 2 worker(s) of 6 CPU"
    )


def test_a_cluster_that_does_not_grow_in_time_is_given_up(cluster: dict[str, Any]) -> None:
    cluster |= {"cpus": 0, "arrivals": [500]}
    with pytest.raises(ClusterError, match=r"after 2 minutes the cluster has 0 CPUs and 0 GPUs, .* `ray status`"):
        WorkerRequest(num_workers=1, wait_minutes=2).plan(cluster["said"].append)
    assert cluster["requests"][-1] == []


def test_what_is_there_is_not_waited_for(cluster: dict[str, Any]) -> None:
    request = WorkerRequest(num_workers=2, cpus_per_worker=2, cpu_only=True, wait_minutes=5)
    assert str(request.plan()) == "2 worker(s) x 2 CPU(s)"
    assert cluster["now"] == 0


@pytest.mark.parametrize(("address", "passed_on"), [("10.0.0.1:6379", True), ("auto", False), ("ray://x:10001", False)])
def test_all_processes_of_a_run_know_their_cluster(
    address: str, passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may run on the same machine."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: asked.update(options))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0})
    alive = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    monkeypatch.setattr(
        "ray.nodes", lambda: [alive, {"Alive": True, "Resources": {"CPU": 1.0}}, alive | {"Alive": False}]
    )
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_module.cluster_resources() == (3, 0)
    assert cluster_module.cluster_nodes() == [(2, 1), (1, 0)]
    environment = asked["runtime_env"]["env_vars"]
    assert str(cluster_module.PROJECT_ROOT) in environment["PYTHONPATH"]
    assert environment.get("RAY_ADDRESS") == (address if passed_on else None)


@pytest.mark.parametrize("noticed", [True, False])
def test_it_waits_until_ray_has_noticed_that_a_node_is_gone(monkeypatch: pytest.MonkeyPatch, noticed: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as answering, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = {"here": answering.getsockname()[1], "gone": gone.getsockname()[1], "long gone": 1}
        gone.close()
        looks, now = [0], [0.0]

        def nodes() -> list[dict[str, Any]]:
            looks[0] += 1
            alive = {"here": True, "gone": not noticed or looks[0] < 4, "long gone": False}
            return [
                {"NodeID": name, "Alive": alive[name], "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
                for name, port in ports.items()
            ]

        monkeypatch.setattr("ray.nodes", nodes)
        monkeypatch.setattr(cluster_module.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(cluster_module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
        assert await_lost_nodes(seconds=20) == (set() if noticed else {"gone"})
        assert looks[0] == (4 if noticed else 1 + 40)
        ports.pop("gone")
        looks[0] = 0
        assert await_lost_nodes(seconds=20) == set()
        assert looks[0] == 1
