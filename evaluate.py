"""Evaluate a model: ``python evaluate.py [key=value] ...``; with no arguments, the default run and its control."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import hydra
from omegaconf import DictConfig

from memlm.cli import check_arguments, open_settings, use_gpu_preset, user_errors

CONFIGS = Path(__file__).parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from memlm.evaluation import run

    with user_errors(CONFIGS, "evaluate"):
        complete = run(cfg)
    if not complete:
        sys.exit(1)


if __name__ == "__main__":
    sys.argv[1:] = open_settings(use_gpu_preset(sys.argv[1:], "name=gpu", ("name=", "checkpoint=", "hardware=")))
    with user_errors(CONFIGS, "evaluate"):
        check_arguments(sys.argv[1:], CONFIGS, "evaluate")
        main()
elif __name__ == "evaluate":
    # Programs that run in this folder, such as python -m lm_eval, mean Hugging Face's package of this name.
    # Another checkout on the path has this file too.
    elsewhere = [folder for folder in sys.path if not Path(folder, "evaluate.py").is_file()]
    if spec := PathFinder.find_spec("evaluate", elsewhere):
        sys.modules["evaluate"] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
