"""Train a model: ``python train.py [group=choice] [key=value] ...``; with no arguments, the default run."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from memlm.cli import check_arguments, completed, leave_group, of_memory, use_gpu_preset, user_errors

CONFIGS = Path(__file__).parent / "configs"
# A launcher starts the members of a sweep in processes whose sys.argv is its own.
COMMAND = sys.argv


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    from memlm.training import run
    from memlm.training.match import matched
    from memlm.training.sweep import is_member, run_member

    if is_member():
        run_member(cfg, COMMAND)
        return
    with user_errors(CONFIGS, "train"):
        run(matched(of_memory(cfg, HydraConfig.get()), HydraConfig.get()))
        leave_group()


if __name__ == "__main__":
    sys.argv[1:] = completed(sys.argv[1:])
    sys.argv[1:] = use_gpu_preset(sys.argv[1:], "experiment=gpu", ("experiment=", "model=", "hardware="))
    with user_errors(CONFIGS, "train"):
        check_arguments(sys.argv[1:], CONFIGS, "train")
        main()
        from memlm.training.sweep import end_sweep

        end_sweep()
