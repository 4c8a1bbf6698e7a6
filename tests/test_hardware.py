import torch

from bncli.hardware import describe_machine


def test_the_description_of_a_machine_holds_versions_and_hardware() -> None:
    machine = describe_machine()
    assert machine["torch"] == torch.__version__
    assert machine["num_cpus"] >= 1
    assert machine["cpu"]
