"""Rank variables of each launcher."""

import pytest

from hybrid_engine.distributed.env import RankEnv, first_slurm_node, rank_env
from hybrid_engine.errors import UserError


def test_alone():
    assert rank_env({}) == RankEnv(0, 1, 0, 1)


def test_torchrun_and_deepspeed():
    environ = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }
    torchrun = rank_env(environ | {"LOCAL_WORLD_SIZE": "4"})
    assert torchrun == RankEnv(5, 8, 1, 4, "node0", 29500)
    assert rank_env(environ | {"LOCAL_SIZE": "4"}) == torchrun


def test_slurm_step():
    environ = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "gpu[003-004,9]",
        "SLURM_JOB_ID": "123456",
    }
    env = rank_env(environ)
    assert env == RankEnv(3, 5, 1, 2, "gpu003", 20000 + 123456 % 20000)
    assert rank_env(environ | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}).master_addr == "a"


def test_slurm_batch_script_is_a_single_process():
    """An allocation of 8 tasks outside srun: nobody else will come to the rendezvous."""
    assert rank_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == RankEnv()


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03,5]", "gpu03"),
        ("a[1-2]-ib,b", "a1-ib"),
        ("a-b[7]", "a-b7"),
    ],
)
def test_first_slurm_node(nodes, first):
    assert first_slurm_node(nodes) == first


def test_mistakes_are_named():
    with pytest.raises(UserError, match="LOCAL_RANK is None"):
        rank_env({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(UserError, match="RANK is 2 with WORLD_SIZE 2"):
        RankEnv(rank=2, world_size=2)


def test_export_is_read_back():
    environ: dict[str, str] = {}
    env = RankEnv(1, 2, 1, 2, "127.0.0.1", 1234)
    env.export(environ)
    assert rank_env(environ) == env
