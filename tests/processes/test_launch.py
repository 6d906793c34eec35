"""What a process is told of its run: by arguments, variables and clusters, whole or with its faults named."""

from __future__ import annotations

from typing import Any

import pytest

from mergelab.errors import MeshError
from mergelab.processes.launch import Launch, find_launch, managed, unjoined_tasks

NOTHING = dict.fromkeys(("coordinator", "processes", "process_id"))
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:81", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "JAX_PLATFORMS": "cpu",
}
CPU = {"JAX_PLATFORMS": "cpu"}


def cluster() -> Any:
    return "node01:8476", 2, 1, (0,)


def never() -> Any:
    raise AssertionError("the cluster was asked")


def test_arguments_go_before_variables_and_variables_before_the_cluster() -> None:
    given = {"coordinator": "b:90", "processes": 8, "process_id": 5}
    assert find_launch(given, VARIABLES | STEP, never) == Launch("b:90", 8, 5)
    assert find_launch(NOTHING, VARIABLES | STEP, never) == Launch("a:81", 4, 3)
    assert find_launch({**NOTHING, "process_id": 0}, VARIABLES, never) == Launch("a:81", 4, 0)
    assert find_launch(NOTHING, STEP, cluster) == Launch("node01:8476", 2, 1, (0,))
    mixed = {"JAX_COORDINATOR_ADDRESS": "[::1]:81"} | STEP
    assert find_launch(NOTHING, mixed, cluster) == Launch("[::1]:81", 2, 1, (0,))


def test_a_process_alone_is_no_run() -> None:
    assert find_launch(NOTHING, CPU, never) is None
    assert find_launch({**NOTHING, "processes": 1}, STEP, never) is None
    assert find_launch(NOTHING, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, never) is None
    assert find_launch(NOTHING, {"JAX_COORDINATOR_ADDRESS": " "} | CPU, never) is None
    assert find_launch(NOTHING, STEP, lambda: (None, None, None, None)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:81"}, "--processes (JAX_NUM_PROCESSES) and --process-id (JAX_PROCESS_ID) are"),
        ({"processes": 2}, "--coordinator (JAX_COORDINATOR_ADDRESS) and --process-id"),
        ({"coordinator": "a:81", "processes": 2}, "--process-id (JAX_PROCESS_ID) is missing"),
        ({"coordinator": "a:81", "processes": 2, "process_id": 2}, "have the numbers 0 to 1"),
        ({"processes": 1, "process_id": 3}, "the run has one process, number 0"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "--coordinator is 'a', not an address"),
        ({"coordinator": "a:0", "processes": 2, "process_id": 0}, "write HOST:PORT"),
        ({"coordinator": "a:65536", "processes": 2, "process_id": 0}, "write HOST:PORT"),
        ({"coordinator": "http://a:1", "processes": 2, "process_id": 0}, "write HOST:PORT"),
        ({"coordinator": "a b:1", "processes": "two", "process_id": -1}, "'two', not a whole number from 1"),
    ],
    ids=range(10),
)
def test_what_is_said_amiss_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MeshError) as caught:
        find_launch({**NOTHING, **given}, CPU, never)
    assert words in str(caught.value)


def test_all_faults_are_named_at_once_with_their_variables() -> None:
    wrong = {"JAX_COORDINATOR_ADDRESS": "x" * 5000, "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "9" * 4000}
    with pytest.raises(MeshError) as caught:
        find_launch(NOTHING, wrong, never)
    assert [fault.split()[0] for fault in caught.value.faults] == [
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "JAX_COORDINATOR_ADDRESS",
    ]
    assert len(str(caught.value)) < 600


def test_only_what_starts_several_processes_counts_as_a_cluster() -> None:
    assert managed(STEP)
    assert not managed({**STEP, "SLURM_NTASKS": "1"})
    assert not managed({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"} | CPU)  # a batch script, not a step
    assert managed({"OMPI_COMM_WORLD_SIZE": "2"}) and not managed({"OMPI_COMM_WORLD_SIZE": "1"} | CPU)
    assert managed({"TPU_WORKER_HOSTNAMES": "a,b"}) and not managed({"TPU_WORKER_HOSTNAMES": "a"} | CPU)
    assert managed({"MEGASCALE_NUM_SLICES": "2"}) and not managed({"MEGASCALE_NUM_SLICES": "x"} | CPU)


def test_a_task_of_slurm_that_stands_alone_is_told_the_cure() -> None:
    sentence = unjoined_tasks({"SLURM_NTASKS": "4"})
    assert (
        sentence is not None and "4 tasks" in sentence and "srun" in sentence and "--processes 1" in sentence
    )
    for tasks in ("1", "", "many"):
        assert unjoined_tasks({"SLURM_NTASKS": tasks}) is None
    assert unjoined_tasks({}) is None
