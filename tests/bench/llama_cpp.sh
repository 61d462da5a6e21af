#!/bin/sh
# llama.cpp's server, built for this machine from the source that llama-cpp-python brings, and an environment that
# writes GGUF: tests/bench/llama_cpp.sh DIR. For bench_peers; wants cmake, ninja and a C++ compiler.
set -eu
home=$1
python3 -m venv "$home"
"$home/bin/pip" install --quiet "gguf==0.19.0" "scikit-build-core==1.1.2"  # pip asks the latter what the source is
"$home/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$home/source" "llama-cpp-python==0.3.36"
tar -xzf "$home"/source/*.tar.gz -C "$home/source"
source=$home/source/llama_cpp_python-0.3.36/vendor/llama.cpp
cmake -G Ninja -S "$source" -B "$home/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
cmake --build "$home/build" --target llama-server
cp "$home/build/bin/llama-server" "$home/bin/"
