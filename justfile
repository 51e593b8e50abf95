# The commands people use. `just` lists them.

default:
    @just --list

# Train the small default hybrid on this repository's own text
train *args:
    cargo run --release -- train {{args}}

# Run all tests
test:
    cargo test --release --workspace

# Run the CPU kernels' tests with a lesser vector unit than the machine's: `avx2` or `scalar`
test-simd unit="avx2":
    THALWEG_SIMD={{unit}} cargo test --release --workspace --lib --test native_matrix

# Run the tests that need a GPU, or Mesa's software driver in place of one
test-gpu:
    THALWEG_REQUIRE_GPU=1 LP_NATIVE_VECTOR_WIDTH=128 cargo test --release -p thalweg-gpu -p thalweg-scan -p thalweg-tests --features wgpu --test gpu_kernels --test gpu --test oracle --test elementwise --test matrix

# Compile every GPU kernel for CUDA, on any machine
check-cuda:
    .ci/cuda

# Run the GPU kernels' CUDA C++ on the CPU, as an H100 and an A100 would be given it (needs g++)
test-cuda:
    cargo test --release --manifest-path tools/cuda-check/Cargo.toml --test emulated

# Format, lints, documentation, dependency arrows
check:
    cargo fmt --all -- --check
    cargo clippy --release --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps
    .ci/arrows
    .ci/book

# Time the kernels
bench *args:
    cargo run --release -- bench {{args}}

# Compare an implementation with golden results
conform dir="tests/golden/ops" *args:
    cargo run --release -- conform {{dir}} {{args}}

# Check the book's contents and links, and build it
book:
    .ci/book --build
    mdbook build docs
