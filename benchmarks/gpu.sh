#!/usr/bin/env bash
# Everything that needs a GPU, on one device, within 20 minutes; on more devices also what needs several.
#
#   benchmarks/gpu.sh                          all parts, the most telling first; each has a limit, a failure stops none
#   PARTS="G14 g14 S16" benchmarks/gpu.sh      these parts only
#   MINUTES=9 benchmarks/gpu.sh                parts that no time is left for say so
#   WHEELS=FOLDER PYTHON=python3.12 benchmarks/gpu.sh    packages that this Python lacks, from a folder of wheels
#   benchmarks/gpu.sh --dry-run                every line at tiny sizes on the CPU: does it run? (DEVICE=cpu is the same)
#
# Prints as it goes and leaves one file, benchmarks/gpu-DATE.txt: the same text, and as its last line all figures as JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --dry-run ] && DEVICE=cpu
device=${DEVICE:-cuda}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    # An environment of its own that sees this Python's packages, and the wheels before them.
    "$python" -m venv --without-pip "$scratch/venv"
    site=$("$scratch/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" --upgrade "$WHEELS"/*.whl
    "$python" -c 'import site, sys; print("\n".join([*site.getsitepackages(), *sys.path[1:]]))' > "$site/around.pth"
    # Scripts that pip has put below its target were written for the other Python.
    for name in deepspeed pytest; do
        printf '#!/bin/sh\nexec "%s" -c "import sys; sys.argv[0] = %s; from %s import main; sys.exit(main())" "$@"\n' \
            "$scratch/venv/bin/python" "'$name'" "$([ $name = deepspeed ] && echo deepspeed.launcher.runner || echo pytest)" \
            > "$scratch/venv/bin/$name" && chmod +x "$scratch/venv/bin/$name"
    done
    python=$scratch/venv/bin/python
fi
PATH=$(dirname "$(command -v "$python")"):$PATH

if [ "$device" = cpu ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    log=benchmarks/gpu-dry-run.txt minutes=${MINUTES:-60} gpus=1
    shape="--set vitds.model.width=32 --set vitds.model.depth=2 --set vitds.model.mlp_dim=64 --set vitds.model.num_heads=2
           --set vitds.model.image_size=28 --set vitds.model.patch_size=14 --set vitds.model.num_classes=10"
    G14_sizes=2:2 g14_sizes=2:2 S16_sizes=2:2 flats="ViT-S/16 --elements 1000000 --rounds 1" fp8="--steps 3 --seeds 0" attention="2,16,2,104 2,16,2,88" micro=2
    G14_classes=10 S16_classes=10 quick="--warmup 1 --steps 1" small="--variant ViT-mu/16 --rounds 1" images="--images 16 --batches 1 --rounds 1"
else
    log=benchmarks/gpu-$(date +%F).txt minutes=${MINUTES:-20} gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    # Each size costs a compilation: 32 only where 64 of the peers may not fit.
    first=$("$python" -c 'import torch; print(64 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 32)')
    shape="" G14_sizes=${first:-32}:256 g14_sizes=128:256 S16_sizes=256:1024 flats="ViT-G/14" fp8="" micro=64
    attention="64,256,16,104 64,256,16,88 256,196,6,64"
    G14_classes=29593 S16_classes=1000 quick="--warmup 3 --steps 10" small="--variant ViT-L/16 --rounds 3" images="--images 256 --rounds 2"
fi
synthetic="--set vitds.data.train.source=synthetic --set vitds.data.train.path=null --set vitds.data.eval=null
           --set vitds.data.train.num_images=1281167 --set vitds.data.num_workers=2"
short="--set vitds.train.total_steps=8 --set scheduler.type=constant --set scheduler.params={}"
G14="--config ds_configs/gigantic_G14_zero2.json --set vitds.train.activation_checkpointing=none --set vitds.train.compile=true $shape"
g14="--config ds_configs/giant_g14_zero2.json --set vitds.train.activation_checkpointing=none --set vitds.train.compile=true $shape"
S16="--config ds_configs/imagenet_s16.json --set vitds.train.compile=true $shape"
ends=$((SECONDS + minutes * 60))

part() { # part NAME LIMIT_SECONDS COMMAND…: within its limit and what is left; its JSON is $scratch/NAME.json
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]] && return
    [ "$device" = cpu ] && limit=600
    [ $((ends - SECONDS)) -lt "$limit" ] && limit=$((ends - SECONDS))
    echo
    echo "== $name (at most $limit s)"
    [ "$limit" -lt 15 ] && { echo "== $name: no time is left"; return; }
    for word in "$@"; do
        [[ $word == benchmarks/*.py && ! -e $word ]] && { echo "== $name: $word is not there"; return; }
    done
    timeout --signal=INT --kill-after=20 "$limit" "$@"
    code=$?
    echo "== $name: ended with $code after $((SECONDS - began)) s"
}

out() { echo "--json $scratch/$1.json"; }

facts() {
    date
    git log -1 --format='commit %h' 2> /dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader 2> /dev/null
    "$python" - << 'END'
import sys
from importlib import metadata

print("Python", sys.version.split()[0])
for name in ("torch", "deepspeed", "transformers", "triton", "timm", "torchao", "transformer_engine", "numpy"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not there")
END
}

all_parts() {
    facts
    # shellcheck disable=SC2046,SC2086
    {
        part G14 400 "$python" benchmarks/step.py $G14 --search $G14_sizes --refine --rounds 0 $quick $(out G14) \
            --trainees ours siglip-deepspeed siglip-fsdp2-compiled siglip-deepspeed-torch-adam timm-compiled siglip-ddp-compiled \
            --baseline siglip-deepspeed
        part optimizer 80 "$python" benchmarks/optimizer.py --device $device --sizes $flats $(out optimizer)
        part memory 250 "$python" benchmarks/memory.py --seconds 220 $(out memory)
        part attention 45 "$python" benchmarks/attention.py --device $device --shapes $attention $(out attention)
        part g14 110 "$python" benchmarks/step.py $g14 --search $g14_sizes --rounds 0 $quick $(out g14) --trainees ours
        part S16 90 "$python" benchmarks/step.py $S16 --search $S16_sizes --rounds 0 $quick $(out S16) --trainees ours
        part sums 120 "$python" benchmarks/step.py $G14 --micro $micro --rounds 1 $quick $(out sums) --trainees ours \
            --sweep stage=1,2 accumulate=bf16
        part tests 150 "$python" -m pytest -m gpu -s tests
        # What follows has what the parts above leave of their limits.
        part profile 150 deepspeed --num_gpus 1 launcher/train.py $G14 $synthetic $short --output-dir "$scratch/profile" \
            --profile 5:2 --set vitds.data.train.num_classes=$G14_classes --set train_batch_size=$micro --set train_micro_batch_size_per_gpu=$micro
        part sweep 240 "$python" benchmarks/step.py $G14 --micro $micro --rounds 1 $quick $(out sweep) --trainees ours \
            --sweep mode=default,reduce-overhead checkpointing=none,every:2
        part eager 60 "$python" benchmarks/step.py $G14 --micro $micro --rounds 1 $quick $(out eager) --trainees ours \
            --sweep compile=false
        part startup 120 "$python" benchmarks/startup.py $S16 $synthetic --set vitds.data.train.num_classes=$S16_classes --ranks 1 --rounds 1 $(out startup)
        part checkpoint 60 deepspeed --num_gpus 1 benchmarks/checkpoint.py $small --directory "$scratch" $(out checkpoint)
        part loader 40 "$python" benchmarks/loader.py --workers 0 2 --device $device $images $(out loader)
        part fp8 90 "$python" benchmarks/fp8.py $fp8 $(out fp8)
        if [ "$gpus" -gt 1 ]; then
            part ranks 180 "$python" benchmarks/step.py $G14 --ranks $gpus --search $G14_sizes --rounds 0 $quick $(out ranks) \
                --trainees ours siglip-deepspeed siglip-fsdp2-compiled --baseline siglip-deepspeed
            part stages 180 "$python" benchmarks/step.py $G14 --ranks $gpus --micro $micro --rounds 1 $quick $(out stages) \
                --trainees ours --sweep stage=1,2,3
            part save 90 deepspeed --num_gpus $gpus benchmarks/checkpoint.py $small --directory "$scratch" $(out save)
        fi
    }
}

all_parts 2>&1 | tee "$log"
"$python" - "$scratch" >> "$log" << 'END'
import json
import sys
from pathlib import Path

print(json.dumps({path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}))
END
echo "all of it, and as its last line all figures as JSON: $log"
