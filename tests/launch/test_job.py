import json

from torch.distributed.run import parse_args

from expertmesh.launch.hosts import Host
from expertmesh.launch.job import Rendezvous, train_program
from expertmesh.launch.place import ThisMachine
from tests.launch.fakes import FakePlace, job


def test_torchrun_understands_what_each_host_is_told():
    two = job(FakePlace("a", ""), FakePlace("b", ""), max_restarts=3)
    for index, name in enumerate("ab"):
        args = parse_args(two.torchrun(index))
        assert args.nnodes == "2"
        assert args.nproc_per_node == "2"
        assert args.rdzv_backend == "c10d"
        assert args.rdzv_endpoint == "a.example:4321"
        assert args.rdzv_id == "theid"
        assert args.rdzv_conf == f"is_host={int(name == 'a')}"
        assert args.local_addr == f"{name}.example"
        assert args.max_restarts == 3
        assert (args.module, args.training_script) == (True, "expertmesh")
        assert args.training_script_args == ["train", "run.toml"]


def test_alone_it_meets_on_a_free_port():
    args = parse_args(job(ThisMachine(), rendezvous=Rendezvous(port=None)).torchrun(0))
    assert args.standalone
    assert args.rdzv_endpoint == ""
    assert args.training_script_args == ["train", "run.toml"]


def test_each_host_runs_its_own_number_of_processes():
    hosts = (Host(name="a", num_processes=1), Host(name="b", num_processes=5))
    uneven = job(FakePlace("a", ""), FakePlace("b", ""), hosts=hosts)
    numbers = [parse_args(uneven.torchrun(index)).nproc_per_node for index in (0, 1)]
    assert numbers == ["1", "5"]


def test_settings_of_libraries_travel_and_nothing_else():
    environ = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1", "HOME": "/h", "TOKEN": "secret"}
    told = job(FakePlace("a", ""), FakePlace("b", ""), gpus="1,3").order(0, environ)
    sent = json.loads(told)["environment"]
    assert sent.pop("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
    assert sent == {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth1",
        "CUDA_VISIBLE_DEVICES": "1,3",
    }


def test_the_program_is_this_package():
    assert train_program(["train", "x.toml"]) == ("-m", "expertmesh", "train", "x.toml")
