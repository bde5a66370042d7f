#!/usr/bin/env bash
# From a fresh clone to a picture: trains the default model and its control, evaluates both. About six minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
python train.py
python train.py memory=none
python evaluate.py
