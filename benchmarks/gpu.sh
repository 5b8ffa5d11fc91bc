#!/usr/bin/env bash
# Everything that needs a GPU, on one device: the tests marked gpu, then the optimizers against torch's fused AdamW.
# Prints as it goes; the same text lands in benchmarks/gpu-DATE.txt. Not yet run on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
log=benchmarks/gpu-$(date +%F).txt
{
    date
    git log -1 --format=%h 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, deepspeed, transformers as t; print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "transformers", t.__version__)'
    "$python" -m pytest -m gpu -s tests/test_gpu.py
    "$python" benchmarks/optimizer.py --device cuda --sizes ViT-S/16 ViT-L/16 ViT-g/14
} 2>&1 | tee "$log"
