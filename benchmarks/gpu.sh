#!/usr/bin/env bash
# Measures flaxvision on a GPU, one stage at a time; a stage takes less than 9 minutes.
#
#   benchmarks/gpu.sh STAGE [PART]      PART: only the parts with this text in their name
#
#   1 works      tests on the GPU; logits against the CPU; resuming after SIGKILL
#   2 resnet50   training and forward pass in bfloat16 beside torch, compiled torch and Keras: train-256, forward-32
#   3 networks   training of VGG-16, Inception-v3, Xception, SE-ResNet-50 and MobileNetV2, likewise
#   4 cifar10    ResNet-20's published accuracy; trainings: he-resnet20, he-resnet56, fast-SEED
#   5 profile    the longest kernels of ResNet-50's train step; the effect of single changes
#   6 input      JPEG files to batches, and a training of ResNet-50 from them
#   7 trainings  lenet_dli and capsnet on MNIST over five seeds, fashion_cnn on Fashion-MNIST
#
# Parts run in this order until the time is used up; a part that is left out or fails is recorded as such. All parts of
# a stage together can take longer than the limit: name the parts in several calls. Trainings that were cut off
# continue when the same part runs again on the same machine. Results are JSON lines in $OUT/STAGE.jsonl.
#
#   OUT=runs/gpu    folder of the results
#   RUNS=runs       folder of the trainings' checkpoints and records
#   DATA=data       folder with mnist/, fashion_mnist/ (the original files), cifar10/ (its binary version), weights/
#   LIMIT=530       seconds for a stage
#   TINY=1          a dry run of every part on a CPU with tiny sizes
#   FLAXVISION_COMMIT=HASH   the commit, where there is no git repository
#
# A checkout is enough; flaxvision need not be installed. Packages that are missing are named at the start.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} RUNS=${RUNS:-runs} DATA=${DATA:-data} LIMIT=${LIMIT:-530} TINY=${TINY:-}
stage=${1:-} only=${2:-}
case $stage in
    [1-7]) ;;
    works) stage=1 ;; resnet50) stage=2 ;; networks) stage=3 ;; cifar10) stage=4 ;;
    profile) stage=5 ;; input) stage=6 ;; trainings) stage=7 ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
mkdir -p "$OUT"
output=$OUT/$stage.jsonl
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch and child processes need memory too
if [[ $TINY ]]; then export JAX_PLATFORMS=cpu; else export JAX_PLATFORMS=cuda,cpu; fi

"$PYTHON" - "$TINY" <<'PYTHON_END'
import importlib.metadata as metadata, re, sys, tomllib
def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()
def missing(requirements):
    names = [re.match(r"[\w.-]+", requirement).group() for requirement in requirements]
    return [name for name in names if normalized(name) not in present]
present = {normalized(d.metadata["Name"]) for d in metadata.distributions() if d.metadata["Name"]}
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
unused = {"tensorflow-datasets", "importlib-resources"}  # the stages read files
needed = [name for name in missing(project["dependencies"]) if name not in unused]
if needed:
    sys.exit(f"error: packages are missing: {', '.join(needed)}; install them first")
if absent := missing(project["optional-dependencies"]["reference"]):
    print(f"without these libraries to compare with: {', '.join(absent)}")
import jax
from benchmarks import machine
if not sys.argv[1] and jax.default_backend() != "gpu":
    sys.exit(f"error: JAX must see a GPU; got {jax.devices()}; set TINY=1 for a dry run on a CPU")
if not sys.argv[1]:
    machine.check_commit(machine.commit())
PYTHON_END

failures=0
note() { "$PYTHON" -m benchmarks.gpu note --name "$1" --problem "$2" --output "$output"; echo "$1: $2"; }

# part NAME COMMAND...: runs a part in the time that is left. {} in the command becomes the seconds left.
part() {
    local name=$1 left=$((LIMIT - SECONDS)) status=0
    shift
    [[ $name == *"$only"* ]] || return 0
    if ((left < 45)); then note "$name" "left out: no time"; return 0; fi
    echo "== $name, $left s left"
    timeout --kill-after=15 "$left" "${@//\{\}/$((left - 5))}" || status=$?
    if ((status)); then failures=$((failures + 1)); note "$name" "failed: exit status $status"; fi
}

gpu() {
    local kind=$1 name=$2
    shift 2
    part "$name" "$PYTHON" -m benchmarks.gpu "$kind" --name "$name" --seconds {} --output "$output" "$@"
}
throughput() { local name=$1; shift; part "$name" "$PYTHON" -m benchmarks.throughput "$@" --output "$output"; }

# train NAME DATA COMMAND: runs an experiment in a folder of its own, if its data is there.
train() {
    local name=$1 data=$2 command=$3
    [[ $name == *"$only"* ]] || return 0
    if [[ $data && ! -d $data ]]; then note "$name" "left out: no folder $data"; return 0; fi
    gpu training "$name" --command="$command" --workdir "$RUNS/$name"
}

peers=(--vs torch torch_compile keras --lenient)
steps=(--dtype bfloat16 --steps 12 --block 2 --warmup 2 --chain 10)
networks=(vgg16 inception_v3 xception se_resnet50 mobilenet_v2)
if [[ $TINY ]]; then
    steps=(--dtype bfloat16 --steps 2 --block 1 --warmup 1 --chain 2)
    networks=(lenet_dli)
fi

case $stage in
1)
    if [[ $TINY ]]; then
        gpu tests tests --arguments="-n 0 tests/benchmarks/test_timing.py"
        gpu agreement agreement --models mlp lenet5
        gpu tests resume --arguments="-n 0 tests/benchmarks/test_timing.py -k ratio"
    else
        trained=()
        file=$DATA/weights/resnet20_cifar10.npz
        [[ -f $file ]] && trained=(--trained "resnet20_cifar:akamaster:$file")
        gpu agreement agreement "${trained[@]}"
        XLA_FLAGS="--xla_gpu_deterministic_ops=true" JAX_PLATFORMS=cuda \
            gpu tests resume --arguments="-n 0 tests -m 'slow or not slow' -k sigkill_at_ten"
        XLA_FLAGS="--xla_gpu_autotune_level=0" JAX_PLATFORMS=cuda \
            gpu tests tests --arguments="-n 8 tests -m 'not slow and not reference and not data'"
    fi
    ;;
2)
    model=(--model resnet50) trains=(256 128 512) forwards=(256 32 1)
    [[ $TINY ]] && model=(--model lenet5_modern) trains=(4) forwards=(2)
    for batch in "${trains[@]}"; do
        throughput "train-$batch" "${model[@]}" --mode train --batch-size "$batch" "${steps[@]}" "${peers[@]}"
    done
    for batch in "${forwards[@]}"; do
        throughput "forward-$batch" "${model[@]}" --mode forward --batch-size "$batch" "${steps[@]}" "${peers[@]}"
    done
    ;;
3)
    for network in "${networks[@]}"; do
        batch=128
        [[ $TINY ]] && batch=2
        throughput "$network" --model "$network" --mode train --batch-size "$batch" "${steps[@]}" "${peers[@]}"
    done
    ;;
4)
    data=$DATA/cifar10 script=experiments/cifar10.py
    if [[ $TINY ]]; then
        train demo "" "$script --recipe demo --model resnet20_cifar --epochs 0.02 --eval-batch-size 50 --no-progress"
    else
        if [[ -d $data && -f $DATA/weights/resnet20_cifar10.npz ]]; then
            gpu training published --command="$script --manual-dir $data --eval-only \
                --weights $DATA/weights/resnet20_cifar10.npz --source akamaster"
        fi
        for seed in {0..24}; do
            train "fast-$seed" "$data" "$script --manual-dir $data --recipe fast --seed $seed --no-progress --bfloat16"
        done
        for network in resnet20 resnet56; do
            train "he-$network" "$data" "$script --manual-dir $data --model ${network}_cifar --no-progress"
        done
    fi
    ;;
5)
    batch=256 model=resnet50
    [[ $TINY ]] && batch=2 model=lenet5_modern
    gpu kernels kernels --model "$model" --batch-size "$batch"
    common=(--model "$model" --mode train --batch-size "$batch" "${steps[@]}")
    throughput as-is "${common[@]}"
    throughput uint8 "${common[@]}" --uint8
    throughput no-donation "${common[@]}" --no-donate
    throughput four-steps "${common[@]}" --fuse 4
    if [[ ! $TINY ]]; then # flags that a CPU does not have
        XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true" throughput latency-hiding "${common[@]}"
        XLA_FLAGS="--xla_gpu_autotune_level=0" throughput no-autotuning "${common[@]}"
        XLA_FLAGS="--xla_gpu_enable_triton_gemm=false" throughput no-triton "${common[@]}"
    fi
    ;;
6)
    if [[ $TINY ]]; then
        gpu folder folder --images 16 --batch-size 4 --steps 2 --model mlp --image-size 32
    else
        gpu folder folder
        gpu folder folder-1-thread --threads 1 --images 1024 --batch-size 64 --steps 12
    fi
    ;;
7)
    mnist="experiments/mnist.py --dataset mnist --manual-dir $DATA/mnist --no-progress"
    fashion="experiments/mnist.py --dataset fashion_mnist --manual-dir $DATA/fashion_mnist --no-progress"
    if [[ $TINY ]]; then
        train mlp "" "experiments/mnist.py --dataset digits --model mlp --epochs 1 --no-progress"
    else
        for seed in 0 1 2 3 4; do
            train "lenet_dli-$seed" "$DATA/mnist" \
                "$mnist --model lenet_dli --epochs 10 --batch-size 128 --learning-rate 1e-3 --seed $seed"
            train "capsnet-$seed" "$DATA/mnist" "experiments/capsnet_mnist.py --dataset mnist --manual-dir $DATA/mnist \
                --epochs 5 --batch-size 100 --seed $seed --no-progress"
        done
        train fashion_cnn "$DATA/fashion_mnist" "$fashion --model fashion_cnn --epochs 9 --batch-size 64 \
            --learning-rate 1e-3 --schedule cosine --warmup-epochs 0.2"
    fi
    ;;
esac
echo "results: $output"
((failures == 0))
